"""SOAP's work on whole matrices: Adam in the slowly turning eigenbasis of Shampoo's statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .delayed import WAITING, Axes, clear, put_off, taken_up, waiting
from .kronecker import (
    COUNTS,
    Counts,
    Kronecker,
    Mask,
    along,
    average,
    cut,
    due,
    keep_statistics,
    masked,
    masked_at,
    passes,
    products,
    side,
    succeeded,
    where,
    with_fresh,
)
from .packing import Columns, Symmetric
from .rootmean import Scales, scaled
from .roots import eigenvectors, orthonormal
from .work import Held, Kept, Turn, at

__all__ = ["AdamInEigenbasis"]

_Found = list[tuple[torch.Tensor, tuple[torch.Tensor, Mask]]]
"""Of some axes the order of the last basis, ``[n, d]``, the next one, and which matrices succeeded."""
_BASIS_COST = 7.0
"""Operations of a product and a QR decomposition of d x d matrices and of turning an average, over d^3, as slow as the
decomposition is: 55 ms for 1,024 where :data:`products` of 256 x 1,024 along both axes, four times, take 24."""


@dataclass(frozen=True)
class AdamInEigenbasis(Kronecker):
    """Adam's step for each block in the basis of its statistics; see :class:`oput_dist.SOAP` for what things mean."""

    betas: tuple[float, float]
    factor_beta: float
    eps: float
    frequency: int
    delay: int
    staggered: bool
    largest: int
    block_size: int | None
    factor_dtype: torch.dtype | None

    def blocks(self, shape: Sequence[int]) -> list[tuple[slice, ...]]:
        return cut(shape, self.block_size)

    def cost(self, shape: Sequence[int]) -> float:
        turned = [d for d in shape if d <= self.largest]
        return 4 * products(shape) + _BASIS_COST * sum(d**3 for d in turned) / self.frequency

    def recurring(self, shape: Sequence[int]) -> tuple[int, tuple[float, ...]]:
        costs = tuple(float(shape[axis] ** 3) for axis in self._axes(shape)) or (0.0,)
        return (self.frequency, costs) if self.staggered else (1, ())

    def load(self, shape: Sequence[int], turn: Turn) -> float:
        axes = self._axes(shape)
        now = self._due(turn, len(axes))
        turning = (
            0.0
            if self.delay
            else sum(len(places) * float(shape[axis]) ** 3 for axis, places in zip(axes, now, strict=False))
        )
        return (4 * products(shape) + passes(shape)) * len(turn.phases) + _BASIS_COST * turning

    def _due(self, turn: Turn, axes: int) -> list[list[int]]:
        """Of each axis the places whose basis is due. Steps are counted from the second, the first that moves."""
        recurring = max(1, axes)  # without axes a matrix only begins
        if turn.step == 1:
            return [list(range(len(turn.phases)))] * recurring
        return due(Turn(turn.step - 1, turn.phases), self.frequency, self.staggered, 0, recurring)

    def kept(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Kept]:
        shape, axes = tuple(shape), self._axes(shape)
        factors = {f"factor_{i}": side(shape[i], dtype, self.factor_dtype, Symmetric()) for i in axes}
        factors |= {f"basis_{i}": side(shape[i], dtype, self.factor_dtype, Columns()) for i in axes}
        if self.delay:
            factors |= {f"{WAITING}_{i}": Kept((shape[i],) * 2, dtype, optional=True) for i in axes}
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
        for axis in self._axes(gradient.shape[1:]):
            keep_statistics(held, gradient, axis, self.factor_beta, counting)
        update = self._adam(gradient, held, counts, moving)
        gradient.copy_(update if moving is None else where(moving, update, torch.zeros_like(update)))
        self.refresh(held, counts, turn, gradient)
        return gradient

    def _adam(self, gradient: torch.Tensor, held: Held, counts: Counts, moving: Mask) -> torch.Tensor:
        """Both averages are kept in the basis: until that turns, the first is what turning that of gradients gives."""
        beta1, beta2 = self.betas
        turned = self._turned(gradient, held, back=False)
        average(held["exp_avg"], turned, beta1, moving)
        steps = counts.steps.double().clamp(min=1)
        size = (1 - beta2**steps).sqrt() / (1 - beta1**steps)
        h = Scales(beta2, torch.full_like(size, self.eps), size, moving)
        step = scaled(held["exp_avg"], turned, held["exp_avg_sq"], h, torch.empty_like(gradient))
        return self._turned(step, held, back=True)

    def _turned(self, stacked: torch.Tensor, held: Held, back: bool) -> torch.Tensor:
        """Into the basis, or back from it."""
        for axis in self._axes(stacked.shape[1:]):
            basis = held.numbers(f"basis_{axis}", stacked.dtype)
            stacked = along(stacked, basis if back else basis.mT, axis)
        return stacked

    def refresh(self, held: Held, counts: Counts, turn: Turn, like: torch.Tensor) -> None:
        """Bases at the first step, then those that are due, by one step of orthogonal iteration from the last."""
        own = self._axes(like.shape[1:])
        if self.delay and turn.step > self.delay + 1:
            before = Turn(turn.step - self.delay, turn.phases)
            if axes := waiting(held, dict(zip(own, self._due(before, len(own)), strict=False))):
                self._turn(held, counts, axes, taken_up(held, before.step, axes, self._finding(held, axes, like)), like)
                clear(held, axes)
        places, fresh, _ = with_fresh(self._due(turn, len(own)), counts)
        if fresh:
            self._first(held, counts, fresh, like)
        axes = {axis: some for axis, some in zip(own, places, strict=False) if some}
        if not axes:
            return
        find = self._finding(held, axes, like)
        factors = [held.numbers(f"factor_{axis}", like.dtype, some) for axis, some in axes.items()]
        if self.delay:
            factors = [factor.clone() for factor in factors]  # what is kept goes on
            put_off(held, turn.step, axes, factors, functools.partial(find, factors))
        else:
            self._turn(held, counts, axes, find(factors), like)

    def _finding(self, held: Held, axes: Axes, like: torch.Tensor) -> Callable[[Sequence[torch.Tensor]], _Found]:
        """What finds the next bases from statistics: the last ones do not change before those are taken over."""
        return functools.partial(
            _next, [held.numbers(f"basis_{axis}", like.dtype, some) for axis, some in axes.items()]
        )

    def _first(self, held: Held, counts: Counts, places: list[int], like: torch.Tensor) -> None:
        """Find the first bases along all axes. The averages of these matrices are zeros."""
        axes = self._axes(like.shape[1:])
        factors = [held.numbers(f"factor_{axis}", like.dtype, places) for axis in axes]
        seen = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        seen[places] = True
        for factor in factors:
            seen[places] &= factor.diagonal(dim1=1, dim2=2).any(1)
        found = eigenvectors(factors) if factors else []
        fresh = dict.fromkeys(axes, places)
        good = succeeded(masked(seen), fresh, [fine for _, fine in found], counts.steps)
        for axis, (basis, _) in zip(axes, found, strict=True):
            held.replace(f"basis_{axis}", basis, places, masked_at(good, places))
        counts.refreshed(fresh or {0: places}, good, seen)

    def _turn(self, held: Held, counts: Counts, axes: Axes, found: _Found, like: torch.Tensor) -> None:
        """Turn bases along some axes, each at some places, with the averages. One that fails leaves all as it is."""
        good = succeeded(None, axes, [fine for _, (_, fine) in found], counts.steps)
        for (axis, places), (order, (basis, _)) in zip(axes.items(), found, strict=True):
            last, which = held.numbers(f"basis_{axis}", like.dtype, places), masked_at(good, places)
            turned = along(along(at(held["exp_avg"], places), last, axis), basis.mT, axis)
            held.replace("exp_avg", turned, places, which)
            held.replace("exp_avg_sq", _ordered(at(held["exp_avg_sq"], places), order, axis), places, which)
            held.replace(f"basis_{axis}", basis, places, which)
        counts.refreshed(axes, good, None)


def _next(bases: Sequence[torch.Tensor], factors: Sequence[torch.Tensor]) -> _Found:
    """One step of orthogonal iteration from each basis, in the order of its eigenvalues."""
    orders, given = [], []
    for basis, factor in zip(bases, factors, strict=True):
        last = _columns(basis)
        product = torch.bmm(last, factor)  # which is symmetric: also columns
        orders.append((last * product).sum(2).argsort(dim=-1, descending=True, stable=True))
        given.append(_ordered(product, orders[-1], 0).mT)
    return list(zip(orders, orthonormal(given), strict=True))


def _columns(stacked: torch.Tensor) -> torch.Tensor:
    """The columns of each matrix as rows, which lie together in memory. (One by one: a stack's copy is slow.)"""
    return torch.stack([one.T.contiguous() for one in stacked]) if len(stacked) > 1 else stacked[0].T.contiguous()[None]


def _ordered(stacked: torch.Tensor, order: torch.Tensor, axis: int) -> torch.Tensor:
    """Each of ``[n, *shape]`` with an axis in an order of its own, ``[n, shape[axis]]``."""
    if len(stacked) == 1:
        return stacked.index_select(axis + 1, order[0])
    return torch.stack([one.index_select(axis, which) for one, which in zip(stacked, order, strict=True)])
