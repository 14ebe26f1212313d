"""Plain tensors: this rank holds all of the parameter (one process, or replicas that DDP keeps equal)."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .base import Layout, LayoutError
from .box import Box, one_box, whole_index
from .dtensor import whole_tensor
from .flat import dense_strides

__all__ = ["Plain"]


class Plain(Layout):
    """A parameter that is whole on this rank.

    Args:
        parameter: the parameter.
        name: its qualified name, where it is known.
        replicated: the group over which it is known to be replicated.
    """

    def __init__(
        self, parameter: torch.Tensor, name: str | None = None, replicated: dist.ProcessGroup | None = None
    ) -> None:
        self.name = name
        self.replica_groups = () if replicated is None else (replicated,)
        self.shape = parameter.shape
        self.device = parameter.device
        self._strides = dense_strides(parameter)

    @functools.cached_property
    def boxes(self) -> tuple[Box, ...]:
        return one_box(whole_index(self.shape), self.shape, self._strides)

    def piece(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def zeros(self, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        return torch.empty_strided(self.shape, self._strides, dtype=dtype, device=device or self.device).zero_()

    def adopt(self, value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, DTensor):
            value = whole_tensor(value)
        if value.shape != self.shape:
            raise LayoutError(f"state of shape {tuple(value.shape)} for a parameter of shape {tuple(self.shape)}")
        return self.zeros(value.dtype).copy_(value)
