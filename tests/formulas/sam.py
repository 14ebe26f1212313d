"""The SAM family in plain PyTorch, on lists of tensors: written from OPTIMIZERS.md 4.2 and the papers.

Each takes ``grads_at(params) -> gradients`` and returns the gradients that the base optimizer gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

GradsAt = Callable[[list[Tensor]], list[Tensor]]


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)]).sum()


def norm(xs: Sequence[Tensor]) -> Tensor:
    return dot(xs, xs).sqrt()


def climbed(
    params: list[Tensor], grads: list[Tensor], rho: float, adaptive: bool = False, eta: float = 0.0
) -> list[Tensor]:
    """The weights at ``w + e``."""
    sizes = [p.abs() + eta if adaptive else torch.ones_like(p) for p in params]
    length = norm([t * g for t, g in zip(sizes, grads, strict=True)]) + 1e-12
    return [p + rho * t**2 * g / length for p, t, g in zip(params, sizes, grads, strict=True)]


def sam(params: list[Tensor], grads_at: GradsAt, **settings: Any) -> list[Tensor]:
    return grads_at(climbed(params, grads_at(params), **settings))


def gsam(params: list[Tensor], grads_at: GradsAt, alpha: float, **settings: Any) -> list[Tensor]:
    g0 = grads_at(params)
    g1 = grads_at(climbed(params, g0, **settings))
    share = dot(g0, g1) / dot(g1, g1)
    return [b - alpha * (a - share * b) for a, b in zip(g0, g1, strict=True)]


class LookSam:
    """Algorithm 1 of 2203.02714, with the angle between both gradients as the paper has it."""

    def __init__(self, k: int, alpha: float, **settings: Any) -> None:
        self.k, self.alpha, self.settings, self.t = k, alpha, settings, 0
        self.gv: list[Tensor] = []

    def __call__(self, params: list[Tensor], grads_at: GradsAt) -> list[Tensor]:
        g = grads_at(params)
        self.t += 1
        if (self.t - 1) % self.k == 0:
            gs = grads_at(climbed(params, g, **self.settings))
            cosine = dot(g, gs) / (norm(g) * norm(gs))
            self.gv = [s - norm(gs) * cosine * a / norm(g) for s, a in zip(gs, g, strict=True)]
            return gs
        return [a + self.alpha * norm(g) / norm(self.gv) * v for a, v in zip(g, self.gv, strict=True)]


def esam(
    params: list[Tensor],
    losses_at: Callable[[list[Tensor]], Tensor],
    chosen: Sequence[bool],
    beta: float,
    gamma: float,
    rho: float,
) -> tuple[list[Tensor], list[int]]:
    """Algorithm 1 of 2110.03141 for a given choice of tensors; also the samples of the second pass."""
    params = [p.detach().requires_grad_() for p in params]
    before = losses_at(params)
    g = torch.autograd.grad(before.mean(), params)
    full = climbed(params, list(g), rho)
    up = [
        (p + (q - p) / beta * float(m)).detach().requires_grad_() for p, q, m in zip(params, full, chosen, strict=True)
    ]
    after = losses_at(up)
    rise = (after - before).tolist()
    samples = sorted(sorted(range(len(rise)), key=lambda i: -rise[i])[: max(1, int(gamma * len(rise)))])
    return list(torch.autograd.grad(after[samples].mean(), up)), samples
