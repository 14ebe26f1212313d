"""A part of a plan: parameters that are updated by themselves, before or after the others."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch

from .partial import PartialSums
from .plan import Plan
from .slot import Slot

__all__ = ["Part"]


class Part(Plan):
    """Some slots of a plan, as a plan of its own. It shares the step counters, so that both always agree."""

    @classmethod
    def cut(cls, plan: Plan, slots: Sequence[Slot]) -> Part:
        """The part with these slots, none of which may have a gradient that is a partial sum."""
        own = [copy.copy(slot) for slot in slots]
        for index, slot in enumerate(own):
            slot.index = index
        return cls(own, own, plan.counters, list(dict.fromkeys(slot.device for slot in own)), PartialSums([], []))

    def next_counts(self, active: Sequence[Slot], state: MutableMapping[torch.Tensor, dict[str, Any]]) -> list[int]:
        """As that of the whole plan, without reading the counters of all parameters."""
        self._adopt_counters(active, state)
        return [int(self.counters[slot.counter]) + 1 for slot in active]

    def count(self, active: Sequence[Slot]) -> None:
        """Advance the counters of the parameters of the active slots, each once."""
        for number in {slot.counter for slot in active}:
            self.counters[number] += 1
