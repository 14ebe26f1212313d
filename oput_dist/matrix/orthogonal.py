"""Orthogonalisation by Newton-Schulz iterations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .work import Held, Turn, Work

__all__ = ["NEWTON_SCHULZ", "POLAR_EXPRESS", "Coefficients", "Orthogonalize", "orthogonalized", "polar_express"]

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


def orthogonalized(stacked: torch.Tensor, coefficients: Sequence[Sequence[float]], eps: float) -> torch.Tensor:
    """About the nearest orthogonal matrix of each: ``U V^T`` where ``x = U S V^T``.

    Args:
        stacked: ``[n, rows, columns]``.
        coefficients: of each iteration.
        eps: the least norm that is divided by; a matrix of zeros stays one.

    Returns:
        of the shape and dtype of ``stacked``, in which it computes.
    """
    tall = stacked.shape[-2] > stacked.shape[-1]
    x = stacked.mT if tall else stacked  # so that the Gram matrix is the small one
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


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
        matrices = stacked.flatten(2)
        on_gpu = stacked.device.type == "cuda" and stacked.dtype == torch.float32
        dtype = self.dtype or (torch.bfloat16 if on_gpu else stacked.dtype)
        made = orthogonalized(matrices.to(dtype), self.coefficients, self.eps).to(stacked.dtype)
        return (made * self.factor(matrices.shape[1], matrices.shape[2])).reshape(stacked.shape)

    def factor(self, rows: int, columns: int) -> float:
        """What the result is multiplied by, for a matrix of this shape."""
        if self.scale == "original":
            return math.sqrt(max(1.0, rows / columns))
        return 0.2 * math.sqrt(max(rows, columns)) if self.scale == "match_rms_adamw" else 1.0

    def cost(self, shape: Sequence[int]) -> float:
        """Floating-point operations."""
        rows, columns = shape[0], math.prod(shape[1:])
        small, large = min(rows, columns), max(rows, columns)
        return len(self.coefficients) * (4.0 * small * small * large + 2.0 * small**3)
