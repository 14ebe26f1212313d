"""SOAP's work on whole matrices: Adam in the slowly turning eigenbasis of Shampoo's statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .kronecker import (
    COUNTS,
    Counts,
    Kronecker,
    Mask,
    along,
    average,
    broadcast,
    cut,
    due,
    keep_statistics,
    masked,
    products,
    where,
)
from .roots import orthogonal_basis
from .work import Held, Kept, Turn

__all__ = ["AdamInEigenbasis"]

_BASIS_COST = 4.0
"""Operations of a product and a QR decomposition of d x d matrices, over d^3, as slow as the latter is."""


@dataclass(frozen=True)
class AdamInEigenbasis(Kronecker):
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

    def update(self, gradient: torch.Tensor, held: Held, turn: Turn, counting: Mask) -> torch.Tensor:
        counts = Counts(held[COUNTS])
        based = counts.refreshes > 0  # the first gradient only makes a basis
        moving = masked(based if counting is None else based & counting)
        counts.steps += 1 if moving is None else moving
        update = self._adam(gradient, held, counts, moving)
        for axis in self._axes(gradient.shape[1:]):
            keep_statistics(held[f"factor_{axis}"], gradient, axis, self.factor_beta, counting)
        self.refresh(held, counts, turn, gradient)
        return update if moving is None else where(moving, update, torch.zeros_like(update))

    def _adam(self, gradient: torch.Tensor, held: Held, counts: Counts, moving: Mask) -> torch.Tensor:
        """Both averages are kept in the basis: until that turns, the first is what turning that of gradients gives."""
        beta1, beta2 = self.betas
        turned = self._turned(gradient, held, back=False)
        average(held["exp_avg"], turned, beta1, moving)
        average(held["exp_avg_sq"], turned * turned, beta2, moving)
        steps = counts.steps.double().clamp(min=1)
        step = held["exp_avg_sq"].sqrt()
        step += self.eps
        torch.div(held["exp_avg"], step, out=step)
        step *= broadcast((1 - beta2**steps).sqrt() / (1 - beta1**steps), step)
        return self._turned(step, held, back=True)

    def _turned(
        self, stacked: torch.Tensor, held: Held, back: bool, places: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Into the basis, or back from it."""
        for axis in self._axes(stacked.shape[1:]):
            basis = held[f"basis_{axis}"] if places is None else held[f"basis_{axis}"][places]
            basis = basis.to(stacked.dtype)
            stacked = along(stacked, basis if back else basis.mT, axis)
        return stacked

    def refresh(self, held: Held, counts: Counts, turn: Turn, like: torch.Tensor) -> None:
        """Bases at the first step, and where they are due after it, by one step of orthogonal iteration from the last.

        Steps are counted from the second one, the first that moves parameters.
        """
        later = Turn(turn.step - 1, turn.numbers)
        everything = list(range(len(turn.numbers)))
        places = everything if turn.step == 1 else due(later, self.frequency, self.staggered, start=0)
        fresh = (counts.refreshes[places] == 0).tolist() if places else []
        for first in (True, False):
            some = [place for place, one in zip(places, fresh, strict=True) if one is first]
            if some:
                self._find(held, counts, some, first, like)

    def _find(self, held: Held, counts: Counts, places: list[int], first: bool, like: torch.Tensor) -> None:
        """Find bases of the matrices at some places, and turn their averages. One that fails leaves all as it is."""
        seen = torch.ones(len(places), dtype=torch.bool, device=like.device)
        good, found, squares = seen, {}, held["exp_avg_sq"][places]
        for axis in self._axes(like.shape[1:]):
            factor = held[f"factor_{axis}"][places].to(like.dtype)
            seen = seen & factor.flatten(1).any(1)
            last = None if first else held[f"basis_{axis}"][places].to(like.dtype)
            if last is not None:
                order = (last * (factor @ last)).sum(1).argsort(dim=-1, descending=True, stable=True)
                last = torch.take_along_dim(last, order[:, None, :], 2)
                index = order.view(len(places), *[-1 if i == axis else 1 for i in range(like.dim() - 1)])
                squares = torch.take_along_dim(squares, index.expand_as(squares), axis + 1)
            found[axis], fine = orthogonal_basis(factor, last)
            good = good & fine
        good = good & seen
        gradient_average = self._turned(held["exp_avg"][places], held, back=True, places=places)
        for axis, basis in found.items():
            _replace(held[f"basis_{axis}"], places, basis, good)
        turned = self._turned(gradient_average, held, back=False, places=places)
        _replace(held["exp_avg"], places, turned, good)
        _replace(held["exp_avg_sq"], places, squares, good)
        counts.refreshed(places, good, seen)


def _replace(kept: torch.Tensor, places: Sequence[int], new: torch.Tensor, good: torch.Tensor) -> None:
    """Keep what is good of something new for the matrices at some places."""
    old = kept[places]
    kept[places] = torch.where(broadcast(good, old), new.to(kept.dtype), old)
