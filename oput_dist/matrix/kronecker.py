"""What optimizers with one matrix for each axis share: statistics, products along axes, blocks, counts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch

from .work import Held, Kept, Turn

__all__ = ["COUNTS", "Counts", "along", "broadcast", "cut", "due", "present", "products", "statistics", "weighted"]

COUNTS = "matrix_counts"
"""Where the owner of a matrix keeps its :class:`Counts`."""


class Counts(NamedTuple):
    """Of each matrix, ``[n]`` float64 on its device, so that no step waits for one; kept in fp32."""

    steps: torch.Tensor
    """Gradients that counted."""
    refreshes: torch.Tensor
    """Roots or bases that were found."""
    failures: torch.Tensor
    """Of those that were not, so that the last one stayed."""

    @staticmethod
    def kept() -> Kept:
        """As state."""
        return Kept((3,), torch.float32)

    @classmethod
    def get(cls, held: Held) -> Counts:
        """As they are kept."""
        return cls(*held.get(COUNTS, torch.float64).unbind(-1))

    def put(self, held: Held) -> None:
        """Keep them."""
        held.put(COUNTS, torch.stack(self, -1))


def present(stacked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients that count, and which do; the others are zeros.

    A matrix of zeros is a missing gradient, as ranks cannot tell the two apart, and one that is not finite would spoil
    statistics for good. ``[n, *shape]`` and ``[n]`` bool.
    """
    largest = stacked.flatten(1).abs().amax(1)  # NaN, if any element is
    counts = (largest > 0) & torch.isfinite(largest)
    return torch.where(broadcast(counts, stacked), stacked, torch.zeros_like(stacked)), counts


def broadcast(each: torch.Tensor, stacked: torch.Tensor) -> torch.Tensor:
    """``[n]`` in as many axes as ``stacked`` has."""
    return each.view(-1, *[1] * (stacked.dim() - 1))


def weighted(old: torch.Tensor, new: torch.Tensor, decay: float, counts: torch.Tensor) -> torch.Tensor:
    """``decay old + (1 - decay) new`` where a matrix counts, else ``old``; with a decay of 1 the sum of both."""
    weight = 1.0 - decay if decay < 1 else 1.0
    return torch.where(broadcast(counts, old), decay * old + weight * new, old)


def statistics(
    old: torch.Tensor, gradient: torch.Tensor, axis: int, decay: float, counts: torch.Tensor
) -> torch.Tensor:
    """The moving average, or the sum, of ``m m^T`` where ``m`` has the axis as rows and all others as columns.

    Args:
        old: ``[n, d, d]``.
        gradient: ``[n, *shape]`` with ``shape[axis] == d``.
        axis: of a matrix.
        decay: of the old ones; 1 for the sum.
        counts: which matrices count; the others must be zeros, and keep what they have.
    """
    m = gradient.movedim(axis + 1, 1).flatten(2)
    weight = 1.0 - decay if decay < 1 else 1.0
    faded = torch.where(counts[:, None, None], decay * old, old)
    return torch.baddbmm(faded, m, m.mT, alpha=weight)


def along(stacked: torch.Tensor, matrices: torch.Tensor, axis: int) -> torch.Tensor:
    """Each of ``[n, *shape]`` with each of ``[n, e, d]`` multiplied onto an axis of size ``d``."""
    moved = stacked.movedim(axis + 1, 1)
    made = torch.bmm(matrices, moved.flatten(2)).view(len(stacked), matrices.shape[1], *moved.shape[2:])
    return made.movedim(1, axis + 1)


def due(turn: Turn, frequency: int, staggered: bool, start: int) -> list[int]:
    """The places in the stack of the matrices whose root or basis is to be found anew at this step.

    From step ``start`` on: all at that step and every ``frequency`` steps; or, staggered, each at a step of its own out
    of so many.
    """
    if turn.step < start:
        return []
    shifts = turn.numbers if staggered else (0,) * len(turn.numbers)
    first = not staggered and turn.step == start
    return [place for place, shift in enumerate(shifts) if first or (turn.step + shift) % frequency == 0]


def cut(shape: Sequence[int], size: int | None) -> list[tuple[slice, ...]]:
    """Blocks of at most ``size`` along each axis, in row-major order; one for None."""
    edges = [[(at, min(at + (size or d), d)) for at in range(0, d, size or max(d, 1))] for d in shape]
    return [tuple(slice(start, stop) for start, stop in corner) for corner in itertools.product(*edges)]


def products(shape: Sequence[int]) -> float:
    """Operations of one product along every axis."""
    return 2.0 * sum(shape) * prod(shape)
