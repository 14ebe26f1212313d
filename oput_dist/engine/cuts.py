"""Blocks that ranks hold parts of: which they are, found once, and how their scales come to agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from oput_dist.backends import Backend, encode
from oput_dist.collectives import Schedule, packed_sum

from .agree import gathered, joint_groups
from .blocks import blocks_of
from .buckets import Open
from .code_cell import CodeCell, CodePart
from .plan import Plan
from .slot import Slot
from .storage import Storage

__all__ = ["Cuts", "Waiting", "find_cuts"]

_Ids = list[list[int]]
"""For each slot the numbers of blocks that any rank has not all of."""


def find_cuts(plan: Plan, storage: Storage) -> None:
    """Find the cut blocks of all slots, for :class:`Cuts`. Every rank must call it; a later call with it costs nothing.

    A plan that one rank alone makes again, as after its parameters moved in memory, finds them without the others.
    """
    if ("cuts found", storage.blocks) in plan.memo:
        return
    for size in storage.blocks:
        wanted = [slot for slot in plan.slots if slot.layout.groups and slot.layout.why_no_sums is None]
        if not wanted or all(_key(size) in slot.facts for slot in wanted):
            continue
        own = [blocks_of(slot, size) for slot in wanted]
        facts = (
            "cuts",
            size,
            tuple((slot.name, b.begin, b.numel, b.count) for slot, b in zip(wanted, own, strict=True)),
        )
        if facts not in plan.owners_known:
            ids = [blocks.ids[blocks.cut].tolist() for blocks in own]
            plan.owners_known[facts] = gathered(ids, _united, joint_groups(wanted))
        for slot, found in zip(wanted, plan.owners_known[facts], strict=True):
            slot.facts[_key(size)] = torch.tensor(found, dtype=torch.int64, device="cpu")
    plan.memo["cuts found", storage.blocks] = True


def _key(size: int) -> tuple[str, int]:
    return "cuts", size


def _united(ranks: Sequence[_Ids]) -> _Ids:
    return [sorted({i for ids in rows for i in ids}) for rows in zip(*ranks, strict=True)]


class Cuts:
    """The scales of cut blocks of one device, which ranks exchange after a stage that wrote state. Static.

    Args:
        slots: all slots of the device.
        names_of: the names and block sizes of a slot's coded state.
    """

    def __init__(self, slots: Sequence[Slot], coded: Callable[[Slot], Sequence[tuple[str, int]]]) -> None:
        self._items: dict[tuple[int, str], int] = {}
        items: list[tuple[Any, int]] = []
        for slot in slots:
            for name, size in coded(slot) if slot.layout.groups else ():
                ids = slot.facts.get(_key(size))
                if ids is not None and len(ids):
                    self._items[slot.index, name] = len(items)
                    items.append((slot.layout.groups, len(ids)))
        self._schedule = Schedule.of(items)

    @property
    def empty(self) -> bool:
        """Whether no block is cut."""
        return not self._items

    def zeros(self, device: torch.device) -> torch.Tensor:
        """A table: what has no gradient adds nothing."""
        return torch.zeros(self._schedule.size, dtype=torch.float32, device=device)

    def enter(self, table: torch.Tensor, opened: Open) -> list[Waiting]:
        """Enter the scales of a bucket's cut blocks, and keep their numbers until the exchange."""
        waiting = []
        for part in opened.parts:
            if not isinstance(part, CodePart) or not len((cut := part.cut())[0]):
                continue
            cell, (rows, numbers, scales) = part.cell, cut
            ids = cell.slot.facts[_key(cell.code.block)]
            start = self._schedule.starts[self._items[cell.slot.index, cell.name]]
            places = (torch.searchsorted(ids, cell.blocks.ids[rows]) + start).to(table.device)
            table[places] = scales
            waiting.append(Waiting(cell, rows, places, numbers))
        return waiting

    def settle(self, table: torch.Tensor, waiting: Sequence[Waiting], backend: Backend) -> None:
        """Exchange, and code the blocks anew. Every rank must call it."""
        packed_sum(table, self._schedule, maximum=True)
        jobs = [
            (
                each.cell.code,
                torch.empty(len(each.rows), each.cell.code.width, dtype=torch.uint8, device=table.device),
                table[each.places],
                each.numbers,
            )
            for each in waiting
        ]
        encode(backend, jobs, known=True)
        for each, (_, codes, scales, _) in zip(waiting, jobs, strict=True):
            each.cell.put(each.rows, codes, scales)


class Waiting:
    """Cut blocks of a cell, coded with this rank's scale so far."""

    def __init__(self, cell: CodeCell, rows: torch.Tensor, places: torch.Tensor, numbers: torch.Tensor) -> None:
        self.cell, self.rows, self.places, self.numbers = cell, rows, places, numbers
