"""Whole modules under PyTorch's own wrappers, with gradients from backward: layouts for the conformance harness."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.layouts import BARE, Layout, Weights, Zero1
from tests.meshes import world_mesh


def disagreeing(grads: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """What each rank takes for the gradients: ranks 0 and 1 differ, and the mean over ranks is right.

    Scalars are the same everywhere, since FSDP does not reduce them.
    """
    sign = {0: 1.0, 1: -1.0}.get(dist.get_rank(), 0.0) if dist.get_world_size() > 1 else 0.0
    return {name: grad + sign * bool(grad.ndim) for name, grad in grads.items() if grad is not None}


class Ddp(Layout):
    """DistributedDataParallel, whose buckets average the gradients. The optimizer knows the module, so that replicas
    share whole matrices."""

    name, worlds = "ddp", (2, 4)  # it multiplies by 1/n, which is not exact for 3
    whole_parameters = True

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        self.module = DistributedDataParallel(Weights(values), find_unused_parameters=True)
        self.options = {**self.options, "module": self.module}
        return {name.removeprefix("module."): p for name, p in self.module.named_parameters()}

    def give(self, params: dict[str, Tensor], grads: dict[str, Tensor | None]) -> None:
        self.module.zero_grad()
        self.module(disagreeing(grads)).backward()

    def piece(self, name: str, p: Tensor, values: Tensor) -> Tensor:
        return values

    def alike(self, p: Tensor, state: Tensor) -> bool:
        return not isinstance(state, DTensor) and state.shape == p.shape


class DdpZero1(Ddp):
    """The same, with state and update partitioned."""

    name, worlds = "ddp-zero1", (2,)

    def __init__(self) -> None:
        self.group = dist.group.WORLD
        self.options = {"shard_group": self.group}

    piece, alike = Zero1.piece, Zero1.alike


class Fsdp2(Layout):
    """A real module under ``fully_shard``: gradients come from backward and are reduced over ranks that disagree.

    FSDP2 refuses 0-d parameters, so the scalar stays outside of it as one of the ``ignored_params``.
    """

    name, worlds = "fsdp2", (2, 3, 4)

    def __init__(self) -> None:
        self.mesh = world_mesh((dist.get_world_size(),))

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        self.module = Weights(values)
        scalars = {p for p in self.module.parameters() if not p.ndim}
        fully_shard(self.module, mesh=self.mesh, ignored_params=scalars)
        return dict(self.module.named_parameters())

    def give(self, params: dict[str, Tensor], grads: dict[str, Tensor | None]) -> None:
        self.module.zero_grad()
        self.module(disagreeing(grads)).backward()

    def piece(self, name: str, p: Tensor, values: Tensor) -> Tensor:
        if not isinstance(p, DTensor):
            return values
        return distribute_tensor(values, self.mesh, p.placements, src_data_rank=None).to_local()

    def alike(self, p: Tensor, state: Tensor) -> bool:
        return super().alike(p, state) if isinstance(p, DTensor) else state.shape == p.shape


class Hsdp2(Fsdp2):
    """FSDP2 with two replicas of two shards."""

    name, worlds = "fsdp2-hsdp", (4,)

    def __init__(self) -> None:
        self.mesh = world_mesh((2, 2), ("replicate", "shard"))


COLUMNWISE, ROWWISE = ("matrix", "short"), ("square", "row")  # ROWWISE weights are Shard(1)


class Cut(nn.Module):
    """Linear layers for tensor parallelism, a weight that it replicates and reads in parts, and other parameters."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.linears = nn.ModuleDict()
        for name in (*COLUMNWISE, *ROWWISE):
            rows, columns = values[name].shape
            self.linears[name] = nn.Linear(columns, rows, bias=False, dtype=values[name].dtype)
            self.linears[name].weight = nn.Parameter(values[name].clone())
        self.vector = nn.Parameter(values["vector"].clone())
        self.rest = Weights({k: v for k, v in values.items() if k not in self.linears and k != "vector"})

    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        terms = []
        for name, linear in self.linears.items():  # an identity matrix makes the gradient of the weight any matrix
            terms.append((linear(torch.eye(linear.in_features, dtype=factors[name].dtype)) * factors[name].mT).sum())
        if "vector" in factors:
            terms.append((self.vector * self.parts(factors["vector"])).sum())
        rest = {name: factor for name, factor in factors.items() if hasattr(self.rest, name)}
        terms.append(self.rest(rest))
        return torch.stack([t.full_tensor() if isinstance(t, DTensor) else t for t in terms]).sum()

    def parts(self, factor: Tensor) -> Tensor:
        """Rows, one for each rank, that add up to ``factor``: the vector's gradient is then a partial sum."""
        mesh: DeviceMesh = self.mesh
        rows = torch.zeros(mesh.size(), len(factor), dtype=factor.dtype)
        rows[0] += factor + 2
        rows[-1] -= 2
        return distribute_tensor(rows, mesh, [Shard(0)], src_data_rank=None)


def tensor_parallel(values: dict[str, Tensor], mesh: DeviceMesh) -> Cut:
    """The module with its linear layers cut over a mesh, and the vector replicated."""
    module = Cut(values)
    column = {f"linears.{name}": ColwiseParallel(output_layouts=Replicate()) for name in COLUMNWISE}
    row = {f"linears.{name}": RowwiseParallel(input_layouts=Replicate()) for name in ROWWISE}
    parallelize_module(module, mesh, {**column, **row})
    module.vector = nn.Parameter(distribute_tensor(module.vector.detach(), mesh, [Replicate()], src_data_rank=None))
    module.mesh = mesh
    return module


class Tp(Layout):
    """Tensor parallelism: DTensors on one mesh beside plain parameters, and one gradient that is a partial sum."""

    name, worlds = "tp", (2, 3, 4)

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        self.module = self.wrap(values)
        named = {name.removesuffix(".weight").rpartition(".")[2]: p for name, p in self.module.named_parameters()}
        return {name: named[name] for name in values}

    def wrap(self, values: dict[str, Tensor]) -> nn.Module:
        return tensor_parallel(values, world_mesh((dist.get_world_size(),)))

    def factors(self, grads: dict[str, Tensor | None]) -> dict[str, Tensor]:
        """What this rank takes for the gradients."""
        return {name: grad for name, grad in grads.items() if grad is not None}

    def give(self, params: dict[str, Tensor], grads: dict[str, Tensor | None]) -> None:
        self.module.zero_grad()
        self.module(self.factors(grads)).backward()

    def piece(self, name: str, p: Tensor, values: Tensor) -> Tensor:
        if not isinstance(p, DTensor):
            return values
        return distribute_tensor(values, p.device_mesh, p.placements, src_data_rank=None).to_local()

    def alike(self, p: Tensor, state: Tensor) -> bool:
        return super().alike(p, state) if isinstance(p, DTensor) else state.shape == p.shape


class Fsdp2Tp(Tp):
    """FSDP2 over tensor parallelism: strided shards, two meshes, and a scalar that FSDP2 ignores."""

    name, worlds = "fsdp2-tp", (4,)

    def wrap(self, values: dict[str, Tensor]) -> nn.Module:
        self.mesh = world_mesh((2, 2), ("data", "model"))
        module = tensor_parallel(values, self.mesh["model"])
        return fully_shard(module, mesh=self.mesh["data"], ignored_params={module.rest.scalar})

    def factors(self, grads: dict[str, Tensor | None]) -> dict[str, Tensor]:
        sign = 1.0 - 2.0 * self.mesh.get_local_rank("data")
        return {name: grad + sign * bool(grad.ndim) for name, grad in grads.items() if grad is not None}


class Halves(nn.Module):
    """The two parameter groups of the harness as two modules, so that each can be a unit of its own."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        names = list(values)
        self.even = Weights({name: values[name] for name in names[0::2]})
        self.odd = Weights({name: values[name] for name in names[1::2]})

    def forward(self, factors: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), dtype=next(iter(factors.values())).dtype)
        for half in (self.even, self.odd):
            total = total + half({name: factor for name, factor in factors.items() if hasattr(half, name)})
        return total


class Fsdp1(Layout):
    """FullyShardedDataParallel, one unit inside another; rows straddle ranks. It ignores the scalar."""

    name, worlds = "fsdp1", (2, 3, 4)
    strategy = ShardingStrategy.FULL_SHARD
    use_orig_params = True
    empty_pieces = False

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        halves = Halves(values)
        scalar = [p for p in halves.parameters() if not p.ndim]
        options: dict[str, Any] = {"device_id": torch.device("cpu"), "use_orig_params": self.use_orig_params}
        options |= {"sharding_strategy": self.strategy, "ignored_states": scalar}
        if self.strategy is ShardingStrategy.HYBRID_SHARD:
            options["device_mesh"] = world_mesh((2, dist.get_world_size() // 2))
        halves.odd = FullyShardedDataParallel(halves.odd, **options)
        self.module = FullyShardedDataParallel(halves, **options)
        self.options = {"module": self.module}
        found = {name.rpartition(".")[2]: p for name, p in self.module.named_parameters()}
        self.ranges: dict[str, tuple[slice, slice]] = {}  # where each name lies in its tensor, and in the original
        for unit in FullyShardedDataParallel.fsdp_modules(self.module):
            flat = unit._handle.flat_param
            for name, info in zip(flat._fqns, flat._shard_param_infos, strict=True):
                name = name.rpartition(".")[2]
                here = slice(info.offset_in_shard, info.offset_in_shard + info.numel_in_shard) if info[0] else slice(0)
                there = slice(info.intra_param_start_idx, info.intra_param_end_idx + 1) if info[0] else slice(0)
                if self.use_orig_params:
                    here = slice(None)
                else:
                    found[name] = flat
                self.ranges[name] = (here, there)
        return {name: found[name] for name in values}

    def give(self, params: dict[str, Tensor], grads: dict[str, Tensor | None]) -> None:
        self.module.zero_grad()
        self.module(disagreeing(grads)).backward()
        for name, grad in grads.items():  # FSDP1 gives zeros to what took no part
            if grad is None:
                params[name].grad = None

    def local(self, name: str, held: Tensor) -> Tensor:
        return held[self.ranges[name][0]] if name in self.ranges else held

    def piece(self, name: str, p: Tensor, values: Tensor) -> Tensor:
        return values.reshape(-1)[self.ranges[name][1]] if name in self.ranges else values

    def alike(self, p: Tensor, state: Tensor) -> bool:
        return not isinstance(state, DTensor) and state.shape == p.shape


class Fsdp1Grad(Fsdp1):
    """Parameters stay whole between forward and backward."""

    name, worlds, strategy = "fsdp1-grad", (2,), ShardingStrategy.SHARD_GRAD_OP


class Fsdp1Hybrid(Fsdp1):
    """Two replicas of two shards."""

    name, worlds, strategy = "fsdp1-hybrid", (4,), ShardingStrategy.HYBRID_SHARD


class Fsdp1Flat(Fsdp1):
    """One flat parameter for each unit, so that all parameters in it have one state, one counter and one gradient."""

    name, worlds = "fsdp1-flat", (2, 3)
    use_orig_params, skips, empty_pieces = False, False, True


class Fsdp1FlatGrad(Fsdp1Flat):
    """Parameters stay whole between forward and backward."""

    name, worlds, strategy = "fsdp1-flat-grad", (3,), ShardingStrategy.SHARD_GRAD_OP


class Fsdp1FlatHybrid(Fsdp1Flat):
    """Two replicas of two shards."""

    name, worlds, strategy = "fsdp1-flat-hybrid", (4,), ShardingStrategy.HYBRID_SHARD


WRAPPED = (Ddp, DdpZero1, Fsdp2, Hsdp2, Tp, Fsdp2Tp)
WRAPPED += (Fsdp1, Fsdp1Grad, Fsdp1Hybrid, Fsdp1Flat, Fsdp1FlatGrad, Fsdp1FlatHybrid)
LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (*BARE, *WRAPPED)}
WORLDS = [(layout.name, n) for layout in BARE for n in layout.worlds]
WRAPPED_WORLDS = [(layout.name, n) for layout in WRAPPED for n in layout.worlds]
