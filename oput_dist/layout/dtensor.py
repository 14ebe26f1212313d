"""DTensor parameters: FSDP2, HSDP, tensor parallel, and their products, on any mesh."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from .base import Layout, LayoutError
from .box import Box, Index, one_box
from .flat import dense_strides

__all__ = ["Distributed", "Sizes", "index_on", "local_tensor", "whole_tensor"]


class Distributed(Layout):
    """A parameter that is a DTensor, with any mixture of shard, strided shard and replicate placements."""

    def __init__(self, parameter: DTensor) -> None:
        self.shape = parameter.shape
        self._stride = parameter.stride()
        self._mesh = parameter.device_mesh
        self._placements = parameter.placements
        self._specs = {parameter.dtype: parameter._spec}
        """What tells DTensors that are laid out like the parameter where they live, by dtype."""
        if any(placement.is_partial() for placement in self._placements):
            raise LayoutError(f"placements {self._placements} of a parameter: partial sums cannot be optimized")
        coordinate = self._mesh.get_coordinate()
        if coordinate is None:
            raise LayoutError(
                f"it is a DTensor on {self._mesh}, which this rank is not part of: give each rank's optimizer only the "
                "parameters whose mesh holds that rank"
            )
        self._coordinate = tuple(coordinate)
        local = local_tensor(parameter)
        self.device, self._local_shape, self._local_strides = local.device, local.shape, dense_strides(local)
        spread = [dim for dim in range(self._mesh.ndim) if self._mesh.size(dim) > 1]
        self._replicated = [dim for dim in spread if self._placements[dim].is_replicate()]
        self.groups = self._groups(dim for dim in spread if dim not in self._replicated)
        self.partial_groups = self._groups(self._replicated)

    def _groups(self, dims: Iterable[int]) -> tuple[dist.ProcessGroup, ...]:
        return tuple(self._mesh.get_group(dim) for dim in dims)

    @functools.cached_property
    def sharers(self) -> tuple[dist.ProcessGroup, ...]:
        found = super().sharers
        if len(found) <= 1:
            return found
        if (flattened := _flattened(self._mesh)) is not None:
            return (flattened,)
        for dim in range(self._mesh.ndim):
            if bool((self._mesh.mesh.diff(dim=dim) < 0).any()):
                raise LayoutError(
                    f"the ranks of {self._mesh} do not ascend along each dimension, so that nothing can be sent along "
                    "one after the other: make the mesh of ranks in order, or have all ranks flatten it before this "
                    "optimizer steps: mesh._flatten()"
                )
        return self._groups(dim for dim in range(self._mesh.ndim) if self._mesh.size(dim) > 1)

    @functools.cached_property
    def boxes(self) -> tuple[Box, ...]:
        index = index_on(self.shape, self._mesh, self._placements, self._coordinate)
        sizes = tuple(_length(part) for part in index)
        if prod(sizes) != self._local_shape.numel():
            raise LayoutError(
                f"placements {self._placements} on {self._mesh} give this rank {sizes} of shape {tuple(self.shape)}, "
                f"but it holds {tuple(self._local_shape)}"
            )
        return one_box(index, sizes, self._local_strides)

    def piece(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor):
            raise LayoutError("a plain tensor where a DTensor is needed: gradients must be placed like their parameter")
        if tensor.placements != self._placements:
            # What is partial was added up before (see partial), so that this is local for gradients in a step.
            tensor = tensor.redistribute(self._mesh, self._placements)
        return local_tensor(tensor)

    def partial(self, gradient: torch.Tensor) -> tuple[float, ...]:
        if not isinstance(gradient, DTensor) or self._far_from(gradient):
            return super().partial(gradient)
        return tuple(_share(gradient.placements[dim], self._mesh.size(dim)) for dim in self._replicated)

    def partial_piece(self, gradient: torch.Tensor) -> torch.Tensor:
        assert isinstance(gradient, DTensor)
        wanted = [
            there if _share(there, 1) and here.is_replicate() else here
            for here, there in zip(self._placements, gradient.placements, strict=True)
        ]
        return local_tensor(gradient.redistribute(self._mesh, wanted))

    def fault_of(self, gradient: torch.Tensor) -> str | None:
        if isinstance(gradient, DTensor):
            alike = gradient.device_mesh is self._mesh and gradient.placements == self._placements
            if alike or not self._far_from(gradient):
                return None
        where = (
            f"placed as {gradient.placements} on {gradient.device_mesh}" if isinstance(gradient, DTensor) else "here"
        )
        return (
            f"{where}, but the parameter is placed as {self._placements} on {self._mesh}: redistribute the gradient "
            "before the step"
        )

    def _far_from(self, gradient: DTensor) -> bool:
        """Whether laying out a gradient like the parameter takes an exchange beyond that of partial sums.

        Such an exchange would hang if another rank had no gradient.
        """
        if gradient.device_mesh != self._mesh:
            return True
        return any(
            there != here and not there.is_replicate() and not (here.is_replicate() and _share(there, 1))
            for dim, (here, there) in enumerate(zip(self._placements, gradient.placements, strict=True))
            if self._mesh.size(dim) > 1
        )

    def zeros(self, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        return self._zeros(dtype, device or self.device)

    def _zeros(self, dtype: torch.dtype, device: torch.device) -> DTensor:
        local = torch.empty_strided(self._local_shape, self._local_strides, dtype=dtype, device=device).zero_()
        if dtype not in self._specs:  # of nothing: from_local would move what is elsewhere to the mesh's device
            self._specs[dtype] = self.placed(torch.empty_like(local, device="meta"))._spec
        return DTensor(local, self._specs[dtype], requires_grad=False)  # type: ignore[no-untyped-call]

    def placed(self, local: torch.Tensor) -> DTensor:
        """The DTensor that is laid out like the parameter and of which this rank holds ``local``."""
        return DTensor.from_local(
            local, self._mesh, self._placements, run_check=False, shape=self.shape, stride=self._stride
        )

    def piece_of_state(self, value: torch.Tensor) -> torch.Tensor:
        return local_tensor(value) if isinstance(value, DTensor) else value

    def adopt(self, value: torch.Tensor) -> torch.Tensor:
        if value.shape != self.shape:
            raise LayoutError(f"state of shape {tuple(value.shape)} for a parameter of shape {tuple(self.shape)}")
        if not isinstance(value, DTensor):
            value = self._everywhere(value.to(self.device))
        if value.device_mesh != self._mesh:
            raise LayoutError(f"state on the mesh {value.device_mesh} for a parameter on {self._mesh}")
        if value.placements != self._placements:
            near: DTensor = value.to(self.device)  # type: ignore[assignment]  # host tensors may not be sent
            value = near.redistribute(self._mesh, self._placements)
        result = self._zeros(value.dtype, self.device)
        local_tensor(result).copy_(local_tensor(value))
        return result

    def vector(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return self._everywhere(super().vector(shape, dtype))

    def memory_of_vector(self, value: torch.Tensor) -> torch.Tensor:
        return local_tensor(value) if isinstance(value, DTensor) else value

    def spread(self, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        placements = [Shard(0)] * self._mesh.ndim
        (index,) = index_on((length,), self._mesh, placements, self._coordinate)
        local = torch.zeros(_length(index), dtype=dtype, device=self.device)
        tensor = DTensor.from_local(
            local, self._mesh, placements, run_check=False, shape=torch.Size([length]), stride=(1,)
        )
        return tensor, local, index.start if isinstance(index, slice) else 0

    def _everywhere(self, whole: torch.Tensor) -> DTensor:
        return DTensor.from_local(whole, self._mesh, [Replicate()] * self._mesh.ndim, run_check=False)


def _flattened(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The group of all ranks of a mesh, if ``_flatten()`` made one: as it takes all ranks of the world, not here."""
    root = getattr(mesh, "_get_root_mesh", lambda: mesh)()
    ranks = sorted(mesh.mesh.flatten().tolist())
    groups = [flat.get_group() for flat in getattr(root, "_flatten_mapping", {}).values() if flat.ndim == 1]
    return next((group for group in groups if sorted(dist.get_process_group_ranks(group)) == ranks), None)


def _share(placement: Placement, ranks: int) -> float:
    """What a rank's partial value counts for in the sum over ``ranks``; 0 for what is no partial sum."""
    if not placement.is_partial():
        return 0.0
    return {"sum": 1.0, "avg": 1.0 / ranks}.get(getattr(placement, "reduce_op", "sum"), 0.0)


def local_tensor(tensor: DTensor) -> torch.Tensor:
    """The local piece as a plain tensor, without autograd's copy; waits for a collective that still runs."""
    local = tensor._local_tensor
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def whole_tensor(tensor: DTensor) -> torch.Tensor:
    """The whole, also of one whose pieces are on the CPU while its ranks communicate on GPUs."""
    near: DTensor = tensor.to(tensor.device_mesh.device_type)  # type: ignore[assignment]
    return near.full_tensor()


# --------------------------------------------------------------------------------------------- which indices a rank has


Indices = TypeVar("Indices", torch.Tensor, range)


class _Cut(NamedTuple):
    """One mesh dimension that cuts a tensor dimension."""

    ranks: int
    strides: int
    """Into how many parts later mesh dimensions cut the dimension first (``_StridedShard``); 1 for ``Shard``."""
    mesh_dim: int


class Sizes(Protocol):
    """What cutting a tensor needs of a mesh."""

    def size(self, mesh_dim: int | None = None) -> int:
        """Ranks along a dimension; all, for None."""
        ...


def index_on(
    shape: Sequence[int], mesh: Sizes, placements: Sequence[Placement], coordinate: Sequence[int]
) -> tuple[Index, ...]:
    """For each dimension the global indices that the rank at ``coordinate`` of the mesh holds."""
    found: list[Index] = []
    for dim, size in enumerate(shape):
        cuts = [
            _Cut(mesh.size(mesh_dim), getattr(placement, "split_factor", 1), mesh_dim)
            for mesh_dim, placement in enumerate(placements)
            if getattr(placement, "dim", None) == dim
        ]
        if all(cut.strides == 1 for cut in cuts):
            found.append(_consecutive(size, cuts, coordinate))
            continue
        found.append(_as_slice(_from_the_left(size, cuts, dict(enumerate(coordinate)))))
        if not _unambiguous(size, cuts):
            raise LayoutError(
                f"dimension {dim} of size {size} does not divide evenly by placements {tuple(placements)}: which "
                "indices a rank holds depends on the order of cutting; choose a size that the ranks divide"
            )
    if sum(isinstance(part, torch.Tensor) for part in found) > 1:
        raise LayoutError(f"placements {tuple(placements)}: two dimensions that are both cut in strides")
    return tuple(found)


def _consecutive(size: int, cuts: Sequence[_Cut], coordinate: Sequence[int]) -> slice:
    """The indices where no cut is in strides."""
    index = range(size)
    for cut in cuts:
        index = _part(index, cut.ranks, coordinate[cut.mesh_dim])
    return slice(index.start, index.stop) if index else slice(0, 0)


def _from_the_left(size: int, cuts: Sequence[_Cut], coordinate: Mapping[int, int]) -> torch.Tensor:
    """The indices as DTensor defines them: mesh dimensions cut one after the other."""
    index = torch.arange(size)
    for cut in cuts:
        parts = [_part(index, cut.strides, i) for i in range(cut.strides)]
        index = torch.cat([_part(part, cut.ranks, coordinate[cut.mesh_dim]) for part in parts])
    return index


def _from_the_right(size: int, cuts: Sequence[_Cut], coordinate: Mapping[int, int]) -> torch.Tensor:
    """The indices as FSDP2 makes them: what tensor parallelism cut is cut again."""
    index = torch.arange(size)
    for cut in [*(c for c in cuts if c.strides == 1), *(c for c in reversed(cuts) if c.strides > 1)]:
        index = _part(index, cut.ranks, coordinate[cut.mesh_dim])
    return index


def _unambiguous(size: int, cuts: Sequence[_Cut]) -> bool:
    """Whether both ways of cutting give every rank the same; they may not if a strided dimension is uneven."""
    if size % prod(cut.ranks for cut in cuts) == 0:
        return True
    for ranks in itertools.product(*(range(cut.ranks) for cut in cuts)):
        coordinate = dict(zip((cut.mesh_dim for cut in cuts), ranks, strict=True))
        if not torch.equal(_from_the_left(size, cuts, coordinate), _from_the_right(size, cuts, coordinate)):
            return False
    return True


def _part(index: Indices, parts: int, number: int) -> Indices:
    """One of the parts that ``torch.chunk`` makes, empty where it makes fewer."""
    size = -(-len(index) // parts)
    return index[number * size : (number + 1) * size]


def _as_slice(index: torch.Tensor) -> Index:
    """A range of indices as a slice."""
    if not len(index):
        return slice(0, 0)
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def _length(part: Index) -> int:
    return len(part) if isinstance(part, torch.Tensor) else part.stop - part.start
