"""Checks of what surrounds the kernels: one rank of a distributed job, and what a GPU's host must not do."""

from __future__ import annotations

import math
import tempfile

import torch
import torch.distributed as dist
from torch import nn

from oput_dist.kernels.boxed import boxed
from oput_dist.kernels.grouped import grouped, segmented_sum

from .checks import (
    LOSS,
    SHAPES,
    Result,
    Setup,
    give_gradients,
    groups,
    kept,
    reference_step,
    snapshot,
    steps_for,
    tensors,
    worst,
)
from .variants import LR, Variant

__all__ = ["no_synchronization", "one_rank", "schedule_compiles_nothing"]


def one_rank(variant: Variant, setup: Setup, layout: str) -> Result:
    """FSDP2 or ``shard_group=`` over NCCL (gloo on a CPU) with one rank, against the plain float64 step."""
    _join(setup)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 130), nn.LayerNorm(130), nn.Linear(130, 7)).to(setup.device, setup.dtype)
    extra = {}
    if layout == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh(setup.device.type, (1,)))
    else:
        extra["shard_group"] = dist.group.WORLD
    params = list(model.parameters())
    optimizer = variant.build(groups(params, LR), backend=setup.backend, **extra)
    error = 0.0
    for step in steps_for(setup):
        optimizer.zero_grad()
        x = torch.randn(64, 33, device=setup.device, dtype=setup.dtype)
        (model(x).square().sum() * (step + 1)).backward()
        before = snapshot(optimizer, params)
        wanted = reference_step(variant, before, kept(optimizer), params, LR)
        optimizer.run(None, LOSS)
        error = max(error, worst(setup, variant, before, snapshot(optimizer, params), wanted))
    return Result(error, f"{dist.get_backend()}, {type(params[0].data).__name__}")


def _join(setup: Setup) -> None:
    if not dist.is_initialized():
        backend = "nccl" if setup.device.type == "cuda" else "gloo"
        path = tempfile.mkdtemp(prefix="rendezvous-")
        dist.init_process_group(backend, init_method=f"file://{path}/file", rank=0, world_size=1)


def no_synchronization(variant: Variant, setup: Setup) -> Result:
    """A step must never wait for the GPU, whichever gradients are missing and whatever lr is."""
    for lr in (LR, torch.tensor(LR), torch.tensor(LR, device=setup.device)):
        params, loss = tensors(setup, SHAPES), torch.tensor(LOSS, device=setup.device)
        optimizer = variant.build(groups(params, LR), backend=setup.backend, lr=lr)
        for step, absent in enumerate((None, 2, None, 2, None)):
            give_gradients(params, step, absent)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
            try:
                optimizer.run(None, loss)
            except RuntimeError as error:
                if "synchroniz" not in str(error):
                    raise
                where = "float" if isinstance(lr, float) else f"tensor on {lr.device}"
                return Result(math.inf, f"lr a {where}, gradient {absent} missing: {error}".splitlines()[0])
            finally:
                torch.cuda.set_sync_debug_mode("default")
    return Result(0.0)


def schedule_compiles_nothing(variant: Variant, setup: Setup) -> Result:
    """A hundred steps, each at another learning rate, of lr a float, then a tensor: no kernel beyond the first ones."""
    params = tensors(setup, SHAPES)
    optimizer = variant.build(groups(params, LR), backend=setup.backend)
    give_gradients(params, 0)
    for _ in range(2):
        optimizer.step()
    before = _compiled()
    for step in range(100):
        for group in optimizer.param_groups:
            lr = LR / (1 + step)
            group["lr"] = lr if step < 50 else torch.tensor(lr, device=setup.device)
        optimizer.step()
    torch.cuda.synchronize()
    return Result(0.0 if _compiled() == before else math.inf, f"{before} kernels before, {_compiled()} after")


def _compiled() -> int:
    """Kernels that Triton holds compiled in this process."""
    return sum(len(cache[0]) for kernel in (boxed, grouped, segmented_sum) for cache in kernel.device_caches.values())
