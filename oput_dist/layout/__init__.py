"""Layouts: from a tensor to where its elements live. Knows nothing of optimizers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .base import Layout, LayoutError
from .boxes import Box, box_of, boxes_of_range
from .dtensor import Distributed, local_tensor
from .flat import dense_strides, flat, same_order
from .flattened import Flattened, is_flattened
from .partitioned import Partitioned
from .plain import Plain

__all__ = [
    "Box",
    "Layout",
    "LayoutError",
    "box_of",
    "boxes_of_range",
    "dense_strides",
    "flat",
    "layout_of",
    "local_tensor",
    "same_order",
    "whole_or_local",
]


def layout_of(parameter: torch.Tensor, shard_group: dist.ProcessGroup | None = None) -> Layout:
    """The layout of a parameter.

    Args:
        parameter: a plain tensor or a DTensor.
        shard_group: partition the update and the state of a replicated parameter over this group (ZeRO-1).

    Raises:
        LayoutError: for a parameter that is sharded already and a ``shard_group``, or with partial placements.
    """
    if isinstance(parameter, DTensor):
        layout = Distributed(parameter)
        if shard_group is not None:
            raise LayoutError(
                f"shard_group= is for replicated plain parameters, but this one is a DTensor placed as "
                f"{parameter.placements}; leave shard_group out: its state is laid out like the parameter"
            )
        return layout
    if is_flattened(parameter):
        if shard_group is not None:
            raise LayoutError("shard_group= is for replicated parameters, but FSDP1 shards this one already")
        return Flattened(parameter)
    return Plain(parameter) if shard_group is None else Partitioned(parameter, shard_group)


def whole_or_local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that this rank holds of a tensor: the tensor itself, or a DTensor's local piece."""
    return local_tensor(tensor) if isinstance(tensor, DTensor) else tensor
