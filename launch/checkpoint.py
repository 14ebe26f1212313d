"""Checkpoints that survive being killed at any moment.

A checkpoint is a folder DIR/step-000123. It is written under another name and renamed when it is complete; older ones
are removed after that. So the newest step-* folder is always whole, and there is one from the first save on.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

import oput_dist as oput
from launch.errors import RunError, UsageError
from launch.world import World, together

STATE = "state"  # the folder of torch.distributed.checkpoint's own files
RUN = "run.json"  # what wrote the checkpoint


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int
    run: dict[str, Any]


def newest(folder: Path) -> Checkpoint | None:
    """The last complete checkpoint in `folder`, or None."""
    steps = {int(p.name[5:]): p for p in folder.glob("step-*") if p.name[5:].isdecimal()}
    if not steps:
        return None
    step = max(steps)
    try:
        return Checkpoint(steps[step], step, json.loads((steps[step] / RUN).read_text()))
    except (OSError, ValueError) as e:
        raise UsageError(
            f"checkpoint {steps[step]} is damaged ({e}); remove it to use an older one or start anew"
        ) from e


def save(folder: Path, step: int, run: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, world: World) -> None:
    """Write a checkpoint and then remove older ones. Called by all ranks; if it fails on any, all exit together."""
    final, partial = folder / f"step-{step:06d}", folder / ".incomplete"
    state = _state(model, optimizer)
    with together(world), _writing(final):
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / RUN).write_text(json.dumps(run, indent=2) + "\n")
    with together(world), _writing(final), _quiet():
        dcp.save(state, checkpoint_id=partial / STATE, no_dist=not dist.is_initialized())
    with together(world), _writing(final):
        if world.rank == 0:
            os.rename(partial, final)
            for old in folder.glob("step-*"):
                if old != final:
                    shutil.rmtree(old, ignore_errors=True)


def check_savable(model: nn.Module, optimizer: oput.Optimizer | oput.Wrapper) -> None:
    """UsageError if PyTorch could not save the run: its FSDP1 takes only state in the shape of the parameters."""
    if isinstance(model, FullyShardedDataParallel) and any(
        optimizer.recipe(group, (2, 2)).vectors for group in optimizer.param_groups
    ):
        raise UsageError(
            f"--checkpoint: {type(optimizer).__name__} keeps sums over rows and columns, which PyTorch's checkpoints "
            f"of FSDP1 cannot hold; use --parallel fsdp2 or hsdp, or leave --checkpoint out"
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, dcp.CheckpointException) as e:
        raise RunError(f"{path} could not be written ({reason(e)}); older checkpoints are as they were") from e


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that a run without ranks saves on one process, which is what is meant, and without those
    of FSDP1 about its own insides."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", module=r"torch\.distributed\.fsdp")
        yield


def check(checkpoint: Checkpoint, run: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """UsageError if `checkpoint` is of another model or optimizer, naming the difference. Changes no parameter."""
    for key in ("width", "layers", "heads", "context", "optimizer"):
        if checkpoint.run.get(key) != run[key]:
            raise UsageError(
                f"checkpoint {checkpoint.path} was written with --{key} {checkpoint.run.get(key)}, not {run[key]}; "
                f"use the same, or another --checkpoint folder"
            )
    try:
        stored = dcp.FileSystemReader(checkpoint.path / STATE).read_metadata().state_dict_metadata
    except Exception as e:  # of many kinds: the file is a pickle
        raise UsageError(f"checkpoint {checkpoint.path} is damaged ({reason(e)}); remove it") from e
    there = {k: _kind(v.properties.dtype, v.size) for k, v in stored.items() if isinstance(v, TensorStorageMetadata)}
    here = _tensors(_state(model, optimizer))
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise UsageError(
                f"checkpoint {checkpoint.path} does not fit: {name} is {there.get(name, 'absent')} there and "
                f"{here.get(name, 'absent')} in this run of {run['optimizer']}; use the model and the --opt of the "
                f"checkpoint, or another --checkpoint folder"
            )


def load(checkpoint: Checkpoint, run: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> None:
    """Restore model and optimizer. Where the command line now gives an option another value, it wins."""
    before = [dict(group) for group in optimizer.param_groups]
    state = _state(model, optimizer)
    try:
        with _quiet():
            dcp.load(state, checkpoint_id=checkpoint.path / STATE, no_dist=not dist.is_initialized())
    except dcp.CheckpointException as e:
        raise UsageError(f"checkpoint {checkpoint.path} is damaged ({reason(e)}); remove it") from e
    with _quiet():
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    old, new = checkpoint.run["opt"], json.loads(json.dumps(run["opt"]))
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    for group, fresh in zip(optimizer.param_groups, before, strict=True):
        group.update({key: fresh[key] for key in changed if key in fresh})


def differences(checkpoint: Checkpoint, run: Mapping[str, Any]) -> str:
    """In words, what the command line now asks otherwise and what therefore changes the curve; often nothing."""
    keys: tuple[str, ...] = ("opt", "lr", "schedule", "warmup", "clip", "dtype", "batch_size", "seed", "text")
    if run["schedule"] != "constant":
        keys = (*keys, "steps")
    changed = [key for key in keys if checkpoint.run.get(key) != json.loads(json.dumps(run[key]))]
    return f", with another {', '.join(changed)} than before" if changed else ""


def reason(error: BaseException) -> str:
    """The first cause of a failed save or load, in a line."""
    if isinstance(error, dcp.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """As DTensors where the run holds shards, so that any number of ranks can load what another has saved."""
    with _quiet():
        parameters, state = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": state}


def _kind(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"


def _tensors(tree: Mapping[str, Any] | list[Any], prefix: str = "") -> dict[str, str]:
    """The tensors of a nested state, named as torch.distributed.checkpoint names them."""
    found = {}
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(value, torch.Tensor):
            found[f"{prefix}{key}"] = _kind(value.dtype, value.shape)
        elif isinstance(value, Mapping | list):
            found |= _tensors(value, f"{prefix}{key}.")
    return found
