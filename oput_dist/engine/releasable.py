"""Whether gradients can be released in the backward pass, and when that of each parameter is final."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from oput_dist.layout import (
    data_groups_of_fsdp2,
    ddp_modules,
    is_flattened,
    managed_by_fsdp2,
    why_not_by_bucket,
)

from .accumulation import joint
from .optimizer import Optimizer
from .slot import Slot

__all__ = ["check_no_gradients", "check_optimizer", "ready_by_bucket"]


def check_optimizer(optimizer: Optimizer, slots: Sequence[Slot]) -> None:
    """Raise ValueError for an optimizer whose update of one parameter needs the gradients of others.

    Args:
        optimizer: the optimizer.
        slots: of its parameters.
    """
    owner, why = type(optimizer).__name__, optimizer.why_no_release
    for slot in slots:
        recipe = optimizer.recipe_of(optimizer.param_groups[slot.group], slot.layout.shape)
        if any(joint(stage) for stage in recipe.stages):
            why = why or "it takes sums over all gradients of the model before it updates any parameter"
        if recipe.whole is not None:
            why = why or "it works on whole matrices, those of one shape together and shared out over the ranks"
    if why is not None:
        raise ValueError(f"gradient release is not possible with {owner}: {why}; {_INSTEAD}")


def ready_by_bucket(
    model: nn.Module, optimizer: Optimizer, slots: Sequence[Slot]
) -> dict[DistributedDataParallel, set[int]]:
    """The parameters, by id, whose gradients DDP makes final, a bucket at a time; all others have moments of their own.

    For a plain parameter that is the end of its accumulation, and FSDP2 calls the same hooks once it has reduced the
    gradient of a shard.

    Raises:
        ValueError: for a parameter whose gradient has no such moment, or whose update needs a collective then in an
            order that not all ranks are sure to have.
    """
    found = {ddp: {id(p) for p in ddp.parameters() if p.requires_grad} for ddp in ddp_modules(model)}
    for ddp in found:
        if (why := why_not_by_bucket(ddp)) is not None:
            raise ValueError(f"gradient release is not possible under DistributedDataParallel with {why}")
    managed = managed_by_fsdp2()
    for slot in slots:
        ddps = [ddp for ddp, ids in found.items() if id(slot.parameter) in ids]
        why = _why_never_final(slot, bool(ddps), managed)
        if why is None:
            recipe = optimizer.recipe_of(optimizer.param_groups[slot.group], slot.layout.shape)
            why = _why_no_order(slot, recipe.exchanges > 0, ddps[0].process_group if ddps else None)
        if why is not None:
            raise ValueError(f"gradient release is not possible for {slot.name}: {why}")
    return found


def _why_never_final(slot: Slot, by_ddp: bool, managed: set[int]) -> str | None:
    """Why nothing tells in the backward pass that the gradient of a parameter is final."""
    p = slot.parameter
    if is_flattened(p):
        return (
            "FSDP1 (FullyShardedDataParallel) reduces its gradient after all hooks; use fully_shard, or leave "
            "gradient release out"
        )
    if isinstance(p, DTensor) and (by_ddp or id(p) not in managed):
        return (
            "it is a DTensor whose gradient fully_shard does not reduce, so that nothing tells when it is final; wrap "
            f"the module in fully_shard, or {_INSTEAD}"
        )
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and not by_ddp and not isinstance(p, DTensor):
        return (
            "several ranks run, and nothing in this model averages its gradient; wrap the model in "
            "DistributedDataParallel or fully_shard first, and give the wrapped model; or give the parameter to "
            "another optimizer"
        )
    return None


def _why_no_order(slot: Slot, exchanges: bool, ddp_group: dist.ProcessGroup | None) -> str | None:
    """Why the collectives of an update might come in another order on other ranks: those that reduce gradients come in
    one order on all, and each update follows one of them, so only its ranks may take part."""
    gathers = slot.layout.gather_group
    needed = [
        *(slot.layout.groups if exchanges or gathers is not None else ()),
        *([] if gathers is None else [gathers]),
    ]
    if ddp_group is not None:
        allowed = set(dist.get_process_group_ranks(ddp_group))
    else:
        groups = data_groups_of_fsdp2([slot.parameter])
        allowed = {rank for group in groups for rank in dist.get_process_group_ranks(group)}
    if all(set(dist.get_process_group_ranks(group)) <= allowed for group in needed):
        return None
    return (
        "its update exchanges sums or pieces with ranks that do not reduce its gradient together, so the order of "
        f"collectives is not the same everywhere; use an elementwise optimizer without shard_group, or {_INSTEAD}"
    )


_INSTEAD = "leave gradient_release out and call step() after the backward pass"


def check_no_gradients(slots: Sequence[Slot], parameters: Sequence[torch.Tensor]) -> None:
    """Raise ValueError for gradients from before, which the first backward pass would add to."""
    names = {id(slot.parameter): slot.name for slot in slots}
    for p in parameters:
        if p.grad is not None:
            raise ValueError(
                f"gradient release: {names[id(p)]} has a gradient from before: call optimizer.step() or zero_grad() "
                "first"
            )
