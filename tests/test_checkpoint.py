"""torch.distributed.checkpoint: resuming continues the trajectory, on the same layout, another one, or other ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from tests.conformance import on_grid
from tests.layouts import Weights
from tests.pool import Pool
from tests.toy import NAMES, NORMS, create

SHAPES: dict[str, tuple[int, ...]] = {"matrix": (7, 5), "vector": (11,), "short": (2, 3), "conv": (4, 3, 2, 2)}
HALF, ALL = 3, 6


def make(name: str, module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Two groups, and all state in use."""
    parameters = dict(module.named_parameters())
    groups = [
        {"params": [p for k, p in parameters.items() if k != "vector"]},
        {"params": [parameters["vector"]], "lr": 0.3, "weight_decay": 0.0},
    ]
    return create(name, groups, lr=0.1, weight_decay=0.1, **options)


def build(layout: str, name: str, lr: float | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    module = Weights({k: on_grid(i, shape, torch.float32) for i, (k, shape) in enumerate(SHAPES.items())})
    if layout == "fsdp2":
        fully_shard(module)
    optimizer = make(name, module, **({"shard_group": dist.group.WORLD} if layout == "zero1" else {}))
    return module, optimizer


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        factors = {k: on_grid(50 * (step + 1) + i, shape, torch.float32) for i, (k, shape) in enumerate(SHAPES.items())}
        module(factors).backward()
        optimizer.step()


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {k: getattr(p.detach(), "full_tensor", p.detach)().clone() for k, p in module.named_parameters()}


def save(layout: str, folder: str, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    for name in NAMES:
        module, optimizer = build(layout, name)
        train(module, optimizer, range(HALF))
        state = get_optimizer_state_dict(module, optimizer, options=options)
        dcp.save({"model": get_model_state_dict(module), "optimizer": state}, checkpoint_id=f"{folder}/{name}")


def resume(layout: str, folder: str, flat: bool) -> dict[str, dict[str, Tensor]]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    ends = {}
    for name in NAMES:
        module, optimizer = build(layout, name)
        for group in optimizer.param_groups:
            group["lr"] = 9.0  # the saved one must come back
        target = {
            "model": get_model_state_dict(module),
            "optimizer": get_optimizer_state_dict(module, optimizer, options=options),
        }
        dcp.load(target, checkpoint_id=f"{folder}/{name}")
        set_model_state_dict(module, target["model"])
        set_optimizer_state_dict(module, optimizer, target["optimizer"], options=options)
        train(module, optimizer, range(HALF, ALL))
        ends[name] = whole(module)
    return ends


def uninterrupted(name: str) -> dict[str, Tensor]:
    module, optimizer = build("plain", name)
    train(module, optimizer, range(ALL))
    return whole(module)


def early(layout: str) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint does before the first step: it makes the state, by a step with zero gradients and lr 0."""
    ends = {}
    for name in NAMES:
        module, optimizer = build(layout, name)
        before = whole(module)
        state = get_optimizer_state_dict(module, optimizer)["state"]
        assert set(state) == set(SHAPES), name
        assert all(not tensor.any() for entries in state.values() for tensor in entries.values()), name
        torch.testing.assert_close(whole(module), before, rtol=0, atol=0)
        train(module, optimizer, range(ALL))
        ends[name] = whole(module)
    return ends


def check(ends: dict[str, dict[str, Tensor]], bitwise: bool = False) -> None:
    start = {k: on_grid(i, shape, torch.float32) for i, (k, shape) in enumerate(SHAPES.items())}
    for name, found in ends.items():
        for k, wanted in uninterrupted(name).items():
            error = (found[k] - wanted).abs().max() / (wanted - start[k]).abs().max()
            assert error <= (0.0 if bitwise or name not in NORMS else 1e-6), (name, k, error)


CHANGES = [
    ("fsdp2", 2, "fsdp2", 2),
    ("fsdp2", 2, "fsdp2", 3),
    ("fsdp2", 4, "fsdp2", 2),
    ("fsdp2", 2, "plain", 1),
    ("plain", 1, "fsdp2", 2),
    ("zero1", 2, "zero1", 3),
    ("zero1", 3, "fsdp2", 2),
    ("fsdp2", 3, "zero1", 2),
]


@pytest.mark.parametrize(("saved", "n", "loaded", "m"), CHANGES)
def test_resuming_continues(pool: Pool, tmp_path: Path, saved: str, n: int, loaded: str, m: int) -> None:
    pool.run(n, save, saved, str(tmp_path), False)
    for ends in pool.run(m, resume, loaded, str(tmp_path), False):
        assert list(ends) == NAMES
        check(ends)


def test_resuming_continues_from_flattened_state(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, save, "fsdp2", str(tmp_path), True)
    for ends in pool.run(3, resume, "fsdp2", str(tmp_path), True):
        check(ends)


def straight_and_resumed(layout: str, folder: str) -> bool:
    """Whether the same layout resumes to the last bit, norms and all."""
    save(layout, folder, False)
    resumed = resume(layout, folder, False)
    for name in NAMES:
        module, optimizer = build(layout, name)
        train(module, optimizer, range(ALL))
        torch.testing.assert_close(resumed[name], whole(module), rtol=0, atol=0)
    return True


@pytest.mark.parametrize(("layout", "n"), [("fsdp2", 3), ("zero1", 2)])
def test_the_same_layout_resumes_bitwise(pool: Pool, tmp_path: Path, layout: str, n: int) -> None:
    assert pool.run(n, straight_and_resumed, layout, str(tmp_path)) == [True] * n


@pytest.mark.parametrize(("layout", "n"), [("plain", 1), ("fsdp2", 2), ("zero1", 2)])
def test_making_state_early_changes_no_trajectory(pool: Pool, layout: str, n: int) -> None:
    for ends in pool.run(n, early, layout):
        check(ends)
