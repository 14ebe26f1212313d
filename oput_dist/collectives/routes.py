"""Who sends what of which matrix to whom: static, from what ranks hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

__all__ = ["WAVE_BYTES", "Share", "rows", "senders", "sent_back", "sent_to_owners", "share_of", "waves"]

WAVE_BYTES = 64 * 2**20
"""Bytes of matrices that a rank works on at a time, or one matrix; as much again is sent and received."""


@dataclass(frozen=True)
class Share:
    """What one rank holds of a matrix, in the order in which it travels."""

    numel: int
    parts: tuple[tuple[tuple[int, ...], Any], ...]
    """Shape, and index in the matrix, of each rectangle."""


def share_of(boxes: Sequence[Any]) -> Share:
    """What a rank holds that has these rectangles of a matrix: each with ``shape``, and ``index`` in the matrix."""
    parts = tuple((tuple(box.shape), tuple(box.index)) for box in boxes)
    return Share(sum(prod(shape) for shape, _ in parts), parts)


def alike(shares: Sequence[Share]) -> list[list[int]]:
    """The ranks that hold the same piece of a matrix, for each piece, in order."""
    same: dict[str, list[int]] = {}
    for rank, share in enumerate(shares):
        same.setdefault(repr([(shape, [str(part) for part in index]) for shape, index in share.parts]), []).append(rank)
    return list(same.values())


def senders(shares: Sequence[Share], owner: int) -> list[int]:
    """The ranks that send a matrix to its owner: of those that hold the same piece one, in the owner's own replica.

    Args:
        shares: what each rank holds.
        owner: of the matrix. Where it is the second that holds its piece, the second of every piece sends.
    """
    return _chosen(alike(shares), shares, owner)


def _chosen(same: Sequence[Sequence[int]], shares: Sequence[Share], owner: int) -> list[int]:
    number = next(ranks.index(owner) for ranks in same if owner in ranks)
    return sorted(ranks[number % len(ranks)] for ranks in same if shares[ranks[0]].numel)


def rows(numbers: Sequence[int], owners: Sequence[int], ranks: int) -> list[tuple[int | None, ...]]:
    """Numbers of matrices, one of each owner at a time; None where an owner has no more."""
    own: list[list[int]] = [[] for _ in range(ranks)]
    for i in sorted(numbers):
        own[owners[i]].append(i)
    return list(itertools.zip_longest(*own))


def waves(
    shapes: Sequence[tuple[int, ...]], owners: Sequence[int], ranks: int, itemsize: int, most: int
) -> list[list[int]]:
    """Numbers of matrices, so many at a time that no owner gets more than ``most`` bytes, or one."""
    own: list[list[int]] = [[] for _ in range(ranks)]
    for i, owner in enumerate(owners):
        own[owner].append(i)
    queues: list[list[list[int]]] = []
    for numbers in own:
        parts: list[list[int]] = []
        room = 0
        for i in sorted(numbers, key=lambda i: shapes[i]):
            size = prod(shapes[i]) * itemsize
            if not parts or size > room:
                parts.append([])
                room = most
            parts[-1].append(i)
            room -= size
        queues.append(parts)
    count = max((len(parts) for parts in queues), default=0)
    return [[i for parts in queues if w < len(parts) for i in parts[w]] for w in range(count)]


def sent_to_owners(held: Sequence[Share], counts: Sequence[int]) -> list[int]:
    """Elements that each rank sends of matrices that are cut alike, to those who work on them.

    Args:
        held: what each rank holds of one of them.
        counts: how many of them each rank owns.
    """
    same, every = alike(held), sum(counts)
    if len(same) == len(held):
        return [share.numel * (every - own) for share, own in zip(held, counts, strict=True)]
    sent = [0] * len(held)
    for owner, own in enumerate(counts):
        for rank in _chosen(same, held, owner) if own else ():
            sent[rank] += held[rank].numel * own * (rank != owner)
    return sent


def sent_back(held: Sequence[Share], counts: Sequence[int]) -> list[int]:
    """Elements that each rank sends of the results, to all that hold something. See :func:`sent_to_owners`."""
    total = sum(share.numel for share in held)
    return [own * (total - share.numel) for share, own in zip(held, counts, strict=True)]
