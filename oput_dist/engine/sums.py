"""The sums that are exchanged after a stage: where each lies in one flat table, over which groups it is added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from oput_dist.backends import send
from oput_dist.collectives import Schedule, packed_sum
from oput_dist.kernels.stage import WHOLE, Axes, Vectors

from .recipe import Recipe, Shape
from .slot import Slot

__all__ = ["Boundary", "Family", "broadcast_shape"]


def broadcast_shape(shape: Shape, axes: Axes) -> tuple[int, ...]:
    """The shape of what keeps some axes of a parameter, with size one along all others."""
    return tuple(size if axis in axes else 1 for axis, size in enumerate(shape))


@dataclass
class Family:
    """Slots of one recipe, shape and spread, whose sums lie together: ``[slots, sum]`` for each term."""

    recipe: Recipe
    shape: torch.Size
    slots: list[Slot] = field(default_factory=list)
    items: list[int] = field(default_factory=list)
    """Numbers of the items of each term, of the element count and of the step counts."""


class Boundary:
    """All sums that one device exchanges between a stage and the next. Static: made from metadata only.

    Args:
        slots: all slots of the device.
        recipe_of: the recipe of a slot.
        number: the stage that measures.
        loss_group: the ranks over which the batch loss is averaged; None for no loss, ``()`` for one process's.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        recipe_of: Callable[[Slot], Recipe],
        number: int,
        loss_groups: tuple[dist.ProcessGroup, ...] | None = None,
    ) -> None:
        self._items: list[tuple[tuple[dist.ProcessGroup, ...], int]] = []
        self.families: dict[tuple[object, ...], Family] = {}
        self._rows: dict[int, int] = {}  # slot -> item
        self._members: dict[int, tuple[Family, int]] = {}  # slot -> family and place in it
        self._number = number
        for slot in slots:
            recipe = recipe_of(slot)
            if not recipe.sums(number):
                continue
            if isinstance(recipe.stages[number + 1].given, Vectors):
                self._add_member(slot, recipe)
            else:
                self._rows[slot.index] = self._item(slot.layout.groups, len(recipe.sums(number)) + 1)
        for family in self.families.values():
            terms = [torch.Size(broadcast_shape(family.shape, axes)).numel() for axes in family.recipe.sums(number)]
            groups, n = family.slots[0].layout.groups, len(family.slots)
            family.items = [self._item(groups, n * size) for size in (*terms, 1, 1)]
        self._loss = None if loss_groups is None or not self._rows else self._item(loss_groups, 1)
        self._schedule = Schedule.of(self._items)

    def _item(self, groups: tuple[dist.ProcessGroup, ...], size: int) -> int:
        self._items.append((groups, size))
        return len(self._items) - 1

    def _add_member(self, slot: Slot, recipe: Recipe) -> None:
        key = (recipe, slot.layout.shape, slot.layout.groups)
        family = self.families.setdefault(key, Family(recipe, slot.layout.shape))
        self._members[slot.index] = (family, len(family.slots))
        family.slots.append(slot)

    @property
    def empty(self) -> bool:
        """Whether nothing is summed here."""
        return not self._items

    def zeros(self, device: torch.device) -> torch.Tensor:
        """A table: what has no gradient adds nothing."""
        return torch.zeros(self._schedule.size, dtype=torch.float64, device=device)

    def reduce(self, table: torch.Tensor) -> None:
        """Add it up over all ranks, one all-reduce for each process group."""
        packed_sum(table, self._schedule)

    def places(self, slots: Sequence[Slot], device: torch.device) -> torch.Tensor:
        """``[slots, values]``: where the totals of each slot lie: each term, then the count of elements, and for
        members of families the step count times that."""
        rows = [self._place(slot) for slot in slots]
        return send(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)

    def _place(self, slot: Slot) -> list[int]:
        starts = self._schedule.starts
        if slot.index in self._rows:
            item = self._rows[slot.index]
            return list(range(starts[item], starts[item] + self._items[item][1]))
        family, place = self._members[slot.index]
        return [starts[item] + place for item in family.items]

    def place(self, slot: Slot) -> int:
        """The place of a slot among the members of its family."""
        return self._members[slot.index][1]

    def add(
        self, table: torch.Tensor, slots: Sequence[Slot], term: int, axes: Axes, own: Sequence[Any], sums: torch.Tensor
    ) -> None:
        """Add one sum of boxes that lie alike in slots of one shape and spread, at the indices ``own``."""
        if slots[0].index in self._rows:
            assert axes == WHOLE
            for slot, value in zip(slots, sums.view(-1).unbind(0), strict=True):
                table[self._schedule.starts[self._rows[slot.index]] + term] += value
            return
        totals = self.totals(table, self._members[slots[0].index][0], term, axes)
        index = tuple(ix if axis in axes else slice(None) for axis, ix in enumerate(own))
        rows = [self.place(slot) for slot in slots]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            totals[rows[0] : rows[0] + len(rows)][(slice(None),) + index] += sums  # noqa: RUF005 - Python 3.10
        else:
            for row, one in zip(rows, sums.unbind(0), strict=True):
                totals[row][index] += one

    def totals(self, table: torch.Tensor, family: Family, number: int, axes: Axes) -> torch.Tensor:
        """``[slots, *axes]``: one sum of all members of a family."""
        start = self._schedule.starts[family.items[number]]
        size = self._items[family.items[number]][1]
        return table[start : start + size].view(len(family.slots), *broadcast_shape(family.shape, axes))

    def rows(self, table: torch.Tensor) -> torch.Tensor:
        """``[slots, terms + 1]``: the totals of all slots that are in no family."""
        starts = self._schedule.starts
        return torch.stack([table[starts[i] : starts[i] + self._items[i][1]] for i in self._rows.values()])

    def loss(self, table: torch.Tensor) -> torch.Tensor | None:
        """Where the loss lies, 0-d; None if there is none."""
        return None if self._loss is None else table[self._schedule.starts[self._loss]]
