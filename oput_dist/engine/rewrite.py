"""Rewriting parameters from their state, between steps: no gradients, no counting."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from oput_dist.kernels.stage import Update

from .cell import found_in
from .finish import finish
from .forms import flats_of, lost_of
from .plan import Plan
from .sweep import part_of, sweep

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
    parts, written = [], []
    for slot in plan.slots:
        held = state.get(slot.parameter, {})
        begun = bool(plan.counters[slot.counter] > 0) and all(found_in(slot, held, n) is not None for n in names)
        if slot.group in scalars and slot.numel and begun:
            p = slot.flat_parameter()
            parts.append(part_of(slot, p, p, flats_of(slot, held, names), lost_of(slot, held)))
            written.append((slot, p))
    sweep(plan, stage, parts, scalars, backends)
    finish(plan, written, lambda slot: slot.group in scalars)
