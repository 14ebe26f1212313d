"""Who owns which matrix: time shared out evenly, and then the bytes that owners keep."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence

__all__ = ["assigned", "least_load"]

_EVEN = 1.01
"""Times what the busiest rank must bear in any case: a rank that bears no more is not relieved further."""
_BYTES, _FULL, _STEEP = 0.95, 1.08, 8.0
"""What bytes count for beside time, which is lost at every step: a little less; but above 1.08 of an even share so many
times as much, so that hardly a rank needs more than 1.1."""
_RANKS, _KINDS, _MOST = 8, 12, 2048
"""Ranks, with most and with least to do, and kinds of matrices of each, among which relief is sought, and how often:
bounds the time that it takes to some seconds, also for a thousand ranks and ten thousand kinds."""
_PAIRS = 100
"""How often two matrices at a time are tried, which takes a hundred times as long."""

_Exchange = tuple[int, tuple[int, ...], int, tuple[int, ...]]
"""A rank, what it should give, to whom, and what it should take for it."""


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


def _burden(time: float, size: float) -> float:
    """What a rank bears that has these shares of time and bytes."""
    return max(time, _BYTES * size, _BYTES * _FULL + _STEEP * (size - _FULL))


def _room(burden: float) -> float:
    """The bytes with which a rank bears no more than that."""
    return min(burden / _BYTES, _FULL + (burden - _BYTES * _FULL) / _STEEP)


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
        self._shares = [(cost / time, own / size) for cost, own in zip(costs, kept, strict=True)]
        self._load = [[0.0, 0.0] for _ in range(ranks)]
        for share, owner in zip(self._shares, owners, strict=True):
            self._load[owner][0] += share[0]
            self._load[owner][1] += share[1]
        self._has: list[list[int]] = [[] for _ in range(ranks)]
        for i in movable:
            self._has[owners[i]].append(i)

    def run(self) -> None:
        """Until there is no relief, or for long enough. Two at a time are tried where one at a time is no relief."""
        pairs = _PAIRS
        for _ in range(min(4 * len(self._load), _MOST)):
            by_load = sorted(range(len(self._load)), key=lambda rank: (_burden(*self._load[rank]), rank))
            burdened = [rank for rank in reversed(by_load[-_RANKS:]) if _burden(*self._load[rank]) > _EVEN]
            found = next((best for rank in burdened if (best := self._best(rank, by_load[:_RANKS], 1))), None)
            if found is None and pairs:
                pairs -= 1
                found = next((best for rank in burdened[:1] if (best := self._best(rank, by_load[:_RANKS], 2))), None)
            if found is None:
                return
            rank, given, partner, taken = found
            for i in given:
                self._move(i, partner)
            for i in taken:
                self._move(i, rank)

    def _best(self, rank: int, partners: Sequence[int], most: int) -> _Exchange | None:
        """What relieves a rank most, of exchanges of at most so many matrices for as many."""
        load, limit = self._load[rank], _burden(*self._load[rank]) * (1 - 1e-9)
        room = _room(limit)
        found: _Exchange | None = None
        own = self._bundles(rank, most)
        for partner in partners:
            if partner == rank:
                continue
            other = self._load[partner]
            theirs = [((), 0.0, 0.0), *self._bundles(partner, most)]
            for given, time, size in own:
                for taken, less_time, less_size in theirs:
                    moved, carried = time - less_time, size - less_size
                    if (
                        load[0] - moved < limit
                        and load[1] - carried < room
                        and other[0] + moved < limit
                        and other[1] + carried < room
                    ):
                        limit = max(
                            _burden(load[0] - moved, load[1] - carried), _burden(other[0] + moved, other[1] + carried)
                        )
                        room = _room(limit)
                        found = rank, given, partner, taken
        return found

    def _bundles(self, rank: int, most: int) -> list[tuple[tuple[int, ...], float, float]]:
        """Matrices that a rank has, up to so many, one choice of each kind; with their time and bytes."""
        kinds: dict[tuple[float, float], list[int]] = {}
        for i in reversed(self._has[rank]):
            kinds.setdefault(self._shares[i], []).append(i)
        each = list(kinds.values())[-_KINDS:]
        bundles: list[tuple[int, ...]] = [(numbers[-1],) for numbers in each]
        if most > 1:
            bundles += [(a[-1], b[-1]) for a, b in itertools.combinations(each, 2)]
            bundles += [(numbers[-1], numbers[-2]) for numbers in each if len(numbers) > 1]
        return [(b, sum(self._shares[i][0] for i in b), sum(self._shares[i][1] for i in b)) for b in bundles]

    def _move(self, i: int, to: int) -> None:
        source = self._owners[i]
        for k in (0, 1):
            self._load[source][k] -= self._shares[i][k]
            self._load[to][k] += self._shares[i][k]
        self._has[source].remove(i)
        self._has[to].append(i)
        self._owners[i] = to
