"""The sums that are exchanged after a stage: where each lies in one flat table, over which groups it is added up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from oput_dist.backends import send
from oput_dist.collectives import Schedule, packed_sum
from oput_dist.kernels.stage import WHOLE, Axes, Vectors

from .recipe import Recipe, Shape
from .slot import Slot

__all__ = ["Boundary", "Family", "Members", "broadcast_shape", "members_of"]


def broadcast_shape(shape: Shape, axes: Axes) -> tuple[int, ...]:
    """The shape of what keeps some axes of a parameter, with size one along all others."""
    return tuple(size if axis in axes else 1 for axis, size in enumerate(shape))


@dataclass
class Family:
    """Slots of one recipe, shape and spread, whose sums lie together: ``[slots, sum]`` for each term."""

    recipe: Recipe
    shape: torch.Size
    slots: list[Slot] = field(default_factory=list)
    terms: list[int] = field(default_factory=list)
    """Numbers of the items of each sum, then of each maximum."""
    counts: list[int] = field(default_factory=list)
    """Numbers of the items of the element counts and of the step counts."""
    by_maximum: bool = False
    """Whether counts are exchanged as maxima, since nothing is summed."""


Members: TypeAlias = dict[int, tuple[Family, int]]
"""By number of the slot: its family, and its place in it."""


def members_of(families: Iterable[Family]) -> Members:
    """The slots of some families."""
    return {slot.index: (family, place) for family in families for place, slot in enumerate(family.slots)}


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
        self._sums: list[tuple[tuple[dist.ProcessGroup, ...], int]] = []
        self._maxima: list[tuple[tuple[dist.ProcessGroup, ...], int]] = []
        self._sizes: list[int] = []
        self._order: list[tuple[bool, int]] = []  # item -> whether a maximum, and place among those of its kind
        self.families: dict[tuple[object, ...], Family] = {}
        self._rows: dict[int, int] = {}  # slot -> item
        for slot in slots:
            recipe = recipe_of(slot)
            if not recipe.measures(number):
                continue
            if isinstance(recipe.stages[number + 1].given, Vectors):
                self._add_member(slot, recipe)
            else:
                self._rows[slot.index] = self._item(slot.layout.groups, len(recipe.sums(number)) + 1)
        self.members = members_of(self.families.values())
        for family in self.families.values():
            self._add_items(family, number)
        self._loss = None if loss_groups is None or not self._rows else self._item(loss_groups, 1)
        self._schedule, self._largest = Schedule.of(self._sums), Schedule.of(self._maxima)
        both = {False: (self._schedule, 0), True: (self._largest, self._schedule.size)}
        self._starts = [both[maximum][0].starts[i] + both[maximum][1] for maximum, i in self._order]

    def _item(self, groups: tuple[dist.ProcessGroup, ...], size: int, maximum: bool = False) -> int:
        items = self._maxima if maximum else self._sums
        self._order.append((maximum, len(items)))
        self._sizes.append(size)
        items.append((groups, size))
        return len(self._order) - 1

    def _add_items(self, family: Family, number: int) -> None:
        groups, n, recipe = family.slots[0].layout.groups, len(family.slots), family.recipe
        for maximum, terms in ((False, recipe.sums(number)), (True, recipe.maxima(number))):
            sizes = [n * torch.Size(broadcast_shape(family.shape, axes)).numel() for axes in terms]
            family.terms += [self._item(groups, size, maximum) for size in sizes]
        family.by_maximum = not recipe.sums(number)
        family.counts = [self._item(groups, n, family.by_maximum) for _ in range(2)]

    def _add_member(self, slot: Slot, recipe: Recipe) -> None:
        key = (recipe, slot.layout.shape, slot.layout.groups)
        self.families.setdefault(key, Family(recipe, slot.layout.shape)).slots.append(slot)

    @property
    def empty(self) -> bool:
        """Whether nothing is summed here."""
        return not self._order

    @property
    def exchanged(self) -> list[tuple[dist.ProcessGroup, int]]:
        """Every all-reduce of :meth:`reduce`: over which group, and how many float64 values."""
        ranges = (*self._schedule.ranges, *self._largest.ranges)
        return [(group, sum(stop - start for start, stop in parts)) for group, parts in ranges]

    def zeros(self, device: torch.device) -> torch.Tensor:
        """A table: what has no gradient adds nothing."""
        return torch.zeros(self._schedule.size + self._largest.size, dtype=torch.float64, device=device)

    def reduce(self, table: torch.Tensor) -> None:
        """Add it up over all ranks, one all-reduce for each process group; and one more where there are maxima."""
        packed_sum(table[: self._schedule.size], self._schedule)
        largest = table[self._schedule.size :]
        if len(largest):  # a maximum of NaN and a number is NaN on all ranks, which collectives do not promise
            largest.copy_(torch.where(largest.isnan(), torch.inf, largest))
            packed_sum(largest, self._largest, maximum=True)
            largest.copy_(torch.where(largest.isinf(), torch.nan, largest))

    def places(self, slots: Sequence[Slot], device: torch.device) -> torch.Tensor:
        """``[slots, values]``: where the totals of each slot lie: each term, then the count of elements, and for
        members of families the step count times that."""
        rows = [self._place(slot) for slot in slots]
        return send(torch.tensor(rows, dtype=torch.int64, device="cpu"), device)

    def _place(self, slot: Slot) -> list[int]:
        if slot.index in self._rows:
            item = self._rows[slot.index]
            return list(range(self._starts[item], self._starts[item] + self._sizes[item]))
        family, place = self.members[slot.index]
        return [self._starts[item] + place for item in (*family.terms, *family.counts)]

    def add(
        self,
        table: torch.Tensor,
        slots: Sequence[Slot],
        kept: Sequence[Axes],
        own: Sequence[Any],
        terms: Sequence[torch.Tensor],
    ) -> None:
        """Add the sums, then maxima, of boxes that lie alike in slots of one shape and spread, at the indices ``own``.

        ``kept`` are the axes that each keeps.
        """
        if slots[0].index in self._rows:
            assert all(axes == WHOLE for axes in kept)
            for i, term in enumerate(terms):
                for slot, value in zip(slots, term.view(-1).unbind(0), strict=True):
                    table[self._starts[self._rows[slot.index]] + i] += value
            return
        family = self.members[slots[0].index][0]
        rows = [self.members[slot.index][1] for slot in slots]
        together = rows == list(range(rows[0], rows[0] + len(rows)))
        for item, axes, term in zip(family.terms, kept, terms, strict=True):
            totals = self.totals(table, family, item, axes)
            index = tuple(ix if axis in axes else slice(None) for axis, ix in enumerate(own))
            if together:
                parts = [(totals[rows[0] : rows[0] + len(rows)], (slice(None), *index), term)]
            else:
                parts = [(totals[row], index, one) for row, one in zip(rows, term.unbind(0), strict=True)]
            for part, where, new in parts:
                part[where] = torch.maximum(part[where], new) if self._order[item][0] else part[where] + new

    def totals(self, table: torch.Tensor, family: Family, item: int, axes: Axes) -> torch.Tensor:
        """``[slots, *axes]``: one item of all members of a family."""
        start, size = self._starts[item], self._sizes[item]
        return table[start : start + size].view(len(family.slots), *broadcast_shape(family.shape, axes))

    def rows(self, table: torch.Tensor) -> torch.Tensor:
        """``[slots, terms + 1]``: the totals of all slots that are in no family."""
        starts = self._starts
        return torch.stack([table[starts[i] : starts[i] + self._sizes[i]] for i in self._rows.values()])

    def loss(self, table: torch.Tensor) -> torch.Tensor | None:
        """Where the loss lies, 0-d; None if there is none."""
        return None if self._loss is None else table[self._starts[self._loss]]
