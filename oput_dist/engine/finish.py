"""The end of whatever wrote parameters: pieces that are not dense are written back, partitioned ones gathered, and
autograd is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from oput_dist.collectives import gather_pieces

from .plan import Plan
from .slot import Slot

__all__ = ["finish", "updated"]


def finish(
    plan: Plan, written: Iterable[tuple[Slot, torch.Tensor]], concerned: Callable[[Slot], bool] | None = None
) -> None:
    """Store what was written to flat copies, and gather what is partitioned: on all ranks, whatever they wrote.

    Kernels write past autograd, which must refuse to go back through a graph that has used a parameter's old values.

    Args:
        plan: the plan.
        written: slots with what was written for them.
        concerned: which partitioned slots to gather, the same on all ranks; by default those that steps update.
    """
    concerned = concerned or updated
    parameters: dict[int, torch.Tensor] = {}
    for slot, values in written:
        parameters[id(slot.parameter)] = slot.parameter
        if not slot.in_place:
            slot.store(values)
    for parameter in parameters.values():
        if not parameter.is_inference():
            torch.autograd.graph.increment_version(parameter)
    gathered: dict[Any, list[Slot]] = {}
    for slot in plan.slots:
        if slot.layout.gather_group is not None and concerned(slot):
            gathered.setdefault((slot.layout.gather_group, slot.device), []).append(slot)
    for (group, _), slots in gathered.items():
        gather_pieces([slot.layout.pieces(slot.parameter) for slot in slots], group)


def updated(slot: Slot) -> bool:
    """Whether a parameter takes part in steps at all.

    What is gathered must be known on all ranks alike, so a frozen parameter that is partitioned is left alone, even if
    a gradient from before it was frozen is still there.
    """
    return slot.layout.gather_group is None or slot.parameter.requires_grad
