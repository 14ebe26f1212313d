"""Who owns which matrix: time shared out evenly, and then the bytes that owners keep."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence

__all__ = ["assigned", "least_load"]

_EVEN = 1.01
"""Times what the busiest rank must bear in any case: a rank that bears no more is not relieved further."""
_BYTES = 0.95
"""What bytes count for beside time, which is lost at every step: memory is short only where it is full."""
_RANKS, _KINDS, _MOST = 8, 12, 2048
"""Ranks, with most and with least to do, and kinds of matrices of each, among which relief is sought, and how often:
bounds the time that it takes to some seconds, also for a thousand ranks and ten thousand kinds."""


def assigned(
    costs: Sequence[float],
    ranks: int,
    settled: Mapping[int, int] | None = None,
    kept: Sequence[float] | None = None,
) -> list[int]:
    """An owner for each matrix: the dearest first, each to the rank that has least to do (the lowest, if several).

    Where owners keep state, dear is what takes a large part of all time and all bytes together. Then the rank that is
    worst off gives matrices away, or exchanges them, as long as that makes it better. Deterministic.

    Args:
        costs: of each matrix, in any unit of time.
        ranks: how many there are.
        settled: matrices that have an owner already, who stays.
        kept: bytes that the owner of each matrix keeps; None for none.
    """
    settled, kept = settled or {}, kept or [0.0] * len(costs)
    price = sum(costs) / sum(kept) if any(kept) else 0.0
    weights = [cost + price * own for cost, own in zip(costs, kept, strict=True)]
    owners = [settled.get(i, 0) for i in range(len(costs))]
    load = [0.0] * ranks
    for i, owner in settled.items():
        load[owner] += weights[i]
    heap = [(own, rank) for rank, own in enumerate(load)]
    heapq.heapify(heap)
    dearest = sorted(range(len(costs)), key=lambda i: (-weights[i], i))
    for i in dearest:
        if i not in settled:
            own, owners[i] = heap[0]
            heapq.heapreplace(heap, (own + weights[i], owners[i]))
    movable = [i for i in dearest if i not in settled]
    _Relief(costs, kept, owners, ranks, movable).run()
    return owners


def least_load(costs: Sequence[float], ranks: int) -> float:
    """What the busiest rank has to bear at least, whoever owns what, while matrices are not split.

    Of the ``k * ranks + 1`` dearest matrices, ``k + 1`` have the same owner, and weigh no less than the last of them.
    """
    first = list(itertools.accumulate(sorted(costs, reverse=True), initial=0.0))
    several = [first[end + 1] - first[end - end // ranks] for end in range(0, len(costs), ranks)]
    return max([first[-1] / ranks, *several])


class _Relief:
    """Moves and exchanges of matrices that relieve the rank that is worst off, in time or bytes.

    Args:
        costs: of each matrix.
        kept: bytes of each.
        owners: to be improved, in place.
        ranks: how many there are.
        movable: the matrices that may move, the dearest first.
    """

    def __init__(
        self, costs: Sequence[float], kept: Sequence[float], owners: list[int], ranks: int, movable: Sequence[int]
    ) -> None:
        self._owners = owners
        time, size = (least_load(each, ranks) or 1.0 for each in (costs, kept))
        self._shares = [(cost / time, _BYTES * own / size) for cost, own in zip(costs, kept, strict=True)]
        self._load = [[0.0, 0.0] for _ in range(ranks)]
        for share, owner in zip(self._shares, owners, strict=True):
            self._load[owner][0] += share[0]
            self._load[owner][1] += share[1]
        self._has: list[list[int]] = [[] for _ in range(ranks)]
        for i in movable:
            self._has[owners[i]].append(i)

    def run(self) -> None:
        """Until there is no relief, or for long enough."""
        for _ in range(min(4 * len(self._load), _MOST)):
            by_load = sorted(range(len(self._load)), key=lambda rank: (max(self._load[rank]), rank))
            burdened = [rank for rank in reversed(by_load[-_RANKS:]) if max(self._load[rank]) > _EVEN]
            found = next((best for rank in burdened if (best := self._best(rank, by_load[:_RANKS]))), None)
            if found is None:
                return
            rank, given, partner, taken = found
            self._move(given, partner)
            if taken is not None:
                self._move(taken, rank)

    def _best(self, rank: int, partners: Sequence[int]) -> tuple[int, int, int, int | None] | None:
        """A rank, what it should give, to whom, and what it should take for it."""
        best, found = max(self._load[rank]) * (1 - 1e-9), None
        for given in self._kinds(rank):
            for partner in partners:
                for taken in (None, *self._kinds(partner)) if partner != rank else ():
                    after = self._after(rank, partner, given, taken)
                    if after < best:
                        best, found = after, (rank, given, partner, taken)
        return found

    def _kinds(self, rank: int) -> list[int]:
        """One matrix of each kind that a rank has."""
        return list({self._shares[i]: i for i in reversed(self._has[rank])}.values())[-_KINDS:]

    def _after(self, rank: int, partner: int, given: int, taken: int | None) -> float:
        """The larger load of both ranks after an exchange."""
        back = (0.0, 0.0) if taken is None else self._shares[taken]
        moved = [ahead - less for ahead, less in zip(self._shares[given], back, strict=True)]
        return max(
            max(self._load[rank][k] - moved[k] for k in (0, 1)), max(self._load[partner][k] + moved[k] for k in (0, 1))
        )

    def _move(self, i: int, to: int) -> None:
        source = self._owners[i]
        for k in (0, 1):
            self._load[source][k] -= self._shares[i][k]
            self._load[to][k] += self._shares[i][k]
        self._has[source].remove(i)
        self._has[to].append(i)
        self._owners[i] = to
