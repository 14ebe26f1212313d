"""What lies below the diagonal of square matrices on a CPU, copied above it."""

from __future__ import annotations

import ctypes

import torch

from .cpp import OPENMP, built

__all__ = ["can_mirror", "mirror"]

_NAMES = {torch.float32: "mirror_float", torch.float64: "mirror_double"}
_SOURCE = f"""
#include <algorithm>
#include <cstdint>
{OPENMP}
constexpr int64_t TILE = 16;  // read by columns and written by rows, so that both are in the first cache

template <typename T>
static void mirror_rows(T* a, int64_t size, int64_t row) {{
    const int64_t rows = std::min(row + TILE, size), whole = rows - row < TILE ? 0 : row;
    for (int64_t column = 0; column < whole; column += TILE)
        for (int64_t j = column; j < column + TILE; ++j) {{
            T* to = a + j * size + row;
            const T* from = a + row * size + j;
            #pragma GCC unroll 16
            for (int64_t i = 0; i < TILE; ++i) to[i] = from[i * size];
        }}
    for (int64_t j = whole; j < rows; ++j)
        for (int64_t i = std::max(row, j + 1); i < rows; ++i) a[j * size + i] = a[i * size + j];
}}

template <typename T>
static void mirror(T* stack, int64_t count, int64_t size) {{
    const int64_t tiles = (size + TILE - 1) / TILE;
    #pragma omp parallel for schedule(dynamic, 8) if (size >= 1024)
    for (int64_t n = 0; n < count * tiles; ++n)
        mirror_rows(stack + n / tiles * size * size, size, n % tiles * TILE);
}}

extern "C" void mirror_float(float* stack, int64_t count, int64_t size) {{ mirror(stack, count, size); }}
extern "C" void mirror_double(double* stack, int64_t count, int64_t size) {{ mirror(stack, count, size); }}
"""


def can_mirror(stacked: torch.Tensor) -> bool:
    """Whether :func:`mirror` takes ``[n, d, d]``."""
    return (
        stacked.device.type == "cpu"
        and stacked.dtype in _NAMES
        and stacked.is_contiguous()
        and built(_SOURCE) is not None
    )


def mirror(stacked: torch.Tensor) -> None:
    """Make each of ``[n, d, d]`` symmetric, by what is below its diagonal."""
    run = getattr(built(_SOURCE), _NAMES[stacked.dtype])
    n, size, _ = stacked.shape
    run(ctypes.c_void_p(stacked.data_ptr()), ctypes.c_int64(n), ctypes.c_int64(size))
