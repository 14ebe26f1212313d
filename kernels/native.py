"""Codes on a CPU: what becomes of a block, in C++, for the blocks of many states in one call.

Compiled torch code of the same arithmetic takes three to four times as long, most of it for the care that its minimum
and maximum take of NaN. The arithmetic is the rules' of :mod:`.codes`, traced; decoding looks up what they computed of
each code. Bits are those of every other backend: no product and sum become one operation.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from .codes import FORMATS, LEAST, Format
from .cpp import PRELUDE, as_cpp
from .language import as_torch

__all__ = ["Job", "native"]

Job = tuple[Format, torch.Tensor, torch.Tensor, torch.Tensor]
"""A format; codes ``[blocks, width]``, scales ``[blocks]`` and numbers ``[blocks, block]``, dense, on the CPU."""

_BLOCKS = (
    """
struct Job { int64_t format; uint8_t* codes; float* scales; float* numbers; int64_t blocks; };

#ifdef __AVX512F__
#include <immintrin.h>
// Sixteen entries in each register; a code is looked up in pairs of them, of which its high bits choose one.
static inline void look_up8(const float* table, const uint8_t* codes, float scale, float* out) {
    __m512 parts[16];
    for (int j = 0; j < 16; ++j) parts[j] = _mm512_loadu_ps(table + 16 * j);
    for (int i = 0; i < 256; i += 16) {
        const __m512i k = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i)));
        __m512 found[8];
        for (int j = 0; j < 8; ++j) found[j] = _mm512_permutex2var_ps(parts[2 * j], k, parts[2 * j + 1]);
        for (int width = 4, bit = 32; width; width /= 2, bit *= 2) {
            const __mmask16 upper = _mm512_test_epi32_mask(k, _mm512_set1_epi32(bit));
            for (int j = 0; j < width; ++j) found[j] = _mm512_mask_mov_ps(found[2 * j], upper, found[2 * j + 1]);
        }
        _mm512_storeu_ps(out + i, _mm512_mul_ps(found[0], _mm512_set1_ps(scale)));
    }
}
#else
static inline void look_up8(const float* table, const uint8_t* codes, float scale, float* out) {
    for (int i = 0; i < 256; ++i) out[i] = table[codes[i]] * scale;
}
#endif

template <int BITS, int BLOCK>
static void decode_block(const Job& job, int64_t i, const float* table) {
    constexpr int WIDTH = BLOCK * BITS / 8;
    const uint8_t* codes = job.codes + i * WIDTH;
    float* out = job.numbers + i * BLOCK;
    const float scale = job.scales[i];
    if constexpr (BITS == 8) {
        static_assert(BLOCK == 256);
        look_up8(table, codes, scale, out);
    } else {
        for (int j = 0; j < WIDTH; ++j) {
            out[j] = table[codes[j] & 15] * scale;
            out[j + WIDTH] = table[codes[j] >> 4] * scale;
        }
    }
}

template <int BITS, int BLOCK, float CODE(float)>
static void encode_block(const Job& job, int64_t i, bool known) {
    constexpr int WIDTH = BLOCK * BITS / 8;
    const float* __restrict x = job.numbers + i * BLOCK;
    uint8_t* __restrict codes = job.codes + i * WIDTH;
    if (!known) {  // as bits: ordered as the numbers are, NaN above all
        int32_t most = 0;
        for (int j = 0; j < BLOCK; ++j) {
            const int32_t size = as_int(x[j]) & 0x7FFFFFFF;
            most = most > size ? most : size;
        }
        const float scale = as_float(most < 0x7F800000 ? most : 0x7F800000);
        job.scales[i] = scale < LEAST ? 0.0f : scale;
    }
    const float scale = job.scales[i];
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int j = 0; j < WIDTH; ++j) {
        int32_t code = (int32_t)CODE(x[j] * inverse);
        if constexpr (BITS == 4) code |= (int32_t)CODE(x[j + WIDTH] * inverse) << 4;
        codes[j] = (uint8_t)code;
    }
}

template <typename Work>
static void each_block(const Job* jobs, int64_t count, Work work) {
    int64_t total = 0;
    for (int64_t n = 0; n < count; ++n) total += jobs[n].blocks;
    #pragma omp parallel for schedule(static) if (total > 64)
    for (int64_t at = 0; at < total; ++at) {
        int64_t n = 0, i = at;
        while (i >= jobs[n].blocks) i -= jobs[n++].blocks;
        work(jobs[n], i);
    }
}
"""
)


def _source() -> str:
    functions = "".join(as_cpp(code.encode, f"code{i}") for i, code in enumerate(FORMATS))
    sizes = [f"{code.bits}, {code.block}" for code in FORMATS]
    encoding = "".join(
        f"        case {i}: return encode_block<{size}, code{i}>(job, i, known);\n" for i, size in enumerate(sizes)
    )
    decoding = "".join(
        f"        case {i}: return decode_block<{size}>(job, i, tables + 256 * {i});\n" for i, size in enumerate(sizes)
    )
    return f"""{PRELUDE}
static const float LEAST = (float){LEAST!r};
{_BLOCKS}
{functions}
extern "C" void encode(const Job* jobs, int64_t count, int64_t known) {{
    each_block(jobs, count, [=](const Job& job, int64_t i) {{
        switch (job.format) {{
{encoding}        }}
    }});
}}

extern "C" void decode(const Job* jobs, int64_t count, const float* tables) {{
    each_block(jobs, count, [=](const Job& job, int64_t i) {{
        switch (job.format) {{
{decoding}        }}
    }});
}}
"""


class Native:
    """The two functions of the library."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._tables = torch.zeros(len(FORMATS), 256, dtype=torch.float32, device="cpu")
        for table, code in zip(self._tables, FORMATS, strict=True):
            count = 2**code.bits
            table[:count] = as_torch(code.decode)(torch.arange(count, dtype=torch.float32, device="cpu"))

    def encode(self, jobs: Sequence[Job], known: bool) -> None:
        """Write codes, and scales unless these are known."""
        self._library.encode(_written(jobs), ctypes.c_int64(len(jobs)), ctypes.c_int64(known))

    def decode(self, jobs: Sequence[Job]) -> None:
        """Write numbers."""
        tables = ctypes.c_void_p(self._tables.data_ptr())
        self._library.decode(_written(jobs), ctypes.c_int64(len(jobs)), tables)


def _written(jobs: Sequence[Job]) -> Any:
    rows = [
        (FORMATS.index(code), codes.data_ptr(), scales.data_ptr(), numbers.data_ptr(), len(codes))
        for code, codes, scales, numbers in jobs
    ]
    return (ctypes.c_int64 * (5 * len(rows)))(*chain.from_iterable(rows))


@functools.cache
def native() -> Native | None:
    """The library, built once for a machine by what builds torch.compile's code; None where that does not work."""
    try:
        from torch._inductor.codecache import CppCodeCache

        flags = ("-ftree-loop-vectorize", "-ffp-contract=off")  # Inductor's own turn off the first
        return Native(CppCodeCache.load(_source(), "cpu", extra_flags=flags))
    except Exception:  # whatever its parts raise: compiled torch operations remain
        return None
