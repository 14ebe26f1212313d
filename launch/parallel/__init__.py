"""Every parallelism of train.py: a function each that spreads a model over a mesh, and what is common to all."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp import ShardingStrategy as Strategy
from torch.nn.parallel import DistributedDataParallel

from launch.model import GPT
from launch.parallel import ddp, fsdp1, fsdp2, tensor, zero
from launch.parallel.grid import Grid

__all__ = ["PARALLEL", "Grid", "backward", "casts", "gradient_exchange", "optimizer_step", "spread", "unwrapped"]


def alone(model: GPT, mesh: None, bf16: bool) -> nn.Module:
    """One process. Computes in bf16 only under autocast, so `bf16` changes nothing here."""
    return model


# Takes the model, the mesh (None without axes) and whether to compute in bf16; returns the module to call in training.
Recipe = Callable[[GPT, Any, bool], nn.Module]
GRAD_OP: dict[str, Any] = {"strategy": Strategy.SHARD_GRAD_OP}
HYBRID: dict[str, Any] = {"strategy": Strategy.HYBRID_SHARD}
FLAT: dict[str, Any] = {"use_orig_params": False}

# By name: the axes of the mesh, outermost first, and the recipe.
PARALLEL: dict[str, tuple[tuple[str, ...], Recipe]] = {
    "single": ((), alone),
    "ddp": (("replica",), ddp.replicate),
    "zero1": (("replica",), ddp.replicate),  # the optimizer does the rest: see build_optimizer
    "fsdp2": (("shard",), fsdp2.shard),
    "hsdp": (("replica", "shard"), fsdp2.shard),
    "tp": (("tensor",), tensor.cut),
    "fsdp2-tp": (("shard", "tensor"), tensor.shard_and_cut),
    "fsdp1": (("shard",), fsdp1.shard),
    "fsdp1-flat": (("shard",), partial(fsdp1.shard, **FLAT)),
    "fsdp1-grad-op": (("shard",), partial(fsdp1.shard, **GRAD_OP)),
    "fsdp1-grad-op-flat": (("shard",), partial(fsdp1.shard, **GRAD_OP, **FLAT)),
    "fsdp1-hybrid": (("replica", "shard"), partial(fsdp1.shard, **HYBRID)),
    "fsdp1-hybrid-flat": (("replica", "shard"), partial(fsdp1.shard, **HYBRID, **FLAT)),
    # DeepSpeed's, whose engine holds the optimizer too: see zero.engine
    "zero1-ds": (("replica",), alone),
    "zero2-ds": (("replica",), alone),
    "zero3-ds": (("replica",), alone),
}


def spread(model: GPT, parallel: str, grid: Grid, device: torch.device, bf16: bool) -> nn.Module:
    """The module to call in training. FSDP and tensor parallelism change `model` itself."""
    axes, recipe = PARALLEL[parallel]
    mesh = init_device_mesh(device.type, grid.sizes, mesh_dim_names=axes) if axes else None
    return recipe(model, mesh, bf16)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module whose parameters are trained and saved: a DistributedDataParallel is for the backward pass only, and
    so is an engine of DeepSpeed."""
    inner: Any = module.module if isinstance(module, DistributedDataParallel) or zero.is_engine(module) else module
    whole: nn.Module = inner
    return whole


def casts(module: nn.Module) -> bool:
    """Whether `module` computes in the dtype it was told by itself, so that it needs no autocast."""
    return isinstance(module, FSDPModule | FullyShardedDataParallel) or zero.is_engine(module)


def backward(module: nn.Module, loss: Tensor, parts: int) -> None:
    """The backward pass of one of `parts` micro-batches, given its own mean loss."""
    if zero.is_engine(module):
        module.backward(loss / parts)  # type: ignore[operator]
    else:
        (loss / parts).backward()


def optimizer_step(module: nn.Module, optimizer: Any, gradients: Callable[[], Tensor]) -> Tensor:
    """One step, with `gradients` as its closure; an engine of DeepSpeed runs the optimizer itself."""
    if not zero.is_engine(module):
        stepped: Tensor = optimizer.step(gradients)
        return stepped
    loss = gradients()
    module.step()  # type: ignore[operator]
    return loss


def gradient_exchange(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around one micro-batch: gradients travel with the last one of a step only."""
    if zero.is_engine(module):
        module.set_gradient_accumulation_boundary(last)  # type: ignore[operator]
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel | FullyShardedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()
