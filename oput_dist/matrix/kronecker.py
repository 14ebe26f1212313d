"""What optimizers with one matrix for each axis share: statistics, products along axes, blocks, counts."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from math import prod

import torch

from .packing import Packing
from .products import add_symmetric
from .work import Held, Kept, Turn, Work, at

__all__ = [
    "COUNTS",
    "Counts",
    "Kronecker",
    "Mask",
    "add_to",
    "along",
    "average",
    "broadcast",
    "cut",
    "due",
    "keep_statistics",
    "masked",
    "masked_at",
    "passes",
    "products",
    "readable",
    "side",
    "succeeded",
    "where",
    "with_fresh",
]

_PASSES = 1000.0
"""Operations for each element: of a block of 256 x 256 on one core passes take 0.5 ms, four products 0.9."""
READABLE = {"cpu"}
"""Devices whose values are looked at in a step. No step waits for a GPU: there everything is worked on, under masks."""
COUNTS = "matrix_counts"
"""Where the owner of a matrix keeps its :class:`Counts`."""


class Counts:
    """Three numbers of each matrix, as views of what is kept, fp32 on its device, so that no step waits for one.

    Args:
        kept: ``[n, 3]``, changed in place.

    Attributes:
        steps: gradients that counted.
        refreshes: roots or bases that were found.
        failures: of those that were not, so that the last one stayed.
    """

    def __init__(self, kept: torch.Tensor) -> None:
        self.steps, self.refreshes, self.failures = kept.unbind(-1)

    @staticmethod
    def kept() -> Kept:
        """As state."""
        return Kept((3,), torch.float32)

    def refreshed(self, axes: Mapping[int, Sequence[int]], good: Mask, tried: Mask) -> None:
        """Count what was tried at some places of the stack, along some axes, and what of it is good."""
        every = {place for places in axes.values() for place in places}
        ones = [float(place in every) for place in range(len(self.refreshes))]
        counted = torch.tensor(ones, device=self.refreshes.device)
        self.refreshes += counted if good is None else counted * good
        if good is not None:
            self.failures += counted * (~good if tried is None else tried & ~good)


def succeeded(tried: Mask, axes: Mapping[int, Sequence[int]], fines: Sequence[Mask], like: torch.Tensor) -> Mask:
    """Of what was tried that which did not fail along any axis.

    Args:
        tried: of all matrices of the stack.
        axes: those along which something was found, each with the places at which it was.
        fines: for each axis which of these succeeded.
        like: ``[n]``, on the device.
    """
    if all(fine is None for fine in fines):
        return tried
    good = torch.ones_like(like, dtype=torch.bool) if tried is None else tried.clone()
    for places, fine in zip(axes.values(), fines, strict=True):
        if fine is not None:
            good[list(places)] &= fine
    return good


class Kronecker(Work):
    """Work with one matrix for each axis, on gradients that count.

    A matrix of zeros is a missing gradient, as ranks cannot tell the two apart, and one that is not finite would spoil
    statistics for good: they take no part, keep what they have, and their result is zeros.
    """

    @abstractmethod
    def update(self, gradient: torch.Tensor, held: Held, turn: Turn, counting: Mask) -> torch.Tensor:
        """As ``__call__``, for gradients that count: all, or those of a mask, while the others are zeros.

        The result is written where the gradient was.
        """

    @abstractmethod
    def refresh(self, held: Held, counts: Counts, turn: Turn, like: torch.Tensor) -> None:
        """Find anew what is due, of matrices of the shape and dtype of ``like``, also of those that do not count."""

    def __call__(self, stacked: torch.Tensor, held: Held, turn: Turn) -> torch.Tensor:
        if _all_gradients(stacked):
            return self.update(stacked, held, turn, None)
        largest = stacked.flatten(1).abs().amax(1)  # NaN, if any element is
        counts = (largest > 0) & torch.isfinite(largest)
        if (counting := masked(counts)) is None:
            return self.update(stacked, held, turn, None)
        zeros = torch.zeros_like(stacked)
        if not readable(stacked):
            given = torch.where(broadcast(counts, stacked), stacked, zeros)
            return torch.where(broadcast(counts, stacked), self.update(given, held, turn, counting), zeros)
        for counting_ones in (True, False):
            places = (counts == counting_ones).nonzero().flatten().tolist()
            if places:
                some, like = held.only(places), stacked[places]
                own = Turn(turn.step, tuple(turn.phases[place] for place in places))
                if counting_ones:
                    zeros[places] = self.update(like, some, own, None)
                else:
                    self.refresh(some, Counts(some[COUNTS]), own, like)
                some.finish()
        return zeros


def _all_gradients(stacked: torch.Tensor) -> bool:
    """Whether it is known, after one pass, that no matrix is zero everywhere, nor infinite or NaN anywhere.

    The squares of some are too large or too small for it, and nothing is looked at on GPUs.
    """
    if not readable(stacked):
        return False
    return all(0 < norm < math.inf for norm in torch.linalg.vector_norm(stacked.flatten(1), dim=1).tolist())


Mask = torch.Tensor | None
"""``[n]`` bool; None where all are true."""


def readable(tensor: torch.Tensor) -> bool:
    """Whether values may be looked at."""
    return tensor.device.type in READABLE


def masked(which: torch.Tensor) -> Mask:
    """None if all are true; on GPUs, where that is not looked at, the mask."""
    return None if readable(which) and all(which.tolist()) else which


def masked_at(which: Mask, places: Sequence[int]) -> Mask:
    """That of some places of the stack, in rising order."""
    return None if which is None else masked(at(which, places))


def broadcast(each: torch.Tensor, stacked: torch.Tensor) -> torch.Tensor:
    """``[n]`` in as many axes as ``stacked`` has, and in its dtype if it is no mask."""
    each = each if each.dtype == torch.bool else each.to(stacked.dtype)
    return each.view(-1, *[1] * (stacked.dim() - 1))


def where(which: Mask, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The new values of some matrices, the old ones of the others."""
    return new if which is None else torch.where(broadcast(which, new), new, old)


def average(old: torch.Tensor, new: torch.Tensor, decay: float, counting: Mask) -> None:
    """Make ``old`` be ``decay old + (1 - decay) new`` where a matrix counts. ``new`` must be finite."""
    old.lerp_(new, 1.0 - decay if counting is None else broadcast((1.0 - decay) * counting.double(), old))


def _faded(decay: float, counting: torch.Tensor) -> torch.Tensor:
    """What remains of the old value, float64."""
    return torch.where(counting, torch.full_like(counting, decay, dtype=torch.float64), 1.0)


def add_to(old: torch.Tensor, gradient: torch.Tensor, axis: int, decay: float, counting: Mask) -> None:
    """Bring ``m m^T`` into a moving average or a sum, where ``m`` has the axis as rows, all others as columns.

    Args:
        old: ``[n, d, d]``, changed in place.
        gradient: ``[n, *shape]`` with ``shape[axis] == d``.
        axis: of a matrix.
        decay: of the old ones; 1 for the sum.
        counting: which matrices count; the others must be zeros, and keep what they have.
    """
    if counting is not None and decay != 1:
        old *= broadcast(_faded(decay, counting) / decay, old)
    add_symmetric(old, _with_rows(gradient, axis), 1.0 - decay if decay != 1 else 1.0, decay)


def _with_rows(stacked: torch.Tensor, axis: int) -> torch.Tensor:
    """Each of ``[n, *shape]`` as a matrix, with one axis as rows and all others as columns."""
    if stacked.dim() == 3:
        return stacked.mT if axis else stacked
    last = axis == stacked.dim() - 2
    return stacked.flatten(1, -2).mT if last else stacked.movedim(axis + 1, 1).flatten(2)


def side(size: int, dtype: torch.dtype, stored: torch.dtype | None, packing: Packing) -> Kept:
    """A square matrix of an axis as state.

    Args:
        size: of the axis.
        dtype: of the computation.
        stored: what it is kept in: a floating dtype; int8 for the codes of ``packing``; None for ``dtype``.
        packing: see there.
    """
    if stored == torch.int8:
        return Kept((size, size), dtype, packing=packing)
    return Kept((size, size), stored or dtype)


def keep_statistics(held: Held, gradient: torch.Tensor, axis: int, decay: float, counting: Mask) -> None:
    """:func:`add_to` what is kept of an axis, perhaps in a shorter form."""
    name = f"factor_{axis}"
    factor = held.numbers(name, gradient.dtype, whole=False)
    add_to(factor, gradient, axis, decay, counting)
    if factor is not held[name]:
        held.replace(name, factor, range(len(factor)))


def along(stacked: torch.Tensor, matrices: torch.Tensor, axis: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Each of ``[n, *shape]`` with each of ``[n, e, d]`` multiplied onto an axis of size ``d``; dense.

    ``out``, dense and of the result's shape, may be written to.
    """
    if stacked.dim() == 3:
        return torch.bmm(stacked, matrices.mT, out=out) if axis else torch.bmm(matrices, stacked, out=out)
    n, size, shape = len(stacked), matrices.shape[1], list(stacked.shape[1:])
    if axis == len(shape) - 1:
        place = None if out is None else out.view(n, -1, size)
        return torch.bmm(stacked.flatten(1, -2), matrices.mT, out=place).view(n, *shape[:-1], size)
    moved = stacked.movedim(axis + 1, 1)
    place = None if out is None or axis else out.view(n, size, -1)
    made = torch.bmm(matrices, moved.flatten(2), out=place).view(n, size, *moved.shape[2:])
    return made if axis == 0 else made.movedim(1, axis + 1).contiguous()


def due(turn: Turn, frequency: int, staggered: bool, start: int, axes: int) -> list[list[int]]:
    """For each of some axes the places in the stack of the matrices whose root or basis is to be found anew now.

    From step ``start`` on: all at that step and every ``frequency`` steps; or, staggered, each in its own phase.
    """
    if turn.step < start:
        return [[] for _ in range(axes)]
    if not staggered:
        now = turn.step == start or turn.step % frequency == 0
        return [list(range(len(turn.phases))) if now else [] for _ in range(axes)]
    return [
        [place for place, phases in enumerate(turn.phases) if (turn.step + phases[axis]) % frequency == 0]
        for axis in range(axes)
    ]


def with_fresh(places: Sequence[Sequence[int]], counts: Counts) -> tuple[list[list[int]], list[int], list[int]]:
    """For each axis the places that are due, but for matrices without any root or basis; those; and all of both.

    Matrices without any need them along all axes, so they find all when the first falls due.
    """
    every = sorted({place for axis in places for place in axis})
    if not every:
        return [list(axis) for axis in places], [], []
    found = counts.refreshes.tolist()
    fresh = [place for place in every if found[place] == 0]
    return [[place for place in axis if found[place]] for axis in places], fresh, every


def cut(shape: Sequence[int], size: int | None) -> list[tuple[slice, ...]]:
    """Blocks of at most ``size`` along each axis, in row-major order; one for None."""
    edges = [[(at, min(at + (size or d), d)) for at in range(0, d, size or max(d, 1))] for d in shape]
    return [tuple(slice(start, stop) for start, stop in corner) for corner in itertools.product(*edges)]


def products(shape: Sequence[int]) -> float:
    """Operations of one product along every axis."""
    return 2.0 * sum(shape) * prod(shape)


def passes(shape: Sequence[int]) -> float:
    """Operations that take as long as a step's passes over the memory of a matrix."""
    return _PASSES * prod(shape)
