"""How parameters are spread over ranks: the layouts that the conformance harness crosses with the optimizers.

A new layout is one subclass of ``Layout``, entered in ``LAYOUTS``; ``tests/wrapped.py`` has those of whole modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from tests.meshes import pairs_of, world_mesh


class Layout:
    """How parameters are spread over the ranks. Subclasses live on the ranks; ``name`` and ``worlds`` are the table."""

    name = ""
    worlds: tuple[int, ...] = ()
    options: Mapping[str, Any] = MappingProxyType({})  # what the optimizer needs to know
    whole_parameters = False  # every rank holds whole parameters and only the state is cut
    skips = True  # whether one parameter alone can be without a gradient
    empty_pieces = True  # whether a piece without elements has a gradient, hence state, as other pieces have

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that the optimizer gets."""
        raise NotImplementedError

    def give(self, params: dict[str, Tensor], grads: dict[str, Tensor | None]) -> None:
        """Sets ``grad`` of every parameter to this rank's part of the global gradient."""
        raise NotImplementedError

    def piece(self, name: str, p: Tensor, values: Tensor) -> Tensor:
        """This rank's part of ``values``, cut as the state of the parameter ``p``."""
        raise NotImplementedError

    def local(self, name: str, held: Tensor) -> Tensor:
        """The part of a tensor that the optimizer keeps (parameter or state) which belongs to one name."""
        return held

    def alike(self, p: Tensor, state: Tensor) -> bool:
        """Whether a state tensor is laid out as it should be for ``p``."""
        return isinstance(state, DTensor) and (state.shape, state.placements, state.device_mesh) == (
            p.shape,
            p.placements,
            p.device_mesh,
        )


class Plain(Layout):
    """Every rank trains alone; the optimizer must not notice that a process group exists."""

    name, worlds = "plain", (1, 2)
    whole_parameters = True

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}

    def give(self, params: dict[str, Tensor], grads: dict[str, Tensor | None]) -> None:
        for name, grad in grads.items():
            params[name].grad = None if grad is None else grad.clone()

    def piece(self, name: str, p: Tensor, values: Tensor) -> Tensor:
        return values

    def alike(self, p: Tensor, state: Tensor) -> bool:
        return not isinstance(state, DTensor) and state.shape == p.shape


class Zero1(Plain):
    """Replicated parameters, state and update partitioned by rows over a group."""

    name, worlds = "zero1", (1, 2, 3, 4)

    def __init__(self) -> None:
        self.group = dist.group.WORLD
        self.options = {"shard_group": self.group}

    def piece(self, name: str, p: Tensor, values: Tensor) -> Tensor:
        rank, ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        rows = values.chunk(ranks) if values.ndim else (values,) * ranks
        return rows[rank] if rank < len(rows) else values[:0]

    def alike(self, p: Tensor, state: Tensor) -> bool:
        placement = Shard(0) if p.ndim else Replicate()
        return isinstance(state, DTensor) and (state.shape, state.placements) == (p.shape, (placement,))


class Zero1Pairs(Zero1):
    """Two groups of two, each partitioning state over its own ranks only."""

    name, worlds = "zero1-pairs", (4,)

    def __init__(self) -> None:
        self.group = pairs_of()
        self.options = {"shard_group": self.group}


class Zero1Strided(Zero1):
    """Parameters that lie transposed or channels-last in memory."""

    name, worlds = "zero1-strided", (3,)

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.nn.Parameter(value.mT.contiguous().mT if value.ndim > 1 else value.clone())
            for name, value in values.items()
        }


class Distributed(Layout):
    """DTensor parameters on a mesh; subclasses say which, and how a shape is cut."""

    mesh_shape: tuple[int, ...] | None = None  # None: one axis with all ranks

    def __init__(self) -> None:
        self.mesh = world_mesh(self.mesh_shape or (dist.get_world_size(),))

    def place(self, shape: tuple[int, ...]) -> list[Placement]:
        raise NotImplementedError

    def cut(self, values: Tensor) -> DTensor:
        return distribute_tensor(values, self.mesh, self.place(tuple(values.shape)), src_data_rank=None)

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.nn.Parameter(self.cut(value.clone())) for name, value in values.items()}

    def give(self, params: dict[str, Tensor], grads: dict[str, Tensor | None]) -> None:
        for name, grad in grads.items():
            params[name].grad = None if grad is None else self.cut(grad.clone())

    def piece(self, name: str, p: Tensor, values: Tensor) -> Tensor:
        return self.cut(values).to_local()


class Rows(Distributed):
    """What FSDP2 makes of parameters, for any shape: Shard(0) on one axis."""

    name, worlds = "rows", (1, 2, 3, 4)

    def place(self, shape: tuple[int, ...]) -> list[Placement]:
        return [Shard(0) if shape else Replicate()]


class Columns(Distributed):
    """Shard(1) where there is a second dimension (row-wise tensor parallelism)."""

    name, worlds = "columns", (2, 3)

    def place(self, shape: tuple[int, ...]) -> list[Placement]:
        return [Shard(1) if len(shape) > 1 else Shard(0) if shape else Replicate()]


class Hsdp(Distributed):
    """Two replicas of two shards."""

    name, worlds, mesh_shape = "hsdp", (4,), (2, 2)

    def place(self, shape: tuple[int, ...]) -> list[Placement]:
        return [Replicate(), Shard(0) if shape else Replicate()]


class Grid(Distributed):
    """Both dimensions cut; vectors are cut along one axis and replicated along the other."""

    name, worlds, mesh_shape = "grid", (4,), (2, 2)

    def place(self, shape: tuple[int, ...]) -> list[Placement]:
        return [Shard(0) if shape else Replicate(), Shard(1) if len(shape) > 1 else Replicate()]


class Mixture(Distributed):
    """Several meshes in one optimizer, as FSDP2 with tensor parallelism has them."""

    name, worlds = "mixture", (4,)

    def __init__(self) -> None:
        self.line = world_mesh((4,))
        self.square = world_mesh((2, 2), ("data", "model"))

    def cut(self, values: Tensor) -> DTensor:
        mesh, placements = [
            (self.square["data"], [Replicate()]),
            (self.line, [Shard(0)]),
            (self.square, [Shard(0), Shard(1)]),
            (self.square, [Shard(1), Replicate()]),
            (self.square["model"], [Shard(2)]),
        ][values.ndim]
        return distribute_tensor(values, mesh, placements, src_data_rank=None)


class Weights(torch.nn.Module):
    """Holds parameters; its loss is the sum of each parameter times a constant, which is then its gradient."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, torch.nn.Parameter(value.clone()))

    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        return torch.stack([(getattr(self, name) * factor).sum() for name, factor in factors.items()]).sum()


BARE = (Plain, Rows, Columns, Hsdp, Grid, Mixture, Zero1, Zero1Pairs, Zero1Strided)
