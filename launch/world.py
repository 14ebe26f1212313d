"""The ranks of a run: who this process is, how it joins the others, and how all ranks stop together."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from launch.errors import RunError, UsageError


@dataclass(frozen=True)
class World:
    """Which of how many processes this is. Without torchrun: the only one."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @staticmethod
    def from_environment() -> "World":
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        rank, size, local_rank, local_size = (
            int(os.environ.get(n, d)) for n, d in zip(names, (0, 1, 0, 1), strict=True)
        )
        return World(rank, size, local_rank, local_size)


def choose_device(name: str | None, world: World) -> torch.device:
    """`name` or, if None, a GPU where there is one; GPUs are dealt out by local rank."""
    if (name or "cuda") == "cpu" or (name is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if world.local_size > count:
        raise UsageError(
            f"{world.local_size} ranks on this machine need as many GPUs, but it has {count}; "
            f"use --nproc-per-node {max(count, 1)} or --device cpu"
        )
    return torch.device("cuda", world.local_rank)


def set_up_device(device: torch.device, threads: int | None, world: World) -> None:
    """The same numbers in every run, and processors shared fairly among the ranks of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // world.local_size))
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def connect(world: World) -> None:
    """Join the default process group: gloo for CPU tensors and, with GPUs, NCCL for theirs."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if world.size > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def leave() -> None:
    """Leave the default process group, once nothing of the run is referenced any more.

    A DistributedDataParallel that outlives the group frees it in its own destructor, which waits for gloo's threads
    while they wait for the interpreter.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def together(world: World) -> Iterator[None]:
    """If the block raises a RunError on any rank, all ranks exit with its status, and rank 0 prints the sentence."""
    error: tuple[int, str] | None = None
    try:
        yield
    except RunError as e:
        error = (e.status, str(e))
    errors = [error]
    if world.size > 1:
        errors = [None] * world.size
        dist.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is None:
        return
    if world.rank == 0:
        print(f"train.py: {first[1]}", file=sys.stderr, flush=True)
    if world.size > 1:
        # torchrun stops all ranks as soon as one has ended, and the sentence must be out by then. Not dist.barrier,
        # which would start NCCL where there are GPUs.
        dist.all_gather_object(errors, None)
    raise SystemExit(first[0])


def same_everywhere(world: World, what: str, value: str) -> None:
    """Raise UsageError on all ranks if `value` differs between them."""
    if world.size == 1:
        return
    values: list[str] = [""] * world.size
    dist.all_gather_object(values, value)
    odd = next((r for r, v in enumerate(values) if v != values[0]), None)
    if odd is not None:
        raise UsageError(f"rank {odd} has another {what} than rank 0; give all ranks the same")


def mean_over_ranks(value: Tensor, world: World) -> Tensor:
    """In place; nothing waits for the device."""
    if world.size > 1:
        dist.all_reduce(value)
        value /= world.size
    return value
