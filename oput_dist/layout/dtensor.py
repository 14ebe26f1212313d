"""DTensor parameters: FSDP2, HSDP, tensor parallel, and their products, on any mesh."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from .base import Layout, LayoutError
from .boxes import Index, box_of
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

        self.boxes = box_of(_indices(self.shape, self._mesh, self._placements, local.shape))

    def vector(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        local = torch.zeros(shape, dtype=dtype, device=self._device)
        replicas = [Replicate()] * self._mesh.ndim
        return DTensor.from_local(local, self._mesh, replicas, run_check=False)

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


def _indices(
    shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement], local_shape: torch.Size
) -> list[Index]:
    """The global indices of the local piece along each axis.

    Sharding an axis is a map of its indices to ranks that torch knows; so the indices themselves are sharded, as a
    1-d tensor, in the way in which the axis is.
    """
    result: list[Index] = []
    for axis, (size, local_size) in enumerate(zip(shape, local_shape, strict=True)):
        if size == local_size:
            result.append(slice(0, size))
            continue
        mine = torch.arange(size, device="cpu")
        coordinates = mesh.get_coordinate()
        assert coordinates is not None
        for dim in _order_of_cuts(placements, axis):
            parts = list(mine.chunk(mesh.size(dim))) if len(mine) else []
            rank = coordinates[dim]
            mine = parts[rank] if rank < len(parts) else mine[:0]
        assert len(mine) == local_size
        first = int(mine[0]) if len(mine) else 0
        contiguous = torch.equal(mine, torch.arange(first, first + len(mine)))
        result.append(slice(first, first + len(mine)) if contiguous else mine)
    return result


def _order_of_cuts(placements: Sequence[Placement], axis: int) -> list[int]:
    """The mesh dimensions that cut an axis, in the order of the cuts: a strided shard is cut after the plain ones."""
    strided = [dim for dim, p in enumerate(placements) if _strided(p, axis)]
    return [dim for dim, p in enumerate(placements) if p.is_shard(axis) and dim not in strided] + strided


def _strided(placement: Placement, axis: int) -> bool:
    return isinstance(placement, _StridedShard) and placement.dim == axis
