"""The ranks that are planned for, and how each layout spreads parameters over them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from math import prod

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard

from oput_dist.collectives import NamedRanks
from oput_dist.layout import Layout
from oput_dist.layout.imagined import Imagined, ImaginedMesh
from oput_dist.layout.plain import Plain

__all__ = ["LAYOUTS", "World", "world_of"]

LAYOUTS = {"ddp": 1, "zero1": 1, "fsdp2": 1, "hsdp": 2}
"""Dimensions of the mesh of each: replicas; replicas with partitioned state; shards; replicas of shards."""


class World:
    """Ranks that hold a model together.

    Args:
        layout: one of :data:`LAYOUTS`.
        sizes: of the mesh.
    """

    def __init__(self, layout: str, sizes: tuple[int, ...]) -> None:
        self.layout, self.sizes, self.ranks = layout, sizes, prod(sizes)
        self.everyone = NamedRanks(tuple(range(self.ranks)))
        steps = [prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
        groups = (NamedRanks(tuple(range(0, size * step, step))) for size, step in zip(sizes, steps, strict=True))
        self._mesh = ImaginedMesh(sizes, tuple(groups))
        self.layout_of = functools.cache(self._layout_of)
        self._pieces = functools.cache(self._pieces_of)

    @property
    def replicated(self) -> bool:
        """Whether every rank holds and updates everything, but for work on whole matrices, which is shared."""
        return self.layout == "ddp"

    def _layout_of(self, shape: torch.Size, rank: int) -> Layout:
        """Where a rank has which piece of a parameter."""
        if not shape and self.layout in ("fsdp2", "hsdp"):
            raise ValueError(
                f"a parameter without axes does not fit layout={self.layout!r}: fully_shard takes no scalar"
            )
        if self.replicated:
            return Plain(torch.empty(shape, device="meta"))
        return Imagined(shape, self._mesh, self._placements(shape), rank, self.layout == "zero1")

    def pieces(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """The pieces of a parameter on all ranks, without memory."""
        return self._pieces(parameter.shape, parameter.dtype)

    def _pieces_of(self, shape: torch.Size, dtype: torch.dtype) -> list[torch.Tensor]:
        return [self.layout_of(shape, rank).zeros(dtype) for rank in range(self.ranks)]

    def _placements(self, shape: Sequence[int]) -> tuple[Placement, ...]:
        """As FSDP2 and ZeRO-1 place a parameter: cut in rows, if it has any."""
        rows = Shard(0) if shape else Replicate()
        return (rows,) if len(self.sizes) == 1 else (Replicate(), rows)


def world_of(mesh: int | Sequence[int] | DeviceMesh, layout: str | None) -> World:
    """The ranks of a mesh. See :func:`oput_dist.plan`.

    Raises:
        ValueError: for a mesh that is none, or does not fit the layout.
    """
    sizes = tuple(mesh.shape) if isinstance(mesh, DeviceMesh) else (mesh,) if isinstance(mesh, int) else tuple(mesh)
    if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ValueError(f"mesh={mesh!r} is not allowed: must be a number of ranks >= 1, or those of each dimension")
    if layout is None:
        layout = "fsdp2" if len(sizes) == 1 else "hsdp"
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is not allowed: must be one of {', '.join(LAYOUTS)}")
    if len(sizes) != LAYOUTS[layout]:
        needed = "a number of ranks" if LAYOUTS[layout] == 1 else "(replicas, shards)"
        raise ValueError(f"mesh={sizes} does not fit layout={layout!r}, which needs {needed}")
    return _world(layout, sizes)


@functools.lru_cache(maxsize=2)  # one after the other is mostly asked for the same ranks
def _world(layout: str, sizes: tuple[int, ...]) -> World:
    return World(layout, sizes)
