"""SOAP's work on whole matrices: Adam in the slowly turning eigenbasis of Shampoo's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .kronecker import COUNTS, Counts, along, broadcast, cut, due, present, products, statistics, weighted
from .roots import orthogonal_basis
from .work import Held, Kept, Turn, Work

__all__ = ["AdamInEigenbasis"]

_BASIS_COST = 4.0
"""Operations of a product and a QR decomposition of d x d matrices, over d^3, as slow as the latter is."""


@dataclass(frozen=True)
class AdamInEigenbasis(Work):
    """Adam's step for each block in the basis of its statistics; see :class:`oput_dist.SOAP` for what things mean."""

    betas: tuple[float, float]
    factor_beta: float
    eps: float
    frequency: int
    staggered: bool
    largest: int
    block_size: int | None
    factor_dtype: torch.dtype | None

    def blocks(self, shape: Sequence[int]) -> list[tuple[slice, ...]]:
        return cut(shape, self.block_size)

    def cost(self, shape: Sequence[int]) -> float:
        turned = [d for d in shape if d <= self.largest]
        return 4 * products(shape) + _BASIS_COST * sum(d**3 for d in turned) / self.frequency

    def kept(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Kept]:
        shape, stored = tuple(shape), self.factor_dtype or dtype
        axes = self._axes(shape)
        factors = {f"{name}_{i}": Kept((shape[i],) * 2, stored) for name in ("factor", "basis") for i in axes}
        return {
            **factors,
            "exp_avg": Kept(shape, dtype),
            "exp_avg_sq": Kept(shape, dtype),
            COUNTS: Counts.kept(),
        }

    def _axes(self, shape: Sequence[int]) -> list[int]:
        """The axes that have a basis of their own; along others that of the parameter stays."""
        return [axis for axis, size in enumerate(shape) if size <= self.largest]

    def __call__(self, stacked: torch.Tensor, held: Held, turn: Turn) -> torch.Tensor:
        gradient, counting = present(stacked)
        counts = Counts.get(held)
        moving = counting & (counts.refreshes > 0)  # the first gradient only makes a basis
        counts = counts._replace(steps=counts.steps + moving)
        update = self._adam(gradient, held, counts, moving)
        for axis in self._axes(gradient.shape[1:]):
            old = held.get(f"factor_{axis}", gradient.dtype)
            held.put(f"factor_{axis}", statistics(old, gradient, axis, self.factor_beta, counting))
        self._refresh(held, counts, turn, gradient).put(held)
        return torch.where(broadcast(moving, update), update, torch.zeros_like(update))

    def _adam(self, gradient: torch.Tensor, held: Held, counts: Counts, moving: torch.Tensor) -> torch.Tensor:
        beta1, beta2 = self.betas
        average = weighted(held.get("exp_avg"), gradient, beta1, moving)
        turned = self._turned(gradient, held, back=False)
        squares = weighted(held.get("exp_avg_sq"), turned * turned, beta2, moving)
        held.put("exp_avg", average)
        held.put("exp_avg_sq", squares)
        steps = counts.steps.clamp(min=1)
        factor = ((1 - beta2**steps).sqrt() / (1 - beta1**steps)).to(gradient.dtype)
        step = self._turned(average, held, back=False) / (squares.sqrt() + self.eps)
        return self._turned(step, held, back=True) * broadcast(factor, gradient)

    def _turned(self, stacked: torch.Tensor, held: Held, back: bool) -> torch.Tensor:
        """Into the basis, or back from it."""
        for axis in self._axes(stacked.shape[1:]):
            basis = held.get(f"basis_{axis}", stacked.dtype)
            stacked = along(stacked, basis if back else basis.mT, axis)
        return stacked

    def _refresh(self, held: Held, counts: Counts, turn: Turn, gradient: torch.Tensor) -> Counts:
        """Bases at the first step, and where they are due after it, by one step of orthogonal iteration from the last.

        Steps are counted from the second one, the first that moves parameters.
        """
        later = Turn(turn.step - 1, turn.numbers)
        places = (
            list(range(len(turn.numbers))) if turn.step == 1 else due(later, self.frequency, self.staggered, start=0)
        )
        if not places:
            return counts
        fresh = (counts.refreshes[places] == 0).tolist()
        for first in (True, False):
            some = [place for place, one in zip(places, fresh, strict=True) if one is first]
            if some:
                counts = self._find(held, counts, some, first, gradient)
        return counts

    def _find(self, held: Held, counts: Counts, places: list[int], first: bool, gradient: torch.Tensor) -> Counts:
        seen = torch.zeros(len(places), dtype=torch.bool, device=gradient.device)
        good, found, squares = ~seen, {}, held.get("exp_avg_sq").clone()
        part = squares[places]
        for axis in self._axes(gradient.shape[1:]):
            factor = held.get(f"factor_{axis}", gradient.dtype)[places]
            seen |= factor.flatten(1).any(1)
            last = None if first else held.get(f"basis_{axis}", gradient.dtype)[places]
            if last is not None:
                order = (last * (factor @ last)).sum(1).argsort(dim=-1, descending=True, stable=True)
                last = torch.take_along_dim(last, order[:, None, :], 2)
                shape = [1] * part.dim()
                shape[0], shape[axis + 1] = order.shape
                part = torch.take_along_dim(part, order.view(shape).expand_as(part), axis + 1)
            found[axis], fine = orthogonal_basis(factor, last)
            good &= fine
        good &= seen if found else good
        squares[places] = torch.where(broadcast(good, part), part, squares[places])
        held.put("exp_avg_sq", squares)
        for axis, basis in found.items():
            every = held.get(f"basis_{axis}", gradient.dtype).clone()
            every[places] = torch.where(good[:, None, None], basis, every[places])
            held.put(f"basis_{axis}", every)
        refreshes, failures = counts.refreshes.clone(), counts.failures.clone()
        refreshes[places] += good
        failures[places] += ~good & seen
        return counts._replace(refreshes=refreshes, failures=failures)
