"""Shampoo's work on whole matrices: statistics, inverse roots, and the step grafted onto another's size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .kronecker import COUNTS, Counts, along, broadcast, cut, due, present, products, statistics, weighted
from .roots import inverse_root
from .work import Held, Kept, Turn, Work

__all__ = ["GRAFTS", "Precondition"]

GRAFTS = ("sgd", "adagrad", "rmsprop", "adam")
_ROOT_COST = 25.0
"""Operations of an eigendecomposition of a d x d matrix, over d^3: it is slower than a product of as many."""


@dataclass(frozen=True)
class Precondition(Work):
    """``u = f x_1 (L_1 + eps I)^(-1/p) x_2 ...`` for each block; see :class:`oput_dist.Shampoo`."""

    betas: tuple[float, float]
    beta3: float
    eps: float
    frequency: int
    start: int
    staggered: bool
    block_size: int | None
    exponents: tuple[float, ...] | None
    root_method: str
    graft: str | None
    graft_beta: float
    graft_eps: float
    factor_dtype: torch.dtype | None

    def blocks(self, shape: Sequence[int]) -> list[tuple[slice, ...]]:
        return cut(shape, self.block_size)

    def cost(self, shape: Sequence[int]) -> float:
        return 2 * products(shape) + _ROOT_COST * sum(d**3 for d in shape) / self.frequency

    def kept(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Kept]:
        shape, stored = tuple(shape), self.factor_dtype or dtype
        found = {f"{name}_{i}": Kept((d, d), stored) for name in ("factor", "root") for i, d in enumerate(shape)}
        if self.betas[0]:
            found["exp_avg"] = Kept(shape, dtype)
        if self.graft not in (None, "sgd"):
            found["graft_sq"] = Kept(shape, dtype)
        return {**found, COUNTS: Counts.kept()}

    def __call__(self, stacked: torch.Tensor, held: Held, turn: Turn) -> torch.Tensor:
        gradient, counting = present(stacked)
        counts = Counts.get(held)
        counts = counts._replace(steps=counts.steps + counting)
        for axis in range(gradient.dim() - 1):
            old = held.get(f"factor_{axis}", gradient.dtype)
            held.put(f"factor_{axis}", statistics(old, gradient, axis, self.betas[1], counting))
        filtered = self._filtered(gradient, held, counts, counting)
        direction = self._graft(gradient, filtered, held, counts, counting)
        counts = self._refresh(held, counts, turn, gradient.dtype)
        counts.put(held)
        return self._step(filtered, direction, held, counts, counting)

    def _filtered(self, gradient: torch.Tensor, held: Held, counts: Counts, counting: torch.Tensor) -> torch.Tensor:
        """The moving average that is preconditioned, and bias-corrected."""
        beta1, beta3 = self.betas[0], self.beta3
        if not beta1:
            return gradient
        old = held.get("exp_avg")
        correction = (1 - beta3 * beta1 ** (counts.steps - 1).clamp(min=0)).to(gradient.dtype)
        filtered = (beta3 * old + (1 - beta3) * gradient) / broadcast(correction, gradient)
        held.put("exp_avg", weighted(old, gradient, beta1, counting))
        return filtered

    def _graft(
        self, gradient: torch.Tensor, filtered: torch.Tensor, held: Held, counts: Counts, counting: torch.Tensor
    ) -> torch.Tensor:
        """The step of the optimizer whose size the update gets, over its learning rate."""
        if self.graft in (None, "sgd"):
            return filtered
        beta = 1.0 if self.graft == "adagrad" else self.graft_beta
        squares = weighted(held.get("graft_sq"), gradient * gradient, beta, counting)
        held.put("graft_sq", squares)
        if self.graft == "adam":
            squares = squares / broadcast(_correction(beta, counts, gradient.dtype), gradient)
        return filtered / (squares.sqrt() + self.graft_eps)

    def _refresh(self, held: Held, counts: Counts, turn: Turn, dtype: torch.dtype) -> Counts:
        """Find roots anew where they are due. One that fails on any axis leaves the matrix with those that it has."""
        places = due(turn, self.frequency, self.staggered, self.start)
        if not places:
            return counts
        axes = [name for name in held.names if name.startswith("factor_")]
        correction = _correction(self.betas[1], counts, dtype)[places, None, None]
        found = []
        good = counts.steps[places] > 0
        for axis, name in enumerate(axes):
            factor = held.get(name, dtype)[places] / correction
            roots, fine = inverse_root(factor, self._root(len(axes), axis), self.eps, self.root_method)
            found.append(roots)
            good = good & fine
        for axis, roots in enumerate(found):
            every = held.get(f"root_{axis}", dtype).clone()
            every[places] = torch.where(good[:, None, None], roots, every[places])
            held.put(f"root_{axis}", every)
        failed = ~good & (counts.steps[places] > 0)
        refreshes, failures = counts.refreshes.clone(), counts.failures.clone()
        refreshes[places] += good
        failures[places] += failed
        return counts._replace(refreshes=refreshes, failures=failures)

    def _root(self, order: int, axis: int) -> float:
        """``p`` of the exponent ``-1/p``."""
        return 2.0 * order if self.exponents is None else 1.0 / self.exponents[min(order, len(self.exponents)) - 1]

    def _step(
        self, filtered: torch.Tensor, direction: torch.Tensor, held: Held, counts: Counts, counting: torch.Tensor
    ) -> torch.Tensor:
        update = filtered
        for axis in range(filtered.dim() - 1):
            update = along(update, held.get(f"root_{axis}", filtered.dtype), axis)
        if self.graft is not None:
            update = update * broadcast(_norm(direction) / (_norm(update) + 1e-16), update)
        update = torch.where(broadcast(counts.refreshes > 0, update), update, direction)
        return torch.where(broadcast(counting, update), update, torch.zeros_like(update))


def _norm(stacked: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(stacked.flatten(1), dim=1)
    return found


def _correction(beta: float, counts: Counts, dtype: torch.dtype) -> torch.Tensor:
    """What a moving average of so many values is divided by; 1 for sums, and before the first value."""
    if beta == 1:
        return torch.ones_like(counts.steps, dtype=dtype)
    return torch.where(counts.steps > 0, 1 - beta**counts.steps, 1.0).to(dtype)
