"""Codes in a step: numbers before each stage, codes again after it, and scales on which ranks agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from oput_dist.backends import choose
from oput_dist.kernels.stage import Stage

from .buckets import Bucket, Open, Scratch
from .coded import Cell
from .cuts import Cuts, Waiting
from .plan import Plan
from .slot import Slot

__all__ = ["Coding"]


class Coding:
    """What becomes of coded state in one step.

    Args:
        plan: the plan; :func:`oput_dist.engine.cuts.find_cuts` has been there.
        coded: the names and block sizes of a slot's coded state.
        key: equal for steps with the same coded state.
        backends: that may run.
    """

    def __init__(
        self,
        plan: Plan,
        coded: Callable[[Slot], Sequence[tuple[str, int]]],
        key: object,
        backends: tuple[str, ...],
    ) -> None:
        self._plan, self._backends, self._scratch = plan, backends, Scratch()
        memo = ("cuts", key)
        if memo not in plan.memo:
            slots = {device: [slot for slot in plan.slots if slot.device == device] for device in plan.devices}
            plan.memo[memo] = {device: Cuts(each, coded) for device, each in slots.items()}
        self._cuts: dict[torch.device, Cuts] = plan.memo[memo]
        self._tables = {device: cuts.zeros(device) for device, cuts in self._cuts.items() if not cuts.empty}
        self._waiting: dict[torch.device, list[Waiting]] = {}
        self._written: dict[Cell, None] = {}

    @contextmanager
    def opened(self, bucket: Bucket, stage: Stage) -> Iterator[None]:
        """A bucket with its state as a stage takes it: mostly as numbers, which become codes where they are written."""
        if not bucket.coded:
            yield
            return
        device = bucket.slots[0].device
        backend = choose(self._backends, device, bucket.total)
        codes = bucket.codes
        if codes and backend.takes_codes(stage, bucket.batch, codes[0]):
            bucket.batch.state = codes  # type: ignore[assignment]
            yield
            bucket.batch.state = []
            return
        opened = Open(bucket, self._scratch, backend)
        yield
        bucket.batch.state = []
        if stage.writes_state:
            opened.close()
            self._written.update(dict.fromkeys(part.cell for part in opened.parts))
            if device in self._tables:
                self._waiting.setdefault(device, []).extend(self._cuts[device].enter(self._tables[device], opened))

    def settle(self) -> None:
        """After a stage that writes state: exchange scales, and keep the codes. Every rank must call it."""
        for device, table in self._tables.items():
            waiting = self._waiting.get(device, [])
            self._cuts[device].settle(table, waiting, choose(self._backends, device, 0))
            table.zero_()
        for cell in self._written:
            cell.finish()
        self._waiting, self._written = {}, {}
