"""``check_replicas``: equal replicas pass, and a planted difference is named, on every rank."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import oput_dist as oput
from tests.layouts import Weights
from tests.meshes import world_mesh
from tests.pool import Pool

SHAPES = {"first": (5, 3), "second": (4,)}


def trained(layout: str, name: str) -> tuple[nn.Module, oput.Optimizer]:
    torch.manual_seed(0)
    module = Weights({key: torch.randn(shape) for key, shape in SHAPES.items()})
    options: dict[str, Any] = {"shard_group": dist.group.WORLD} if layout == "zero1" else {}
    if layout == "hsdp":
        fully_shard(module, mesh=world_mesh((2, 2), ("replicate", "shard")))
    elif layout == "fsdp2":
        fully_shard(module)
    optimizer = oput.create(name, module, lr=0.1, **options)
    for _ in range(2):
        module({key: torch.randn(shape) for key, shape in SHAPES.items()}).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def memory(value: Any) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


def checked(layout: str, name: str, plant: str) -> str:
    """Plants a difference on the last rank; returns what the check says."""
    module, optimizer = trained(layout, name)
    p = next(iter(module.parameters()))
    state = optimizer.state[p]
    if plant == "nan everywhere":
        memory(p.data).view(-1)[:1] = math.nan
    elif dist.get_rank() == dist.get_world_size() - 1 and plant:
        with torch.no_grad():
            if plant == "param":
                memory(p.data).view(-1)[0] += 0.5
            elif plant == "minus zero":
                memory(p.data).view(-1)[0] = -0.0
            elif plant == "step":
                state["step"] += 1
            else:
                memory(state[plant]).view(-1)[0] += 0.5
    if plant == "minus zero" and dist.get_rank() != dist.get_world_size() - 1:
        memory(p.data).view(-1)[0] = 0.0
    try:
        oput.check_replicas(optimizer)
    except oput.ReplicaError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("layout", "n"), [("ddp", 2), ("zero1", 3), ("fsdp2", 2), ("hsdp", 4)])
@pytest.mark.parametrize("plant", ["", "nan everywhere"])
def test_equal_replicas_pass(pool: Pool, layout: str, n: int, plant: str) -> None:
    for name in ("adamw", "adafactor"):
        assert pool.run(n, checked, layout, name, plant) == [""] * n


@pytest.mark.parametrize(
    ("layout", "n", "name", "plant", "words"),
    [
        ("ddp", 2, "adamw", "param", ["first", "1"]),
        ("ddp", 3, "adamw", "exp_avg", ["first", "exp_avg", "2"]),
        ("ddp", 2, "adamw", "step", ["first", "step"]),
        ("ddp", 2, "adamw", "minus zero", ["first"]),
        ("zero1", 2, "adamw", "param", ["first"]),
        ("fsdp2", 2, "adafactor", "col_var", ["first", "col_var"]),
        ("hsdp", 4, "adamw", "param", ["first", "3"]),
        ("hsdp", 4, "adamw", "exp_avg_sq", ["first", "exp_avg_sq", "3"]),
    ],
)
def test_a_difference_is_named_on_every_rank(
    pool: Pool, layout: str, n: int, name: str, plant: str, words: list[str]
) -> None:
    said = pool.run(n, checked, layout, name, plant)
    assert len(set(said)) == 1
    for word in words:
        assert word in said[0]
