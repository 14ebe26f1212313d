"""Opened state in a step: numbers before each stage, codes or host memory after it, and scales on which ranks agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from oput_dist.backends import choose
from oput_dist.kernels.codes import Format
from oput_dist.kernels.stage import Stage

from .buckets import Away, Bucket, Open, Scratch
from .cell import Cell
from .cuts import Cuts, Waiting
from .options import Options
from .plan import Plan
from .recipe import Recipe
from .slot import Slot

__all__ = ["Coding"]


class Coding:
    """What becomes in one step of state that must be opened.

    Args:
        plan: the plan; :func:`oput_dist.engine.cuts.find_cuts` has been there.
        recipe_of: how a slot is updated.
        key: equal for steps with the same recipes.
        options: in what form state is kept, and where.
    """

    def __init__(self, plan: Plan, recipe_of: Callable[[Slot], Recipe], key: object, options: Options) -> None:
        self._options, self._scratch = options, Scratch()

        def coded(slot: Slot) -> list[tuple[str, int]]:
            forms = [(name, options.form(name, slot)) for name in recipe_of(slot).state]
            return [(name, form.block) for name, form in forms if isinstance(form, Format)]

        memo = ("cuts", key)
        if memo not in plan.memo:
            slots = {device: [slot for slot in plan.slots if slot.device == device] for device in plan.devices}
            plan.memo[memo] = {device: Cuts(each, coded) for device, each in slots.items()}
        self._cuts: dict[torch.device, Cuts] = plan.memo[memo]
        self._tables = {device: cuts.zeros(device) for device, cuts in self._cuts.items() if not cuts.empty}
        self._waiting: dict[torch.device, list[Waiting]] = {}
        self._written: dict[Cell, None] = {}

    def opened(self, buckets: Sequence[Bucket], number: int) -> Iterator[Bucket]:
        """Buckets for one of their stages, one after the other, each with its state as numbers, or as codes where the
        backend takes them.

        While a bucket is there, the state of the next one comes from the host, and that of the one before goes there.
        """
        following = self._opened(buckets[0]) if buckets and buckets[0].away else None
        for i, bucket in enumerate(buckets):
            now, stage = following, bucket.recipe.stages[number]
            direct = self._lend_codes(bucket, stage)
            if now is None and not direct:
                now = self._opened(bucket)
            ahead = buckets[i + 1] if i + 1 < len(buckets) else None
            following = self._opened(ahead) if ahead is not None and ahead.away else None
            if now is not None:
                now.begin()
            yield bucket
            if now is not None:
                self._close(bucket, now, stage)
            elif direct:
                bucket.batch.state = []

    def _lend_codes(self, bucket: Bucket, stage: Stage) -> bool:
        """Whether a bucket's state is given to a stage as the codes that it is, which its backend takes."""
        first = bucket.members[0].codes if bucket.members[0].cells else None
        if first is None:
            return False
        backend = choose(self._options.backends, bucket.slots[0].device, bucket.total)
        if not backend.takes_codes(stage, bucket.batch, first):
            return False  # before the others are looked at: on GPUs it is always so
        codes = [member.codes for member in bucket.members]
        if any(each is None for each in codes):
            return False
        bucket.batch.state = codes  # type: ignore[assignment]
        return True

    def _opened(self, bucket: Bucket) -> Open | None:
        """A bucket that :meth:`Open.begin` is for; None if it needs none."""
        if not bucket.cells:
            return None
        device = bucket.slots[0].device
        backend = choose(self._options.backends, device, bucket.total)
        if bucket.away:
            assert self._options.home is not None
            return Away(bucket, self._options.home.carrier(device), backend)
        return Open(bucket, self._scratch.of(device, Open.room(bucket)), backend)

    def _close(self, bucket: Bucket, opened: Open, stage: Stage) -> None:
        parts, device = opened.close(stage), bucket.slots[0].device
        self._written.update(dict.fromkeys(part.cell for part in parts))
        if device in self._tables and stage.writes_state:
            self._waiting.setdefault(device, []).extend(self._cuts[device].enter(self._tables[device], opened))

    def settle(self) -> None:
        """After a stage that writes state: exchange scales, and keep the codes. Every rank must call it."""
        for device, table in self._tables.items():
            waiting = self._waiting.get(device, [])
            self._cuts[device].settle(table, waiting, choose(self._options.backends, device, 0))
            table.zero_()
        for cell in self._written:
            cell.finish()
        self._waiting, self._written = {}, {}
