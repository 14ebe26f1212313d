"""Waves: how much state is open at once, and where parameters are cut for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm

from .buckets import Member

__all__ = ["WAVE", "waves"]

WAVE = {"cpu": 2**21, "cuda": 2**22}
"""Elements whose numbers are in memory at once where their state is opened: what stays in caches between two passes."""


def waves(members: Sequence[Member], divide: bool) -> Iterator[list[Member]]:
    """Members in groups of about :data:`WAVE` elements; all in one where no state must be opened.

    Args:
        members: whole slots.
        divide: whether a slot may be in several groups.
    """
    if not members[0].cells:
        yield list(members)
        return
    if members[0].slot.device.type != "cpu":
        yield from _grouped(members, divide, WAVE["cuda"])
        return
    edges, inner = zip(*(_edges(member) if divide else ([member], []) for member in members), strict=True)
    for some in (edges, inner):
        yield from _grouped([part for parts in some for part in parts], divide, WAVE["cpu"])


def _grouped(members: Sequence[Member], divide: bool, most: int) -> Iterator[list[Member]]:
    group: list[Member] = []
    for member in members:
        for part in _divided(member, most) if divide else [member]:
            if group and sum(each.numel for each in group) + part.numel > most:
                yield group
                group = []
            group.append(part)
    if group:
        yield group


def _edges(member: Member) -> tuple[list[Member], list[Member]]:
    """The ends of a member that are parts of blocks, and what is between them, whose codes may be used as they are."""
    begin, block = _aligned(member)
    if begin is None:
        return [member], []
    end = begin + member.slot.numel
    first = min(-begin % block, member.stop)
    last = member.stop if end == member.slot.layout.shape.numel() else max(first, member.stop - end % block)
    ends = [(0, first), (last, member.stop)]
    return [member.range(*each) for each in ends if each[0] < each[1]], [
        member.range(first, last)
    ] if first < last else []


def _divided(member: Member, most: int) -> Iterator[Member]:
    """A member in ranges that end where blocks do; whole, where its piece is not consecutive in the parameter."""
    begin, block = _aligned(member)
    if begin is None or member.numel <= most:
        yield member
        return
    start = member.start
    while start < member.stop:
        stop = min(member.stop, (begin + start + most) // block * block - begin)
        yield member.range(start, stop)
        start = stop


def _aligned(member: Member) -> tuple[int | None, int]:
    """Where ranges may begin to be cut, None if nowhere; and of how many elements they are multiples."""
    grids = [cell.grid for cell in member.cells if cell.grid is not None]
    begins = {begin for begin, _ in grids} or {0}
    begin = begins.pop() if len(begins) == 1 and member.slot.in_place else None
    return begin, lcm(*(size for _, size in grids))
