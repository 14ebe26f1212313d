"""Rewriting parameters from their state, between steps: no gradients, no counting."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from oput_dist.backends import Batch, Scalars, choose
from oput_dist.kernels.stage import Prologue, Update

from .finish import finish
from .plan import Plan
from .slot import Slot

__all__ = ["rewrite"]


def rewrite(
    plan: Plan,
    state: MutableMapping[torch.Tensor, dict[str, Any]],
    backends: Sequence[str],
    stage: Update,
    names: tuple[str, ...],
    scalars: Mapping[int, Any],
) -> None:
    """Run ``stage`` on every parameter that has stepped; its rule sees the parameter as gradient too.

    Partitioned parameters are gathered, frozen ones too: all ranks must call it.

    Args:
        plan: the plan.
        state: the optimizer's state.
        backends: that may run.
        stage: what to run.
        names: of the state that it is given, in order.
        scalars: the NamedTuple ``h`` of each parameter group that is rewritten, by its number.
    """
    buckets: dict[Any, list[tuple[Slot, tuple[torch.Tensor, ...]]]] = {}
    for slot in plan.slots:
        held = state.get(slot.parameter, {})
        begun = bool(plan.counters[slot.counter] > 0) and all(held.get(n) is not None for n in names)
        if slot.group in scalars and slot.numel and begun:
            tensors = slot.flat_state(held, names, None)
            buckets.setdefault((slot.dtype, slot.device, *[t.dtype for t in tensors]), []).append((slot, tensors))
    written: list[tuple[Slot, torch.Tensor]] = []
    for members in buckets.values():
        slots = [slot for slot, _ in members]
        groups = sorted({slot.group for slot in slots})
        rows = [(0.0, *scalars[group]) for group in groups]
        which = [groups.index(slot.group) for slot in slots]
        p = [slot.flat_parameter() for slot in slots]
        kind = type(scalars[groups[0]])
        batch = Batch(p, p, [t for _, t in members], Scalars(kind, rows, which, slots[0].device), Prologue())
        choose(backends, slots[0].device, sum(slot.numel for slot in slots)).run(stage, batch, None)
        written += zip(slots, p, strict=True)
    finish(plan, written, lambda slot: slot.group in scalars)
