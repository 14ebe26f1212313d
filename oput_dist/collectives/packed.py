"""The packed all-reduce: sums of all parameters travel together, once per process group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

__all__ = ["Schedule", "packed_sum"]


@dataclass
class Schedule:
    """Which rows of a table of sums are added up over which group. Static: made from metadata only.

    Two groups of the same ranks count as one, so that meshes made apart still share one all-reduce.
    """

    groups: list[tuple[dist.ProcessGroup, torch.Tensor | None]]
    """Each group with the indices of its rows; None for all rows."""

    @classmethod
    def of(cls, row_groups: Sequence[tuple[dist.ProcessGroup, ...]], device: torch.device) -> Schedule:
        """The schedule for rows of which row ``i`` is spread over ``row_groups[i]``.

        Groups are taken in the order of first appearance, which is the same on all ranks because parameters are.
        """
        rows: dict[tuple[int, ...], tuple[dist.ProcessGroup, list[int]]] = {}
        for row, groups in enumerate(row_groups):
            for group in groups:
                ranks = tuple(dist.get_process_group_ranks(group))
                rows.setdefault(ranks, (group, []))[1].append(row)
        every = len(row_groups)
        return cls(
            [
                (group, None if len(indices) == every else torch.tensor(indices, device=device))
                for group, indices in rows.values()
            ]
        )


def packed_sum(table: torch.Tensor, schedule: Schedule, maximum: bool = False) -> None:
    """Add up ``table`` (rows x values) in place over the groups of the schedule: one all-reduce for each.

    With ``maximum`` the largest value is taken in place of the sum.
    """
    op = dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM
    for group, indices in schedule.groups:
        if indices is None:
            dist.all_reduce(table, op=op, group=group)
        else:
            part = table[indices]
            dist.all_reduce(part, op=op, group=group)
            table[indices] = part
