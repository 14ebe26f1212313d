"""The plan: the slots of all parameters, their step counters, and the schedule of collectives.

Made once from metadata, and again when groups, parameters or state are replaced.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from oput_dist.layout import LayoutError, layout_of

from .slot import Slot

__all__ = ["Plan", "parameter_name"]


@dataclass
class Plan:
    """Slots in the order of the parameter groups, the same on all ranks."""

    slots: list[Slot]
    counters: torch.Tensor
    """Steps taken by each parameter, fp32 on the CPU; ``state[p]["step"]`` are views of it."""
    devices: list[torch.device]
    """The devices of the slots, in order of appearance."""
    caches: dict[Any, dict[Any, Any]] = field(default_factory=dict)
    """What backends keep for each bucket."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """What the engine works out once from the slots: the schedules of collectives."""

    @classmethod
    def of(
        cls,
        param_groups: Sequence[dict[str, Any]],
        state: MutableMapping[torch.Tensor, dict[str, Any]],
        shard_group: dist.ProcessGroup | None,
        sums: Sequence[bool],
    ) -> Plan:
        """The plan for these groups; adopts the step counters found in ``state``.

        Args:
            param_groups: the groups.
            state: the optimizer's state.
            shard_group: see :func:`layout_of`.
            sums: for each group, whether its update needs sums over whole parameters.

        Raises:
            LayoutError: for a parameter that cannot be laid out, or not summed where that is needed.
        """
        slots: list[Slot] = []
        for number, group in enumerate(param_groups):
            for i, parameter in enumerate(group["params"]):
                name = parameter_name(group, number, i)
                try:
                    layout = layout_of(parameter, shard_group)
                except LayoutError as error:
                    raise LayoutError(f"{name}: {error}") from None
                if sums[number] and layout.why_no_sums is not None:
                    raise LayoutError(f"{name}: this optimizer needs norms over whole parameters. {layout.why_no_sums}")
                slots.append(Slot(parameter, name, layout, number, len(slots)))
        counters = torch.zeros(len(slots), dtype=torch.float32, device="cpu")
        plan = cls(slots, counters, list(dict.fromkeys(slot.device for slot in slots)))
        for slot in slots:
            if slot.parameter in state and "step" in state[slot.parameter]:
                counters[slot.index] = float(state[slot.parameter]["step"])
                state[slot.parameter]["step"] = counters[slot.index]
        return plan

    def cache(self, bucket: Any) -> dict[Any, Any]:
        """What a backend keeps for a bucket: for the buckets used last, since the memory of packs is among it."""
        kept = self.caches[bucket] = self.caches.pop(bucket, {})
        if len(self.caches) > 12:
            del self.caches[next(iter(self.caches))]
        return kept

    def stale(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups hold other parameters than the slots, or any parameter has moved."""
        now = [(number, p) for number, group in enumerate(param_groups) for p in group["params"]]
        return len(now) != len(self.slots) or any(
            slot.parameter is not p or slot.group != number or slot.stale()
            for slot, (number, p) in zip(self.slots, now, strict=True)
        )

    def _adopt_counters(self, active: Sequence[Slot], state: MutableMapping[torch.Tensor, dict[str, Any]]) -> None:
        """Take over the counters that someone replaced or removed since the last step."""
        base, width = self.counters.data_ptr(), self.counters.element_size()
        for slot in active:
            entry = state[slot.parameter]
            step = entry.get("step")
            if not isinstance(step, torch.Tensor) or step.data_ptr() != base + width * slot.index:
                self.counters[slot.index] = 0.0 if step is None else float(step)
                entry["step"] = self.counters[slot.index]

    def counter(self, slot: Slot) -> torch.Tensor:
        """The step counter of a slot's parameter, a view."""
        return self.counters[slot.index]

    def next_counts(self, active: Sequence[Slot], state: MutableMapping[torch.Tensor, dict[str, Any]]) -> list[int]:
        """What the counters of the active slots will be after this step; :meth:`count` makes it so."""
        self._adopt_counters(active, state)
        counts = self.counters.tolist()
        return [int(counts[slot.index]) + 1 for slot in active]

    def count(self, active: Sequence[Slot]) -> None:
        """Advance the counters of the active slots."""
        if len(active) == len(self.slots):
            self.counters += 1
        else:
            self.counters[torch.tensor([slot.index for slot in active], dtype=torch.int64, device="cpu")] += 1


def parameter_name(group: dict[str, Any], number: int, i: int) -> str:
    """What to call a parameter in messages: its qualified name where known, else its place and shape."""
    if "param_names" in group:
        return f"parameter {group['param_names'][i]!r}"
    return f"parameter {i} of group {number} (shape {tuple(group['params'][i].shape)})"
