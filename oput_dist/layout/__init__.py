"""Layouts: from a tensor to where its elements live. Knows nothing of optimizers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .base import Layout, LayoutError
from .box import Box, boxes_of_range, within
from .ddp import Reduction, ddp_modules, replicated_by_ddp, why_not_by_bucket
from .dtensor import Distributed, local_tensor
from .flat import dense_strides, flat, same_order
from .flattened import Flattened, is_flattened
from .fsdp1 import (
    Flat,
    Fragment,
    clean_name,
    data_groups_of_fsdp1,
    flattened_in,
    fsdp1_layouts,
    reshard_fsdp1,
    unreduced_by_fsdp1,
)
from .fsdp2 import data_groups_of_fsdp2, managed_by_fsdp2, replaced_by_fsdp2, reshard_fsdp2, unreduced_by_fsdp2
from .partitioned import Partitioned
from .plain import Plain

__all__ = [
    "Box",
    "Distributed",
    "Flat",
    "Fragment",
    "Layout",
    "LayoutError",
    "Reduction",
    "boxes_of_range",
    "clean_name",
    "data_groups_of_fsdp1",
    "data_groups_of_fsdp2",
    "ddp_modules",
    "dense_strides",
    "flat",
    "flattened_in",
    "is_flattened",
    "layout_of",
    "layouts_of",
    "local_tensor",
    "managed_by_fsdp2",
    "replaced_by_fsdp2",
    "replicated_by_ddp",
    "reshard_fsdp1",
    "reshard_fsdp2",
    "same_order",
    "unreduced_by_fsdp1",
    "unreduced_by_fsdp2",
    "whole_or_local",
    "why_not_by_bucket",
    "within",
]


def layouts_of(
    parameter: torch.Tensor,
    shard_group: dist.ProcessGroup | None = None,
    flattened: Mapping[torch.Tensor, Flat] | None = None,
    replicated: Mapping[torch.Tensor, dist.ProcessGroup] | None = None,
) -> list[Layout]:
    """The layouts of a parameter: one, or one for each original parameter of one that FSDP1 flattened.

    All ranks get as many, in the same order, also where they hold nothing of an original parameter.

    Args:
        parameter: a plain tensor, a DTensor, or what FSDP1 made.
        shard_group: partition the update and the state of a replicated parameter over this group (ZeRO-1).
        flattened: what :func:`flattened_in` found in the module.
        replicated: what :func:`replicated_by_ddp` found in it.

    Raises:
        LayoutError: for a parameter that is sharded already and a ``shard_group``, or with partial placements, or on a
            mesh without this rank.
    """
    if flattened is not None and parameter in flattened:
        if shard_group is not None:
            raise LayoutError(_ALREADY.format("was sharded by FSDP1 (FullyShardedDataParallel)"))
        return fsdp1_layouts(parameter, flattened[parameter])
    return [layout_of(parameter, shard_group, (replicated or {}).get(parameter))]


def layout_of(
    parameter: torch.Tensor,
    shard_group: dist.ProcessGroup | None = None,
    replicated: dist.ProcessGroup | None = None,
) -> Layout:
    """The layout of a parameter of which no module is known. See :func:`layouts_of`."""
    if isinstance(parameter, DTensor):
        layout = Distributed(parameter)
        if shard_group is not None:
            raise LayoutError(_ALREADY.format(f"is a DTensor placed as {parameter.placements}"))
        return layout
    if is_flattened(parameter):
        if shard_group is not None:
            raise LayoutError(_ALREADY.format("was sharded by FSDP1 (FullyShardedDataParallel)"))
        return Flattened(parameter)
    return Plain(parameter, None, replicated) if shard_group is None else Partitioned(parameter, shard_group)


_ALREADY = (
    "shard_group= is for replicated plain parameters, but this one {}; leave shard_group out: its state is laid out "
    "like the parameter"
)


def whole_or_local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that this rank holds of a tensor: the tensor itself, or a DTensor's local piece."""
    return local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
