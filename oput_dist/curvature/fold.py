"""An estimate taken over into an optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from oput_dist.collectives import Schedule, packed_sum
from oput_dist.engine.forms import numbers_of
from oput_dist.engine.plan import Plan
from oput_dist.engine.recipe import row_of
from oput_dist.engine.sweep import part_of, sweep
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import Update
from oput_dist.layout import flat

__all__ = ["cut", "fold", "spatial_means"]


@rule
def averaged_where_finite(p, g, state, h):
    """``p`` is the average, ``g`` the estimate; one that is not finite leaves no trace."""
    return tl.where(g - g == 0, lerp(p, g, h.weight), p), ()


def cut(whole: Plan, plan: Plan, estimates: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Estimates for the slots of ``whole``, as they lie for those of ``plan``, which may partition parameters."""
    if whole is plan:
        return dict(estimates)
    made = {}
    for full, own in zip(whole.slots, plan.slots, strict=True):
        if full.index in estimates and own.numel:
            value = estimates[full.index].as_strided(full.piece.shape, full.strides)
            made[own.index] = flat(own.layout.piece(value), own.strides)
    return made


def spatial_means(plan: Plan, estimates: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Absolute values, and for parameters of more than two axes their means over all axes but the first two.

    All ranks that share parameters must call it: one all-reduce for each process group.
    """
    made = {index: value.abs() for index, value in estimates.items()}
    kernels = [slot for slot in plan.slots if len(slot.layout.shape) > 2]
    for device in {slot.device for slot in kernels}:
        slots = [slot for slot in kernels if slot.device == device]
        sizes = [slot.layout.shape[0] * slot.layout.shape[1] for slot in slots]
        schedule = Schedule.of([(slot.layout.groups, 2 * size) for slot, size in zip(slots, sizes, strict=True)])
        table = torch.zeros(schedule.size, dtype=torch.float64, device=device)
        tables = [
            table[start : start + 2 * size].view(2, *slot.layout.shape[:2])
            for slot, start, size in zip(slots, schedule.starts, sizes, strict=True)
        ]
        for slot, (sums, counts) in zip(slots, tables, strict=True):
            for box, view in _views(slot, made.get(slot.index)):
                kept = tuple(range(2, view.ndim))
                sums[box.index[:2]] += view.double().sum(kept)
                counts[box.index[:2]] += view[0, 0].numel()
        packed_sum(table, schedule)
        for slot, (sums, counts) in zip(slots, tables, strict=True):
            for box, view in _views(slot, made.get(slot.index)):
                mean = (sums[box.index[:2]] / counts[box.index[:2]]).to(view.dtype)
                view.copy_(mean.reshape(*mean.shape, *[1] * (view.ndim - 2)).expand_as(view))
    return made


def _views(slot: Any, value: torch.Tensor | None) -> list[Any]:
    return [] if value is None else list(zip(slot.boxes, slot.views(value), strict=True))


def fold(
    plan: Plan,
    state: Mapping[torch.Tensor, Mapping[str, Any]],
    name: str,
    estimates: Mapping[int, torch.Tensor],
    weights: Mapping[int, float],
    backends: tuple[str, ...],
) -> None:
    """``state = (1 - weight) * state + weight * estimate``, element by element, where the estimate is finite.

    Args:
        plan: the plan.
        state: the optimizer's, with tensors under ``name`` for all that have an estimate.
        name: of the state.
        estimates: by number of the slot.
        weights: of the estimate, by number of the parameter group.
        backends: that may run.
    """
    parts = []
    for slot in plan.slots:
        if slot.index in estimates and slot.numel:
            parts.append(part_of(slot, numbers_of(slot, state[slot.parameter], name), estimates[slot.index]))
    rows = {group: row_of(weight=weight) for group, weight in weights.items()}
    sweep(plan, Update(averaged_where_finite), parts, rows, backends)
