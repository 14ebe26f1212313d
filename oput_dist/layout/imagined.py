"""What one rank of a mesh would hold, where neither that mesh nor its ranks exist: for planning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import Placement

from .base import Layout
from .box import Box, one_box
from .dtensor import index_on

__all__ = ["Imagined", "ImaginedMesh"]


@dataclass(frozen=True)
class ImaginedMesh:
    """Ranks in rows, with a group of some kind along each dimension.

    Args:
        sizes: ranks along each dimension.
        groups: what stands for the process group of rank 0 along each dimension.
    """

    sizes: tuple[int, ...]
    groups: tuple[Any, ...]

    def size(self, mesh_dim: int | None = None) -> int:
        """Ranks along a dimension; all, for None."""
        return prod(self.sizes) if mesh_dim is None else self.sizes[mesh_dim]

    def coordinate(self, rank: int) -> tuple[int, ...]:
        """Where a rank is, in row-major order."""
        return tuple(rank // prod(self.sizes[dim + 1 :]) % size for dim, size in enumerate(self.sizes))


class Imagined(Layout):
    """The piece of one rank, as a DTensor placed so on a mesh would have it; its memory is on the meta device.

    Args:
        shape: of the parameter.
        mesh: the mesh.
        placements: on each of its dimensions.
        rank: whose piece it is.
        partitioned: whether every rank keeps the whole parameter, and updates its piece (ZeRO-1).
    """

    def __init__(
        self,
        shape: Sequence[int],
        mesh: ImaginedMesh,
        placements: Sequence[Placement],
        rank: int,
        partitioned: bool = False,
    ) -> None:
        self.shape, self.device = torch.Size(shape), torch.device("meta")
        self.index = index_on(self.shape, mesh, placements, mesh.coordinate(rank))
        self.local = torch.Size(
            len(range(*part.indices(n))) if isinstance(part, slice) else len(part)
            for part, n in zip(self.index, self.shape, strict=True)
        )
        cut = [dim for dim, size in enumerate(mesh.sizes) if size > 1 and not placements[dim].is_replicate()]
        self.groups = tuple(mesh.groups[dim] for dim in cut)
        self.gather_group = mesh.groups[0] if partitioned and mesh.size() > 1 else None

    @property
    def boxes(self) -> tuple[Box, ...]:
        strides = tuple(prod(self.local[dim + 1 :]) for dim in range(len(self.local)))
        return one_box(self.index, self.local, strides)

    def piece(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.new_empty(self.local, device="meta")

    def zeros(self, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        return torch.zeros(self.local, dtype=dtype, device="meta")

    def adopt(self, value: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("nothing is loaded where nothing is held")
