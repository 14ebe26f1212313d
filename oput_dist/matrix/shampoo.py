"""Shampoo's work on whole matrices: statistics, inverse roots, and the step grafted onto another's size."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .delayed import WAITING, clear, put_off, taken_up, waiting
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
    masked_at,
    passes,
    products,
    readable,
    side,
    succeeded,
    where,
    with_fresh,
)
from .packing import Symmetric
from .rootmean import Scales, scaled_with_norms
from .roots import Checked, inverse_roots
from .work import Held, Kept, Turn, at

__all__ = ["Precondition"]

_ROOT_COST = 35.0
"""Operations of an eigendecomposition of a d x d matrix, over d^3: it is slower than a product of as many."""


class _Corrections(NamedTuple):
    """What depends on the steps that counted, ``[n]``, or ``[1]`` where they are the same of all; float64."""

    filtered: torch.Tensor
    """What the average of gradients is multiplied by, where there is one."""
    graft: Scales
    """Of the grafted optimizer's division, where it has one."""
    least: torch.Tensor
    """What is added to the norm that is divided by."""
    statistics: torch.Tensor
    """What they are divided by."""


@dataclass(frozen=True)
class Precondition(Kronecker):
    """``u = f x_1 (L_1 + eps I)^(-1/p) x_2 ...`` for each block; see :class:`oput_dist.Shampoo`."""

    betas: tuple[float, float]
    beta3: float
    eps: float
    frequency: int
    start: int
    delay: int
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

    def recurring(self, shape: Sequence[int]) -> tuple[int, tuple[float, ...]]:
        return (self.frequency, tuple(float(d**3) for d in shape)) if self.staggered else (1, ())

    def load(self, shape: Sequence[int], turn: Turn) -> float:
        now = self._due(turn, len(shape))
        roots = 0.0 if self.delay else sum(len(places) * float(d) ** 3 for d, places in zip(shape, now, strict=True))
        return (2 * products(shape) + passes(shape)) * len(turn.phases) + _ROOT_COST * roots

    def kept(self, shape: Sequence[int], dtype: torch.dtype) -> dict[str, Kept]:
        shape = tuple(shape)
        sides = [side(d, dtype, self.factor_dtype, Symmetric()) for d in shape]
        found = {f"{name}_{i}": one for name in ("factor", "root") for i, one in enumerate(sides)}
        if self.delay:
            found |= {f"{WAITING}_{i}": Kept((d, d), dtype, optional=True) for i, d in enumerate(shape)}
        if self.betas[0]:
            found["exp_avg"] = Kept(shape, dtype)
        if self.graft not in (None, "sgd"):
            found["graft_sq"] = Kept(shape, dtype)
        return {**found, COUNTS: Counts.kept()}

    def update(self, gradient: torch.Tensor, held: Held, turn: Turn, counting: Mask) -> torch.Tensor:
        counts = Counts(held[COUNTS])
        counts.steps += 1 if counting is None else counting
        for axis in range(gradient.dim() - 1):
            keep_statistics(held, gradient, axis, self.betas[1], counting)
        self.refresh(held, counts, turn, gradient)
        self._step(gradient, held, self._corrections(counts, counting), counting, masked(counts.refreshes > 0))
        return gradient

    def _corrections(self, counts: Counts, counting: Mask) -> _Corrections:
        if readable(counts.steps):
            steps = counts.steps.tolist()
            return _known_corrections(self, tuple(steps if len(set(steps)) > 1 else steps[:1]))
        return self.corrections(counts.steps.double(), counting)

    def corrections(self, steps: torch.Tensor, counting: Mask = None) -> _Corrections:
        """After so many steps of each matrix."""
        beta1, beta3 = self.betas[0], self.beta3 if self.betas[0] else 0.0
        filtered = 1 / (1 - beta3 * beta1 ** (steps - 1).clamp(min=0))
        squares = _correction(self.graft_beta if self.graft == "adam" else 1.0, steps).sqrt()
        decay = 1.0 if self.graft == "adagrad" else self.graft_beta
        graft = Scales(decay, self.graft_eps * squares, filtered * squares, counting)
        return _Corrections(filtered, graft, 1e-16 / filtered, _correction(self.betas[1], steps))

    def _step(self, gradient: torch.Tensor, held: Held, made: _Corrections, counting: Mask, ready: Mask) -> None:
        """Replace gradients by updates, which are those of the grafted optimizer where there are no roots yet."""
        filtered = self._filtered(gradient, held, counting)
        direction, wanted = self._graft(gradient, filtered, held, made)
        if ready is not None and direction is filtered:
            direction = filtered * broadcast(made.filtered, filtered)
        scratch = torch.empty_like(gradient) if ready is not None or direction is filtered else direction
        update = self._preconditioned(filtered, held, gradient, scratch)
        factor = made.filtered if wanted is None else wanted / (_norm(update) + made.least)
        update *= broadcast(factor, update)
        if ready is not None:
            update = where(ready, update, direction)
        if update.data_ptr() != gradient.data_ptr():
            gradient.copy_(update)

    def _preconditioned(
        self, filtered: torch.Tensor, held: Held, gradient: torch.Tensor, scratch: torch.Tensor
    ) -> torch.Tensor:
        """Every axis multiplied by its root, in the memory of two tensors that have served."""
        update = filtered
        for axis in range(filtered.dim() - 1):
            place = gradient if axis % 2 else scratch  # not where the last product is
            update = along(update, held.numbers(f"root_{axis}", filtered.dtype), axis, place)
        return update

    def _filtered(self, gradient: torch.Tensor, held: Held, counting: Mask) -> torch.Tensor:
        """The moving average that is preconditioned, biased."""
        beta1, beta3 = self.betas[0], self.beta3
        if not beta1:
            return gradient
        other = None if beta3 == beta1 else beta3 * held["exp_avg"] + (1 - beta3) * gradient
        average(held["exp_avg"], gradient, beta1, counting)
        return held["exp_avg"] if other is None else other

    def _graft(
        self, gradient: torch.Tensor, filtered: torch.Tensor, held: Held, made: _Corrections
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The step of the optimizer whose size the update gets, over its learning rate, and that size.

        Where that step is nothing but the average, it is the biased one.
        """
        if self.graft is None:
            return filtered, None
        if self.graft == "sgd":
            return filtered, made.filtered * _norm(filtered)
        return scaled_with_norms(filtered, gradient, held["graft_sq"], made.graft, torch.empty_like(gradient))

    def refresh(self, held: Held, counts: Counts, turn: Turn, like: torch.Tensor) -> None:
        """Find roots anew where they are due, the first at once. What was put off is taken up before."""
        order, find = like.dim() - 1, functools.partial(self._roots, like.dim() - 1)
        if self.delay and turn.step > self.delay:
            before = turn.step - self.delay
            now = self._due(Turn(before, turn.phases), order)
            if axes := waiting(held, dict(enumerate(now))):
                self._take(held, counts, axes, taken_up(held, before, axes, find))
                clear(held, axes)
        later, fresh, every = with_fresh(self._due(turn, order), counts)
        if not every:
            return
        due_now = {axis: sorted([*(() if self.delay else places), *fresh]) for axis, places in enumerate(later)}
        if axes := {axis: places for axis, places in due_now.items() if places}:
            self._take(held, counts, axes, find(self._statistics(held, counts, axes, like)))
        if self.delay and (axes := {axis: places for axis, places in enumerate(later) if places}):
            given = self._statistics(held, counts, axes, like)
            put_off(held, turn.step, axes, given, functools.partial(find, given))

    def _due(self, turn: Turn, order: int) -> list[list[int]]:
        return due(turn, self.frequency, self.staggered, self.start, order)

    def _statistics(
        self, held: Held, counts: Counts, axes: Mapping[int, list[int]], like: torch.Tensor
    ) -> list[torch.Tensor]:
        """Of each axis those at some places, unbiased."""
        correction = self._corrections(counts, None).statistics
        found = []
        for axis, places in axes.items():
            factor = held.numbers(f"factor_{axis}", like.dtype, places)
            found.append(factor / broadcast(correction if len(correction) == 1 else at(correction, places), factor))
        return found

    def _roots(self, order: int, factors: Sequence[torch.Tensor]) -> Checked:
        return inverse_roots(factors, self._root(order), self.eps, self.root_method)

    def _take(self, held: Held, counts: Counts, axes: Mapping[int, list[int]], found: Checked) -> None:
        """Take roots over. One that failed on any axis leaves the matrix with those that it has."""
        tried = masked(counts.steps > 0)
        good = succeeded(tried, axes, [fine for _, fine in found], counts.steps)
        for (axis, places), (roots, _) in zip(axes.items(), found, strict=True):
            held.replace(f"root_{axis}", roots, places, masked_at(good, places))
        counts.refreshed(axes, good, tried)

    def _root(self, order: int) -> float:
        """``p`` of the exponent ``-1/p``."""
        return 2.0 * order if self.exponents is None else 1.0 / self.exponents[min(order, len(self.exponents)) - 1]


def _norm(stacked: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.vector_norm(stacked.flatten(1), dim=1).double()
    return found


@functools.lru_cache(64)
def _known_corrections(work: Precondition, steps: tuple[float, ...]) -> _Corrections:
    """Matrices have counted the same steps, most of them, and to make these takes as long as a pass over one."""
    return work.corrections(torch.tensor(steps, dtype=torch.float64, device="cpu"))


def _correction(beta: float, steps: torch.Tensor) -> torch.Tensor:
    """What a moving average of so many values is divided by; 1 for sums, and before the first value."""
    return torch.ones_like(steps) if beta == 1 else torch.where(steps > 0, 1 - beta**steps, 1.0)
