"""Plain tensors: this rank holds all of the parameter (one process, or replicas that DDP keeps equal)."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

from .base import Layout, LayoutError
from .boxes import box_of
from .flat import dense_strides

__all__ = ["Plain"]


class Plain(Layout):
    """A parameter that is whole on this rank."""

    def __init__(self, parameter: torch.Tensor) -> None:
        self.shape = parameter.shape
        self._device = parameter.device
        self._strides = dense_strides(parameter)
        self.boxes = box_of([slice(0, size) for size in parameter.shape])

    def piece(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def zeros(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(self.shape, self._strides, dtype=dtype, device=self._device).zero_()

    def vector(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def adopt(self, value: torch.Tensor) -> torch.Tensor:
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if value.shape != self.shape:
            raise LayoutError(f"state of shape {tuple(value.shape)} for a parameter of shape {tuple(self.shape)}")
        return self.zeros(value.dtype).copy_(value)
