"""What multiplies all gradients of a step: loss scale and clipping; and whether a step is skipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from oput_dist.collectives import Schedule

from .norm import clip_factor, power_table
from .options import Options
from .plan import Plan
from .slot import Slot

__all__ = ["gradient_scale", "norm_tables"]

Active = Sequence[tuple[Slot, torch.Tensor]]


def norm_tables(plan: Plan, active: Active, options: Options) -> dict[torch.device, torch.Tensor]:
    """The squared norm of every parameter's gradient, on each device. Every rank must call it."""
    tables = {}
    for device in plan.devices:
        key = ("norm", device)
        if key not in plan.memo:
            groups = [slot.layout.groups if slot.device == device else () for slot in plan.slots]
            plan.memo[key] = Schedule.of([(each, 1) for each in groups])
        pieces = {slot.index: gradient for slot, gradient in active}
        tables[device] = power_table(pieces, plan.memo[key], device, 2.0, options.backends)
    return tables


def gradient_scale(
    plan: Plan,
    active: Active,
    options: Options,
    model: Sequence[dist.ProcessGroup],
    unscale: torch.Tensor | None,
    anywhere: Callable[[bool], bool],
) -> dict[torch.device, torch.Tensor] | None:
    """What multiplies every gradient, on each device, where that is not 1; None to skip the step on all ranks.

    Args:
        plan: the plan.
        active: slots with their gradients.
        options: of the optimizer.
        model: groups over which ranks hold different parameters.
        unscale: what multiplies every gradient before all else, 0-d; None for 1.
        anywhere: whether something is so on any rank that must do alike.
    """
    factor = unscale
    if options.max_grad_norm is not None or options.skip_nonfinite:
        tables = norm_tables(plan, active, options)
        home = next(iter(tables), torch.device("cpu"))
        sums = [table.sum().to(home, non_blocking=True) for table in tables.values()]
        total = torch.stack(sums).sum() if sums else torch.zeros((), dtype=torch.float64)
        for group in model:
            dist.all_reduce(total, group=group)
        if options.skip_nonfinite and anywhere(not bool(torch.isfinite(total))):
            return None
        if options.max_grad_norm is not None:
            scale = 1.0 if factor is None else factor.to(home, torch.float64)
            factor = clip_factor(total.sqrt() * scale, options.max_grad_norm) * scale
    if factor is None:
        return {}
    return {d: factor.to(d, torch.float64, non_blocking=True).reshape(1) for d in plan.devices}
