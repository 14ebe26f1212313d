"""Of matrices that are alike, each rank owns those of which it holds most: less is sent, and the balance stays."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

__all__ = ["nearest"]

_PART = 16
"""A rank that holds less than one part in so many of a matrix is no nearer to it than others: bounds the search."""


def nearest(
    owners: Sequence[int], kinds: Sequence[Hashable], sizes: Sequence[Sequence[int]], settled: Mapping[int, int]
) -> list[int]:
    """The owners, exchanged among matrices of one kind.

    Rows of a large matrix lie on all ranks, but those of a block on few. Deterministic: the largest pieces first.

    Args:
        owners: of each matrix.
        kinds: of each: owners of what is of one kind may be exchanged, as in time and bytes of state.
        sizes: for each matrix the elements that each rank holds.
        settled: matrices whose owner stays.
    """
    alike: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        if i not in settled:
            alike.setdefault(kind, []).append(i)
    result = list(owners)
    for members in alike.values():
        for i, owner in zip(members, _dealt(members, owners, sizes), strict=True):
            result[i] = owner
    return result


def _dealt(members: Sequence[int], owners: Sequence[int], sizes: Sequence[Sequence[int]]) -> list[int]:
    """The same owners for matrices of one kind, in another order."""
    places = Counter(owners[i] for i in members)
    found: dict[int, int] = {}
    for _, i, rank in sorted(itertools.chain.from_iterable(_wishes(i, sizes[i]) for i in members)):
        if i not in found and places[rank]:
            found[i] = rank
            places[rank] -= 1
    left = [i for i in members if i not in found]
    for i in left:  # who can keep the owner does
        if places[owners[i]]:
            found[i] = owners[i]
            places[owners[i]] -= 1
    others = iter(sorted(places.elements()))
    return [found[i] if i in found else next(others) for i in members]


def _wishes(i: int, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """The ranks that hold more of a matrix than an even share: minus the elements, its number, and the rank."""
    total = sum(sizes)
    least = max(total / len(sizes), total / _PART)
    return [(-size, i, rank) for rank, size in enumerate(sizes) if size > least]
