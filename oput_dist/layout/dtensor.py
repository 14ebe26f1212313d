"""DTensor parameters: FSDP2, HSDP, tensor parallel, and their products, on any mesh."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Replicate

from .base import Layout, LayoutError
from .flat import dense_strides

__all__ = ["Distributed"]


class Distributed(Layout):
    """A parameter that is a DTensor, with any mixture of shard, strided shard and replicate placements."""

    def __init__(self, parameter: DTensor) -> None:
        self.shape = parameter.shape
        self._stride = parameter.stride()
        self._mesh = parameter.device_mesh
        self._placements = parameter.placements
        if any(placement.is_partial() for placement in self._placements):
            raise LayoutError(f"placements {self._placements} of a parameter: partial sums cannot be optimized")
        local = local_tensor(parameter)
        self._device, self._local_shape, self._local_strides = local.device, local.shape, dense_strides(local)
        self.groups: tuple[dist.ProcessGroup, ...] = tuple(
            self._mesh.get_group(dim)
            for dim, placement in enumerate(self._placements)
            if not placement.is_replicate() and self._mesh.size(dim) > 1
        )

    def piece(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            raise LayoutError("a plain tensor where a DTensor is needed: gradients must be placed like their parameter")
        if tensor.placements != self._placements:
            # Tensor parallel hands out gradients of replicated parameters as partial sums, on all ranks alike: a rank
            # that had none would keep the others waiting here, as it did in the backward pass.
            tensor = tensor.redistribute(self._mesh, self._placements)
        return local_tensor(tensor)

    def zeros(self, dtype: torch.dtype) -> torch.Tensor:
        return self._zeros(dtype)

    def _zeros(self, dtype: torch.dtype) -> DTensor:
        local = torch.empty_strided(self._local_shape, self._local_strides, dtype=dtype, device=self._device).zero_()
        return DTensor.from_local(
            local, self._mesh, self._placements, run_check=False, shape=self.shape, stride=self._stride
        )

    def adopt(self, value: torch.Tensor) -> torch.Tensor:
        if value.shape != self.shape:
            raise LayoutError(f"state of shape {tuple(value.shape)} for a parameter of shape {tuple(self.shape)}")
        if not isinstance(value, DTensor):
            whole = value.to(self._device)
            value = DTensor.from_local(whole, self._mesh, [Replicate()] * self._mesh.ndim, run_check=False)
        if value.device_mesh != self._mesh:
            raise LayoutError(f"state on the mesh {value.device_mesh} for a parameter on {self._mesh}")
        if value.placements != self._placements:
            value = value.redistribute(self._mesh, self._placements)
        result = self._zeros(value.dtype)
        local_tensor(result).copy_(local_tensor(value))
        return result


def local_tensor(tensor: DTensor) -> torch.Tensor:
    """The local piece as a plain tensor, without autograd's copy; waits for a collective that still runs."""
    local = tensor._local_tensor
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local
