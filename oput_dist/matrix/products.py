"""Symmetric products of stacks of matrices: at half the work where that is faster, else torch's products."""

from __future__ import annotations

import torch

from oput_dist.kernels.language import HAS_TRITON
from oput_dist.kernels.mirror import can_mirror, mirror
from oput_dist.kernels.symmetric import symmetric_product

__all__ = ["LEAST_ROWS", "PANEL", "add_symmetric", "symmetric"]

LEAST_ROWS = {torch.bfloat16: 2048, torch.float16: 2048}
"""Rows from which the kernel of half the work is taken on GPUs; other dtypes never take it.

Below, the plain product is at least as fast: 1024 rows are 64 tiles of the result, half of which fill no large GPU
better, and to launch costs more than a tile. Symmetric products in Triton that others published gain 1.6 times at 4096
rows and lose at 1024. In fp32 the kernel has no tensor cores, and no lead over the vendor's library to begin with.
``python -m benchmarks.matrices`` measures both on a GPU.
"""
PANEL = 128
"""Columns of a product that a CPU makes at a time, from the diagonal down: narrower ones take as long."""


def symmetric(x: torch.Tensor, add: torch.Tensor | None = None, alpha: float = 1.0, beta: float = 0.0) -> torch.Tensor:
    """``beta * add + alpha * x x^T`` of each matrix.

    Args:
        x: ``[n, rows, columns]``, floating, of any strides.
        add: ``[n, rows, rows]``, symmetric, in the dtype of ``x``; None: nothing is added.
        alpha, beta: factors.

    Returns:
        ``[n, rows, rows]`` in the dtype of ``x``.

    Raises:
        ValueError: if ``add`` has another shape or dtype than the result.
    """
    wanted = (x.shape[0], x.shape[1], x.shape[1])
    if add is not None and (add.shape != wanted or add.dtype != x.dtype):
        raise ValueError(f"add is {add.dtype} {tuple(add.shape)}: must be {x.dtype} {wanted}, as the product")
    if _pays(x):
        with torch.cuda.device(x.device):  # need not be the current one
            return symmetric_product(x, add, alpha, beta)
    if _in_panels(x):
        made = x.new_empty(wanted) if add is None else add.clone(memory_format=torch.contiguous_format)
        add_symmetric(made, x, alpha, 0.0 if add is None else beta)
        return made
    if add is not None:
        return torch.baddbmm(add, x, x.mT, beta=beta, alpha=alpha)
    made = torch.bmm(x, x.mT)
    return made if alpha == 1 else made * alpha


def add_symmetric(old: torch.Tensor, x: torch.Tensor, alpha: float, beta: float) -> None:
    """Make ``old``, symmetric, be ``beta * old + alpha * x x^T``: see :func:`symmetric`."""
    if not (_in_panels(x) and can_mirror(old)):
        old.baddbmm_(x, x.mT, beta=beta, alpha=alpha)
        return
    columns, rest = x.mT, old
    for at in range(0, old.shape[1], PANEL):
        below = x if at == 0 else x.narrow(1, at, rest.shape[1])
        width = min(PANEL, rest.shape[1])
        rest.narrow(2, at, width).baddbmm_(below, columns.narrow(2, at, width), beta=beta, alpha=alpha)
        if width < rest.shape[1]:
            rest = rest.narrow(1, width, rest.shape[1] - width)
    mirror(old)


def _pays(x: torch.Tensor) -> bool:
    """Whether the kernel runs here and is faster."""
    if not HAS_TRITON or x.device.type != "cuda" or x.dtype not in LEAST_ROWS or x.shape[1] < LEAST_ROWS[x.dtype]:
        return False
    # Otherwise it reads two bytes at a time and spills registers.
    sizes = (*x.shape[1:], *(stride for stride in x.stride() if stride != 1))
    return x.data_ptr() % 16 == 0 and all(size % 16 == 0 for size in sizes)


def _in_panels(x: torch.Tensor) -> bool:
    """Whether a CPU is faster to leave out most of what lies above the diagonal, and to copy it."""
    fits = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    return fits and x.shape[1] >= 2 * PANEL and x.shape[2] >= PANEL
