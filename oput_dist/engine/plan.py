"""The plan: the slots of all parameters, their step counters, and the schedule of collectives.

Made once from metadata, and again when groups, parameters or state are replaced.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from oput_dist.layout import Layout, LayoutError, layouts_of

from .model import Model
from .partial import PartialSums
from .slot import Slot

__all__ = ["Plan", "check_sums", "parameter_name"]


@dataclass
class Plan:
    """Slots in the order of the parameter groups, the same on all ranks."""

    slots: list[Slot]
    owners: list[Slot]
    """The first slot of each parameter: nearly always its only one."""
    counters: torch.Tensor
    """Steps taken by each parameter, fp32 on the CPU; ``state[p]["step"]`` are views of it."""
    devices: list[torch.device]
    """The devices of the slots, in order of appearance."""
    partial: PartialSums
    """What tensor parallelism leaves to add up before a step."""
    caches: dict[Any, dict[Any, Any]] = field(default_factory=dict)
    """What backends keep for each bucket."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """What the engine works out once from the slots: the schedules of collectives."""
    in_order: list[Slot] = field(default_factory=list)
    """The slots in the order of the model: where wrappers made flat tensors of parameters, those come in another."""
    owners_known: dict[Any, Any] = field(default_factory=dict)
    """Plans of owners of whole matrices, which outlive this plan: see :class:`oput_dist.engine.matrices.Matrices`."""

    @classmethod
    def of(
        cls,
        param_groups: Sequence[dict[str, Any]],
        state: MutableMapping[torch.Tensor, dict[str, Any]],
        shard_group: dist.ProcessGroup | None,
        sums: Callable[[dict[str, Any], torch.Size], bool],
        model: Model | None = None,
    ) -> Plan:
        """The plan for these groups; adopts the step counters found in ``state``.

        Args:
            param_groups: the groups.
            state: the optimizer's state.
            shard_group: see :func:`layouts_of`.
            sums: whether the update of a parameter needs sums over it, from its group and global shape.
            model: the module of the parameters, where it is known.

        Raises:
            LayoutError: for a parameter that cannot be laid out, or not summed where that is needed.
        """
        slots: list[Slot] = []
        owners: list[Slot] = []
        for number, group in enumerate(param_groups):
            for i, parameter in enumerate(group["params"]):
                qualified = qualified_name(group, i, model)
                called = parameter_name(group, number, i, model)
                layouts = _layouts(parameter, called, shard_group, model)
                for k, layout in enumerate(layouts):
                    name = called if layout.name is None else f"parameter {layout.name!r}"
                    if sums(group, layout.shape):
                        check_sums(name, layout)
                    counter = len(owners) - (k > 0)
                    slots.append(Slot(parameter, name, layout, number, len(slots), counter, len(layouts) > 1))
                    slots[-1].called = layout.name or qualified
                    if model is not None and slots[-1].called is not None:
                        slots[-1].layer = model.class_of(slots[-1].called)
                    if k == 0:
                        owners.append(slots[-1])
        counters = torch.zeros(len(owners), dtype=torch.float32, device="cpu")
        partial = PartialSums([slot.parameter for slot in owners], [slot.layout for slot in owners])
        plan = cls(slots, owners, counters, list(dict.fromkeys(slot.device for slot in slots)), partial)
        plan.in_order = slots
        if model is not None and any(slot.layout.name is not None for slot in slots):
            places = {slot: model.layer_of(slot.layout.name or "") for slot in slots}
            plan.in_order = sorted(slots, key=lambda slot: (places[slot], slot.index))
        for slot in owners:
            if slot.parameter in state and "step" in state[slot.parameter]:
                counters[slot.counter] = float(state[slot.parameter]["step"])
                state[slot.parameter]["step"] = counters[slot.counter]
        return plan

    def settle_gradients(self) -> None:
        """Add up gradients that are partial sums, for :meth:`Slot.flat_gradient`. Every rank must call it."""
        if not self.partial:
            return
        settled = self.partial.settled()
        for slot in self.owners:
            slot.settled = settled.get(slot.counter)

    def cache(self, bucket: Any) -> dict[Any, Any]:
        """What a backend keeps for a bucket: for the buckets used last, since the memory of packs is among it."""
        kept = self.caches[bucket] = self.caches.pop(bucket, {})
        if len(self.caches) > 12:
            del self.caches[next(iter(self.caches))]
        return kept

    def stale(self, param_groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups hold other parameters than the slots, or any parameter has moved."""
        now = [(number, p) for number, group in enumerate(param_groups) for p in group["params"]]
        return len(now) != len(self.owners) or any(
            slot.parameter is not p or slot.group != number or slot.stale()
            for slot, (number, p) in zip(self.owners, now, strict=True)
        )

    def counter(self, slot: Slot) -> torch.Tensor:
        """The step counter of a slot's parameter, a view."""
        return self.counters[slot.counter]

    def next_counts(self, active: Sequence[Slot], state: MutableMapping[torch.Tensor, dict[str, Any]]) -> list[int]:
        """What the counters of the active slots will be after this step; :meth:`count` makes it so."""
        self._adopt_counters(active, state)
        counts = self.counters.tolist()
        return [int(counts[slot.counter]) + 1 for slot in active]

    def count(self, active: Sequence[Slot]) -> None:
        """Advance the counters of the parameters of the active slots, each once."""
        if len(active) == len(self.slots):
            self.counters += 1
        else:  # a number that comes twice is counted once
            self.counters[torch.tensor([slot.counter for slot in active], dtype=torch.int64, device="cpu")] += 1

    def _adopt_counters(self, active: Sequence[Slot], state: MutableMapping[torch.Tensor, dict[str, Any]]) -> None:
        """Take over the counters that someone replaced or removed since the last step."""
        base, width = self.counters.data_ptr(), self.counters.element_size()
        for slot in active:
            entry = state[slot.parameter]
            step = entry.get("step")
            if not isinstance(step, torch.Tensor) or step.data_ptr() != base + width * slot.counter:
                self.counters[slot.counter] = 0.0 if step is None else float(step)
                entry["step"] = self.counters[slot.counter]


def _layouts(
    parameter: torch.Tensor, name: str, shard_group: dist.ProcessGroup | None, model: Model | None
) -> list[Layout]:
    try:
        if model is None:
            return layouts_of(parameter, shard_group)
        return layouts_of(parameter, shard_group, model.flattened, model.replicated)
    except LayoutError as error:
        raise LayoutError(f"{name}: {error}") from None


def check_sums(name: str, layout: Layout) -> None:
    """Raise LayoutError for a parameter that cannot be summed over."""
    if layout.why_no_sums is not None:
        raise LayoutError(f"{name}: this optimizer needs norms over whole parameters. {layout.why_no_sums}")
    for group in layout.groups:
        able = [device.type for device in group._device_types]
        if layout.device.type not in able:
            raise LayoutError(
                f"{name} is on {layout.device}, but the ranks that share it communicate on {' and '.join(able)} only: "
                "move the module there, or give init_process_group a backend for each device, as in "
                "'cpu:gloo,cuda:nccl'"
            )


def parameter_name(group: dict[str, Any], number: int, i: int, model: Model | None = None) -> str:
    """What to call a parameter in messages: its qualified name where known, else its place and shape."""
    known = qualified_name(group, i, model)
    if known is not None:
        return f"parameter {known!r}"
    return f"parameter {i} of group {number} (shape {tuple(group['params'][i].shape)})"


def qualified_name(group: dict[str, Any], i: int, model: Model | None = None) -> str | None:
    """The qualified name of a parameter, where it is known."""
    known = group["param_names"][i] if "param_names" in group else None
    if known is None and model is not None:
        known = model.name_of(group["params"][i])
    return known
