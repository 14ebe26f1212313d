"""What ``fully_shard`` (FSDP2) leaves behind on and beside parameters, where their layout alone does not tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _composable_state

__all__ = ["data_groups_of_fsdp2", "managed_by_fsdp2", "replaced_by_fsdp2", "reshard_fsdp2", "unreduced_by_fsdp2"]


def replaced_by_fsdp2(parameter: torch.Tensor) -> bool:
    """Whether ``fully_shard`` put another parameter in place of this one, which nothing trains any more.

    Versions of torch that leave no mark give False.
    """
    return "_fsdp_orig_uid" in parameter.__dict__


def managed_by_fsdp2() -> set[int]:
    """The ids of all parameters whose gradients FSDP2 reduces itself, so that they never come as partial sums.

    Where torch keeps no such list, nothing: gradients are then exchanged needlessly, and are right.
    """
    return {id(parameter.sharded_param) for group in _parameter_groups() for parameter in group.fsdp_params}


def reshard_fsdp2(parameters: Iterable[torch.Tensor]) -> None:
    """Free the gathered parameters that a forward pass without a backward pass left, so that the next gathers anew."""
    wanted = {id(parameter) for parameter in parameters}
    for group in _parameter_groups():
        if any(id(parameter.sharded_param) in wanted for parameter in group.fsdp_params):
            group.reshard()


def data_groups_of_fsdp2(parameters: Iterable[torch.Tensor]) -> tuple[dist.ProcessGroup, ...]:
    """The process groups over which FSDP2 averages the gradients of some parameters; none if it manages none."""
    wanted = {id(parameter) for parameter in parameters}
    for group in _parameter_groups():
        if any(id(parameter.sharded_param) in wanted for parameter in group.fsdp_params):
            kinds = ("replicate_process_group", "shard_process_group")
            found = [getattr(group.mesh_info, kind, None) for kind in kinds]
            return tuple(one for one in found if one is not None)
    return ()


def unreduced_by_fsdp2(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether ``set_requires_gradient_sync(False)`` is in force for some of these parameters."""
    wanted = {id(parameter) for parameter in parameters}
    return any(
        not group.reduce_grads and any(id(parameter.sharded_param) in wanted for parameter in group.fsdp_params)
        for group in _parameter_groups()
    )


def _parameter_groups() -> list[Any]:
    """What FSDP2 gathers together, in all modules of the process."""
    states = [reference() for reference in getattr(_composable_state, "_module_state_mapping", {}).values()]
    groups = [group for state in states for group in getattr(state, "_fsdp_param_groups", ())]
    return groups + [group for state in states if (group := getattr(state, "__dict__", {}).get("_fsdp_param_group"))]
