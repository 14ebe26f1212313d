"""Who sends what of which matrix to whom: static, from what ranks hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

__all__ = ["WAVE_BYTES", "Share", "first_holders", "sent_back", "sent_to_owners", "share_of", "waves"]

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


def first_holders(shares: Sequence[Share]) -> set[int]:
    """The ranks that send: of those that hold the same piece, the lowest."""
    seen: set[str] = set()
    found = set()
    for rank, share in enumerate(shares):
        if not share.numel:
            continue
        place = repr([(shape, [str(part) for part in index]) for shape, index in share.parts])
        if place not in seen:
            seen.add(place)
            found.add(rank)
    return found


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
    senders, every = first_holders(held), sum(counts)
    return [
        share.numel * (every - own) if rank in senders else 0
        for rank, (share, own) in enumerate(zip(held, counts, strict=True))
    ]


def sent_back(held: Sequence[Share], counts: Sequence[int]) -> list[int]:
    """Elements that each rank sends of the results, to all that hold something. See :func:`sent_to_owners`."""
    total = sum(share.numel for share in held)
    return [own * (total - share.numel) for share, own in zip(held, counts, strict=True)]
