"""The packed all-reduce: sums of all parameters travel together, once per process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["NamedRanks", "Schedule", "packed_sum", "ranks_of"]


@dataclass(frozen=True)
class NamedRanks:
    """Stands for a process group where nothing is sent, as in planning for more ranks than there are."""

    ranks: tuple[int, ...]


Groups = tuple[dist.ProcessGroup, ...]
Range = tuple[int, int]


def ranks_of(group: dist.ProcessGroup | NamedRanks) -> tuple[int, ...]:
    """The global ranks of a group, in its order."""
    return group.ranks if isinstance(group, NamedRanks) else tuple(dist.get_process_group_ranks(group))


@dataclass(frozen=True)
class Schedule:
    """Where items lie in a flat table, and which ranges of it are added up over which group.

    Static: made from metadata only, so that no rank can wait for a collective that another does not make. Two groups
    of the same ranks count as one, so that meshes made apart still share one all-reduce.
    """

    size: int
    """Values of the table."""
    starts: list[int]
    """Where each item begins."""
    ranges: list[tuple[dist.ProcessGroup, list[Range]]]
    """Each group with what is added up over it."""

    @classmethod
    def of(cls, items: Sequence[tuple[Groups, int]]) -> Schedule:
        """The schedule for items, each spread over some groups and of some size.

        Items that are spread alike lie next to each other, in order, so that most groups have one range. Groups come in
        the order of first appearance, which is the same on all ranks because items are.
        """
        keys = [tuple(ranks_of(group) for group in groups) for groups, _ in items]
        order = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        starts, at = [0] * len(items), 0
        ranges: dict[tuple[int, ...], tuple[dist.ProcessGroup, list[Range]]] = {}
        for i in sorted(range(len(items)), key=lambda i: order[keys[i]]):
            groups, size = items[i]
            starts[i] = at
            for ranks, group in zip(keys[i], groups, strict=True):
                _extend(ranges.setdefault(ranks, (group, []))[1], at, at + size)
            at += size
        return cls(at, starts, list(ranges.values()))


def _extend(ranges: list[Range], start: int, stop: int) -> None:
    if ranges and ranges[-1][1] == start:
        ranges[-1] = (ranges[-1][0], stop)
    else:
        ranges.append((start, stop))


def packed_sum(table: torch.Tensor, schedule: Schedule, maximum: bool = False) -> None:
    """Add up a flat ``table`` in place over the groups of the schedule: one all-reduce for each.

    With ``maximum`` the largest value is taken in place of the sum.
    """
    op = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
    for group, ranges in schedule.ranges:
        parts = [table[start:stop] for start, stop in ranges]
        if len(parts) == 1:
            dist.all_reduce(parts[0], op=op, group=group)
        else:
            packed = torch.cat(parts)
            dist.all_reduce(packed, op=op, group=group)
            torch._foreach_copy_(parts, list(torch.split(packed, [len(part) for part in parts])))
