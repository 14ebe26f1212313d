"""Orthogonalisation by Newton-Schulz iterations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .products import symmetric
from .work import Held, Turn, Work

__all__ = [
    "NEWTON_SCHULZ",
    "POLAR_EXPRESS",
    "Coefficients",
    "Orthogonalize",
    "orthogonalized",
    "polar_express",
    "runs",
]

Coefficients = tuple[tuple[float, float, float], ...]
"""For each iteration ``(a, b, c)`` of ``x -> (a + b y + c y y) x`` with ``y = x x^T``."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Of every iteration in Muon: steep at zero, at the price of singular values between 0.7 and 1.2 (Jordan 2024)."""

POLAR_EXPRESS: Coefficients = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""The polynomials of least error for singular values from 1e-3 to 1, one after the other; the last one converges.
Amsel et al., https://arxiv.org/abs/2505.16932."""


def polar_express(steps: int, safety: float = 1.01) -> Coefficients:
    """The first ``steps`` of :data:`POLAR_EXPRESS`, the last repeated; all but it for values ``safety`` too large."""
    safe = [(a / safety, b / safety**3, c / safety**5) for a, b, c in POLAR_EXPRESS[:-1]]
    return tuple(safe[i] if i < len(safe) else POLAR_EXPRESS[-1] for i in range(steps))


WIDE = 2.5
"""Columns for each row from which iterations run on Gram matrices. In operations they gain from 1.5 on
(:func:`_operations`); in time, on a CPU, nothing up to 2, and a third at 4."""

GROWTH = {torch.float64: 150.0, torch.float32: 150.0, torch.bfloat16: 20.0, torch.float16: 20.0}
"""How many times as large rounding errors of a Gram matrix may become in a run, by dtype: see :func:`runs`.

So fp32 is within 1e-5 of the exact iteration, or is as far from it as the plain iteration in fp32, where small singular
values make that less exact; 16-bit dtypes are at most 2.5 times as far from it as the plain iteration. Relative, in the
Frobenius norm; measured for spectra from flat to falling by 1e-6 (tests/test_newton_schulz.py)."""


def orthogonalized(stacked: torch.Tensor, coefficients: Sequence[Sequence[float]], eps: float) -> torch.Tensor:
    """About the nearest orthogonal matrix of each: ``U V^T`` where ``x = U S V^T``.

    Wide and tall matrices iterate on their small Gram matrix (Zhang et al., https://dao-ailab.github.io/blog/2026/gram-newton-schulz/),
    whatever the others in the stack are. The result is that of iterating on ``x`` but for rounding.

    Args:
        stacked: ``[n, rows, columns]``.
        coefficients: of each iteration.
        eps: the least norm that is divided by; a matrix of zeros stays one.

    Returns:
        of the shape and dtype of ``stacked``, in which it computes.
    """
    return _overwritten(stacked.clone(), coefficients, eps)


def _overwritten(x: torch.Tensor, coefficients: Sequence[Sequence[float]], eps: float) -> torch.Tensor:
    """:func:`orthogonalized`, in the memory of ``x`` or in other."""
    x.div_(torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps))
    spare = torch.empty_like(x)
    for run in runs(coefficients, min(x.shape[1:]), max(x.shape[1:]), x.dtype):
        x, spare = _iterated(x, run, spare), x
    return x


def runs(
    coefficients: Sequence[Sequence[float]], rows: int, columns: int, dtype: torch.dtype
) -> list[list[Sequence[float]]]:
    """The iterations, those together that are done on one Gram matrix, before the next is made of the matrix itself.

    A Gram matrix has rounding errors as large as its dtype's of its largest singular value squared, which in directions
    of small singular values is all that it has. There an iteration multiplies it by ``a * a``, so that after some
    iterations the errors would count. The matrix itself keeps those directions: a Gram matrix made anew is right again.
    """
    if columns < WIDE * rows:
        return [[each] for each in coefficients]
    made: list[list[Sequence[float]]] = []
    growth = 1.0
    for each in coefficients:
        if not made or growth > GROWTH[dtype]:
            made.append([])
            growth = 1.0
        made[-1].append(each)
        growth *= each[0] ** 2
    return made


def _iterated(x: torch.Tensor, run: Sequence[Sequence[float]], out: torch.Tensor) -> torch.Tensor:
    """``x`` after a run of iterations ``x -> P x``, where ``P = a + b y + c y y`` and ``y = x x^T``; of tall ones
    ``x -> x P`` and ``y = x^T x``, which is the same. It is written to ``out``.

    All ``P`` of a run are polynomials of its first ``y``: they and ``y`` are symmetric and commute, so ``y`` goes on as
    ``P y P``, and only the product of all ``P`` has to meet ``x``, whose columns are many.
    """
    tall = x.shape[1] > x.shape[2]
    gram = symmetric(x.mT if tall else x)
    (a, b, c), *others = run
    polynomial = symmetric(gram, gram, alpha=c, beta=b)  # always without a, which is added where it multiplies
    if not others:
        left, right = (x, polynomial) if tall else (polynomial, x)
        return torch.baddbmm(x, left, right, beta=a, out=out)
    product = polynomial.clone()
    product.diagonal(dim1=-2, dim2=-1).add_(a)
    for number, (following, b, c) in enumerate(others, 2):
        gram = torch.baddbmm(gram, polynomial, gram, beta=a)
        gram = torch.baddbmm(gram, gram, polynomial, beta=a)
        if number < len(run) or x.element_size() > 2:  # in 16 bits it takes as long as a product, and gains less
            gram = gram.lerp(gram.mT, 0.5)  # symmetric but for rounding, which the next products would make more of
        a, polynomial = following, symmetric(gram, gram, alpha=c, beta=b)
        product = torch.baddbmm(product, polynomial, product, beta=a)
    left, right = (x, product) if tall else (product, x)
    return torch.bmm(left, right, out=out)


def _operations(run: Sequence[Sequence[float]], rows: int, columns: int) -> float:
    """Floating-point operations of :func:`_iterated` for one matrix, symmetric products counted in full.

    Two products with ``x``; in every iteration one for the polynomial, and after the first three more, two for ``y``.
    ``k`` runs of one iteration take ``4 k`` and ``2 k`` where one run of ``k`` takes ``4`` and ``8 k - 6``: more, if
    columns are less than 1.5 times as many as rows.
    """
    return 4.0 * rows * rows * columns + (8 * len(run) - 6) * rows**3


@dataclass(frozen=True)
class Orthogonalize(Work):
    """Whole-matrix work: see :func:`orthogonalized`. Parameters of more than two axes are matrices of their first axis.

    Args:
        coefficients: of each iteration.
        eps: the least norm that is divided by.
        scale: ``"original"``: ``sqrt(max(1, rows / columns))``; ``"match_rms_adamw"``:
            ``0.2 sqrt(max(rows, columns))``; None: 1.
        dtype: to compute in; None for that of the matrices, but bfloat16 on GPUs.
    """

    coefficients: Coefficients
    eps: float
    scale: str | None
    dtype: torch.dtype | None

    def __call__(self, stacked: torch.Tensor, held: Held, turn: Turn) -> torch.Tensor:
        matrices, shape = stacked.flatten(2), stacked.shape
        on_gpu = stacked.device.type == "cuda" and stacked.dtype == torch.float32
        dtype = self.dtype or (torch.bfloat16 if on_gpu else stacked.dtype)
        made = _overwritten(matrices.to(dtype), self.coefficients, self.eps)
        factor = self.factor(matrices.shape[1], matrices.shape[2])
        result = matrices.copy_(made)
        return (result if factor == 1 else result.mul_(factor)).view(shape)

    def factor(self, rows: int, columns: int) -> float:
        """What the result is multiplied by, for a matrix of this shape."""
        if self.scale == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns)) if self.scale == "match_rms_adamw" else 1.0

    def cost(self, shape: Sequence[int]) -> float:
        """Floating-point operations. Where ``dtype`` is None, those of fp32: bf16 makes Gram matrices more often."""
        rows, columns = shape[0], math.prod(shape[1:])
        small, large = min(rows, columns), max(rows, columns)
        each = runs(self.coefficients, small, large, self.dtype or torch.float32)
        return sum(_operations(run, small, large) for run in each)
