"""Symmetric products ``beta D + alpha X X^T`` of stacks of matrices, at half the work: only tiles on and below the
diagonal are computed, and each is stored twice.

Programs run through bands of ``GROUP`` rows of tiles, down each column of a band, so that those that run at one time
read the same rows of ``X``, from the cache. Programs above the diagonal end at once, which takes less than finding the
place in a triangle would be worth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .language import jit, tl
from .tile import DTYPES

__all__ = ["SUPPORTED", "Launch", "constexprs", "launch_of", "symmetric", "symmetric_product"]

SUPPORTED = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of the kernel; all accumulate in fp32."""


class Launch(NamedTuple):
    """How tiles are cut and run: square tiles of the result, columns of ``X`` at a time, rows of tiles in a band."""

    block: int
    depth: int
    group: int
    warps: int
    stages: int


# A table and no autotuning: it can be checked for spilled registers on machines without the GPU, every rank takes the
# same, and no step stops to measure. fp32 has no tensor cores ("ieee"), so its tiles are as large as registers allow.
_LAUNCHES = {
    ("cuda", 2): Launch(128, 64, 8, 8, 3),
    ("cuda", 4): Launch(64, 16, 8, 8, 3),
    ("hip", 2): Launch(128, 64, 8, 8, 2),
    ("hip", 4): Launch(64, 32, 8, 4, 2),
}


@jit
def symmetric(
    x,
    add,
    out,
    rows,
    columns,
    x_batch,
    x_row,
    x_column,
    add_batch,
    add_row,
    add_column,
    alpha,
    beta,
    ADDS: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A program makes one tile of one matrix, and its mirror image; see the module's docstring for their order."""
    tiles = tl.cdiv(rows, BLOCK)
    pid = tl.program_id(0)
    batch = (pid // (tiles * tiles)).to(tl.int64)
    place = pid % (tiles * tiles)
    first = place // (GROUP * tiles) * GROUP
    height = min(tiles - first, GROUP)
    row_tile = first + place % (GROUP * tiles) % height
    column_tile = place % (GROUP * tiles) // height
    if column_tile > row_tile:
        return
    # 64-bit from here on: a matrix may have more than 2^31 elements.
    r = (row_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    c = (column_tile * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    k = tl.arange(0, DEPTH).to(tl.int64)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    x += batch * x_batch
    for start in range(0, columns, DEPTH):
        at = start + k
        left = tl.load(
            x + r[:, None] * x_row + at[None, :] * x_column,
            mask=(r < rows)[:, None] & (at < columns)[None, :],
            other=0.0,
        )
        right = tl.load(
            x + at[:, None] * x_column + c[None, :] * x_row,
            mask=(at < columns)[:, None] & (c < rows)[None, :],
            other=0.0,
        )
        # "ieee": fp32 products as torch's default ones, and not of values cut to TF32.
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
    total = total * alpha
    inside = (r < rows)[:, None] & (c < rows)[None, :]
    if ADDS:
        added = tl.load(
            add + batch * add_batch + r[:, None] * add_row + c[None, :] * add_column, mask=inside, other=0.0
        )
        total += beta * added.to(tl.float32)
    mirrored = tl.trans(total)
    out += batch * rows * rows
    if row_tile == column_tile:  # mirrored within, so that the result is symmetric to the last bit
        total = tl.where(r[:, None] >= c[None, :], total, mirrored)
    else:
        tl.store(
            out + c[:, None] * rows + r[None, :],
            mirrored.to(out.dtype.element_ty),
            mask=(c < rows)[:, None] & (r < rows)[None, :],
        )
    tl.store(out + r[:, None] * rows + c[None, :], total.to(out.dtype.element_ty), mask=inside)


def launch_of(dtype: torch.dtype, hip: bool) -> Launch:
    """How products of this dtype are launched on CUDA or HIP."""
    return _LAUNCHES["hip" if hip else "cuda", dtype.itemsize]


def constexprs(dtype: torch.dtype, adds: bool, launch: Launch, interpreted: bool = False) -> dict[str, Any]:
    """The compile-time arguments of :func:`symmetric`.

    Args:
        dtype: of the matrices.
        adds: whether a matrix is added.
        launch: the tiles.
        interpreted: multiply in fp32, since Triton's interpreter cannot multiply bfloat16; the products are the same.
    """
    dot = DTYPES[torch.float32 if interpreted else dtype]
    return {"ADDS": adds, "DOT": dot, "BLOCK": launch.block, "DEPTH": launch.depth, "GROUP": launch.group}


def symmetric_product(
    x: torch.Tensor, add: torch.Tensor | None, alpha: float, beta: float, launch: Launch | None = None
) -> torch.Tensor:
    """``beta * add + alpha * x x^T`` by the kernel, on the device of ``x``: a GPU, or a CPU that interprets.

    Args:
        x: ``[n, rows, columns]`` of any strides, of a dtype of :data:`SUPPORTED`.
        add: ``[n, rows, rows]``, symmetric: only its lower triangle is read; None: nothing is added.
        alpha, beta: factors.
        launch: in place of that of the dtype.

    Returns:
        ``[n, rows, rows]``, contiguous and exactly symmetric, in the dtype of ``x``; accumulated in fp32.
    """
    n, rows, columns = x.shape
    hip = torch.version.hip is not None
    launch = launch or launch_of(x.dtype, hip)
    out = torch.empty(n, rows, rows, dtype=x.dtype, device=x.device)
    added = out if add is None else add
    tiles = -(-rows // launch.block)
    symmetric[(n * tiles * tiles,)](
        x,
        added,
        out,
        rows,
        columns,
        *x.stride(),
        *added.stride(),
        float(alpha),
        float(beta),
        **constexprs(x.dtype, add is not None, launch, interpreted=x.device.type == "cpu"),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    return out
