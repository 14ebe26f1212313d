"""One step: buckets, then stage after stage, with one packed reduction between stages. Nothing optimizer-specific."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oput_dist.backends import BACKENDS, Batch, Scalars, choose, send
from oput_dist.collectives import gather_pieces, packed_sum
from oput_dist.kernels.stage import Apply, Prologue

from .norm import clip_factor, square_sums
from .plan import Plan
from .recipe import Group, Recipe, as_scalar, decay_scalar, prologue_of
from .slot import Slot

__all__ = ["Options", "Step"]

State = MutableMapping[torch.Tensor, dict[str, Any]]


@dataclass(frozen=True)
class Options:
    """What holds for a whole optimizer."""

    backends: tuple[str, ...] = BACKENDS
    state_dtype: torch.dtype | None = None
    max_grad_norm: float | None = None


@dataclass
class _Bucket:
    """Slots that one launch serves."""

    slots: list[Slot]
    recipe: Recipe
    batch: Batch
    rows: torch.Tensor | None
    """Rows of the slots in the table of sums, on the device; None for all rows in order."""
    counts: torch.Tensor
    """Elements of each slot's piece, ``[slots, 1]``, float64, on the device."""

    @property
    def numel(self) -> int:
        """Elements of all pieces."""
        return sum(slot.numel for slot in self.slots)


class Step:
    """The work of one ``optimizer.step()``.

    Args:
        plan: the plan.
        groups: the parameter groups.
        state: the optimizer's state.
        recipe: the recipe of a group.
        scalars: the NamedTuple ``h`` of a group at a step count.
        options: see :class:`Options`.
        first: whether this optimizer has neither stepped nor loaded state before; the same on all ranks.
    """

    def __init__(
        self,
        plan: Plan,
        groups: Sequence[dict[str, Any]],
        state: State,
        recipe: Callable[[Group], Recipe],
        scalars: Callable[[Group, int], Any],
        options: Options,
        first: bool,
    ) -> None:
        self._plan, self._state, self._options, self._first = plan, state, options, first
        self._groups = [{**group, "lr": as_scalar(group["lr"])} for group in groups]
        self._recipes = [recipe(group) for group in self._groups]
        self._scalars = scalars

    def run(self) -> None:
        """Run it: checks first, so that nothing has changed when one of them raises."""
        slots = [slot for slot in self._plan.slots if updated(slot)]
        gradients = [(slot, gradient) for slot in slots if (gradient := slot.flat_gradient()) is not None]
        gradients = self._without_rehearsal(gradients)
        present = [slot for slot, _ in gradients]
        for device in {slot.device for slot in present}:
            choose(self._options.backends, device, 0)
        state = {slot: self._state_of(slot) for slot in present}
        steps = dict(zip(present, self._plan.next_counts(present, self._state), strict=True))
        active = [(slot, gradient) for slot, gradient in gradients if slot.numel]
        scale = self._clip(active) if self._options.max_grad_norm is not None else {}
        buckets = self._buckets(active, state, steps, scale)
        self._plan.count(present)
        self._run_stages(buckets)
        self._finish(buckets)

    def _state_of(self, slot: Slot) -> tuple[torch.Tensor, ...]:
        names = self._recipes[slot.group].state
        return slot.flat_state(self._state[slot.parameter], names, self._options.state_dtype)

    def _without_rehearsal(self, gradients: list[tuple[Slot, torch.Tensor]]) -> list[tuple[Slot, torch.Tensor]]:
        """Make state, and drop from the step, what is only asked to create its state.

        ``torch.distributed.checkpoint`` creates state by a step with zero gradients at lr 0. Were it counted, training
        would go on with another bias correction. So a first step at lr 0 counts only if some gradient is not zero;
        all ranks know that it is the first and see the same lr, hence take part in the one reduction that this takes.
        """
        if not self._first or any(group["lr"] != 0 for group in self._groups):
            return gradients
        for slot in self._plan.slots:
            if slot.parameter.requires_grad and slot.parameter.grad is not None:
                self._state_of(slot)
                self._state[slot.parameter]["step"] = self._plan.counters[slot.index]
        tables = self._tables(1)
        for slot, gradient in gradients:
            if slot.numel:
                tables[slot.device][slot.index, 0] = gradient.count_nonzero()
        self._reduce(tables)
        return gradients if any(bool(table.any()) for table in tables.values()) else []

    def _buckets(
        self,
        active: Sequence[tuple[Slot, torch.Tensor]],
        state: dict[Slot, tuple[torch.Tensor, ...]],
        steps: dict[Slot, int],
        scale: dict[torch.device, torch.Tensor],
    ) -> list[_Bucket]:
        kinds = [
            (recipe, prologue_of(recipe, group)) for recipe, group in zip(self._recipes, self._groups, strict=True)
        ]
        first = [kinds.index(kind) for kind in kinds]  # one small number for groups that are updated alike
        sorted_slots: dict[Any, list[tuple[Slot, torch.Tensor]]] = {}
        for slot, gradient in active:
            key = (first[slot.group], slot.dtype, gradient.dtype, slot.device, *[s.dtype for s in state[slot]])
            if key in sorted_slots:
                sorted_slots[key].append((slot, gradient))
            else:
                sorted_slots[key] = [(slot, gradient)]
        buckets = []
        for key, members in sorted_slots.items():
            recipe, prologue = kinds[key[0]]
            buckets.append(self._bucket(recipe, prologue, members, state, steps, scale.get(key[3])))
        return buckets

    def _bucket(
        self,
        recipe: Recipe,
        prologue: Prologue,
        members: Sequence[tuple[Slot, torch.Tensor]],
        state: dict[Slot, tuple[torch.Tensor, ...]],
        steps: dict[Slot, int],
        scale: torch.Tensor | None,
    ) -> _Bucket:
        slots = [slot for slot, _ in members]
        indices = [slot.index for slot in slots]
        rows: dict[tuple[int, int], int] = {}
        which = [rows.setdefault((slot.group, steps[slot]), len(rows)) for slot in slots]
        named = [self._scalars(self._groups[group], step) for group, step in rows]
        values = [(decay_scalar(prologue, self._groups[group]), *h) for (group, _), h in zip(rows, named, strict=True)]
        device = slots[0].device
        batch = Batch(
            p=[slot.flat_parameter() for slot in slots],
            g=[gradient for _, gradient in members],
            state=[state[slot] for slot in slots],
            scalars=Scalars(type(named[0]), values, which, device),
            prologue=prologue,
            scale=scale,
            cache=self._plan.cache((recipe, prologue, tuple(indices))),
        )
        if "table_rows" not in batch.cache:
            whole = indices == list(range(len(self._plan.slots)))
            batch.cache["table_rows"] = None if whole else send(torch.tensor(indices, device="cpu"), device)
            counts = torch.tensor([slot.numel for slot in slots], dtype=torch.float64, device="cpu")
            batch.cache["table_counts"] = send(counts.unsqueeze(1), device)
        return _Bucket(slots, recipe, batch, batch.cache["table_rows"], batch.cache["table_counts"])

    def _run_stages(self, buckets: Sequence[_Bucket]) -> None:
        """Stage after stage. Whether sums are exchanged between two depends on the recipes alone, not on gradients."""
        tables: dict[torch.device, torch.Tensor] = {}
        for number in range(max(len(recipe.stages) for recipe in self._recipes)):
            width = max(recipe.terms[number] for recipe in self._recipes if number < len(recipe.stages))
            sums = self._tables(width + 1) if width else {}
            for bucket in buckets:
                if number < len(bucket.recipe.stages):
                    self._run_stage(number, bucket, tables, sums)
            if width:
                self._reduce(sums)
            tables = sums

    def _run_stage(
        self,
        number: int,
        bucket: _Bucket,
        before: dict[torch.device, torch.Tensor],
        after: dict[torch.device, torch.Tensor],
    ) -> None:
        batch, recipe = bucket.batch, bucket.recipe
        device = batch.p[0].device
        sums = None
        if isinstance(recipe.stages[number], Apply):
            table = before[device] if bucket.rows is None else before[device][bucket.rows]
            sums = table[:, : recipe.terms[number - 1] + 1]
        result = choose(self._options.backends, device, bucket.numel).run(recipe.stages[number], batch, sums)
        if result is not None:
            values = torch.cat([result, bucket.counts], 1)
            rows = slice(None) if bucket.rows is None else bucket.rows
            after[device][rows, : values.shape[1]] = values

    def _tables(self, width: int) -> dict[torch.device, torch.Tensor]:
        """Zeros for the sums of all parameters, on each device: a piece without gradient adds nothing."""
        rows = len(self._plan.slots)
        return {device: torch.zeros(rows, width, dtype=torch.float64, device=device) for device in self._plan.schedules}

    def _reduce(self, tables: dict[torch.device, torch.Tensor]) -> None:
        for device, table in tables.items():
            packed_sum(table, self._plan.schedules[device])

    def _clip(self, active: Sequence[tuple[Slot, torch.Tensor]]) -> dict[torch.device, torch.Tensor]:
        """The factor on every device that brings the global gradient norm down to ``max_grad_norm``."""
        tables = self._tables(1)
        sorted_slots: dict[Any, list[tuple[Slot, torch.Tensor]]] = {}
        for slot, gradient in active:
            sorted_slots.setdefault((gradient.dtype, slot.device), []).append((slot, gradient))
        for (_, device), members in sorted_slots.items():
            rows = send(torch.tensor([slot.index for slot, _ in members], device="cpu"), device)
            tables[device][rows] = square_sums([g for _, g in members], self._options.backends)
        self._reduce(tables)
        home = next(iter(tables))
        total = torch.stack([table.sum().to(home, non_blocking=True) for table in tables.values()]).sum()
        assert self._options.max_grad_norm is not None
        factor = clip_factor(total.sqrt(), self._options.max_grad_norm).reshape(1)
        return {device: factor.to(device, torch.float64, non_blocking=True) for device in tables}

    def _finish(self, buckets: Sequence[_Bucket]) -> None:
        """Write back pieces that are not dense, and gather what is partitioned."""
        for bucket in buckets:
            for slot, values in zip(bucket.slots, bucket.batch.p, strict=True):
                if not slot.in_place:
                    slot.store(values)
        gathered: dict[Any, list[Slot]] = {}
        for slot in self._plan.slots:
            if slot.layout.gather_group is not None and updated(slot):
                gathered.setdefault((slot.layout.gather_group, slot.device), []).append(slot)
        for (group, _), slots in gathered.items():
            gather_pieces([slot.layout.pieces(slot.parameter) for slot in slots], group)


def updated(slot: Slot) -> bool:
    """Whether a parameter takes part in steps at all.

    What is gathered must be known on all ranks alike, so a frozen parameter that is partitioned is left alone, even if
    a gradient from before it was frozen is still there.
    """
    return slot.layout.gather_group is None or slot.parameter.requires_grad
