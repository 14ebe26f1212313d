"""What ``oput.memory`` says is what was allocated: by the profiler's account, and by hand."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import oput_dist as oput
from oput_dist.engine.hosted import Home
from tests.layouts import Weights
from tests.pool import Pool

SHAPES = [(48, 32), (64, 36), (7,), (30, 5, 4), (48, 32)]
ELEMENTS = sum(torch.Size(shape).numel() for shape in SHAPES)


def allocated(work: Any) -> int:
    """Bytes that are still allocated after some work and were not before, by the allocator's account."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = work()
        gc.collect()
    del kept
    # The sum over profile.key_averages() is the same, but takes seconds: it gives each byte to an operation.
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.parametrize(
    ("name", "options", "state"),
    [
        ("adamw", {}, 8 * ELEMENTS),
        ("adamw", {"state_dtype": torch.bfloat16}, 4 * ELEMENTS),
        ("lion", {"max_grad_norm": 1.0}, 4 * ELEMENTS),
        ("lamb", {}, 8 * ELEMENTS),
        ("adafactor", {}, None),
        ("muon", {}, 4 * ELEMENTS + 4 * 7),
        ("shampoo", {"block_size": 16}, None),
        ("soap", {}, None),
        ("adamw", {"state_device": Home("cpu")}, 0),
        ("soap", {"factor_dtype": "int8"}, None),
    ],
)
def test_the_allocator_agrees(name: str, options: dict[str, Any], state: int | None) -> None:
    made: list[oput.Memory] = []

    def train() -> Any:
        params = [nn.Parameter(torch.ones(shape)) for shape in SHAPES]
        optimizer = oput.create(name, params, backend="foreach", **copy.deepcopy(options))
        for _ in range(2):
            for p in params:
                p.grad = torch.ones(p.shape)
            optimizer.step()
        made.append(oput.memory(optimizer))
        return params, optimizer

    train()  # what is made once in a process is there before anything is counted
    found = allocated(train)
    told = made[-1]
    assert told.parameters == told.gradients == 4 * ELEMENTS
    assert state is None or told.state == state + 4 * len(SHAPES)
    assert told.scratch > 0
    assert told.total + told.host == found
    assert told.host == (8 * ELEMENTS if "state_device" in options else 0)


def on_rank(layout: str) -> tuple[oput.Memory, int, int]:
    module = Weights({f"p{i}": torch.ones(shape) for i, shape in enumerate(SHAPES)})
    options = {"shard_group": dist.group.WORLD} if layout == "zero1" else {}
    if layout == "fsdp2":
        fully_shard(module)
    optimizer = oput.SOAP(module, **options)
    module({f"p{i}": torch.randn(shape) for i, shape in enumerate(SHAPES)}).backward()
    optimizer.step()
    local = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in local}
    return oput.memory(optimizer), oput.state_bytes(optimizer), sum(storages.values())


@pytest.mark.parametrize(("layout", "n"), [("fsdp2", 2), ("fsdp2", 3), ("zero1", 3)])
def test_pieces_count_as_this_rank_holds_them(pool: Pool, layout: str, n: int) -> None:
    ranks = pool.run(n, on_rank, layout)
    named = {f"p{i}": shape for i, shape in enumerate(SHAPES)}
    planned = oput.plan(named, "soap", n, layout=layout)
    for told, state, storages in ranks:
        assert told.state == state
        assert told.parameters == storages >= planned.parameter_bytes.least
    assert max(told.state for told, _, _ in ranks) == planned.state_bytes.most
    if layout == "zero1":
        assert all(told.parameters == told.gradients == 4 * ELEMENTS for told, _, _ in ranks)


def test_shared_memory_counts_once_where_it_comes_first() -> None:
    whole = torch.ones(100)
    first, second = nn.Parameter(whole[:40]), nn.Parameter(whole[40:80])
    first.grad = second.grad = torch.ones(40)
    told = oput.memory(torch.optim.SGD([first, second], lr=0.1))
    assert (told.parameters, told.gradients, told.state, told.scratch) == (400, 160, 0, 0)


def test_of_a_wrapper_and_of_scalars_in_groups() -> None:
    p = nn.Parameter(torch.ones(50))
    optimizer = oput.EMA(oput.SGD([p], lr=torch.tensor(0.1), momentum=0.9))
    p.grad = torch.ones(50)
    optimizer.step()
    told = oput.memory(optimizer)
    assert told.parameters == told.gradients == 200
    assert told.state >= 2 * 200 + 2 * 4  # momentum and average, the counter and the learning rate
    assert told.state == sum(
        {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for value in [*optimizer.state[p].values(), *optimizer.param_groups[0].values()]
            if isinstance(value, torch.Tensor)
        }.values()
    )


def test_the_table() -> None:
    text = str(oput.Memory(2**20, 1, 3 * 2**19, 0))
    assert text.splitlines()[0].split() == ["parameters", "1,048,576", "B", "1.00", "MiB"]
    assert text.splitlines()[-1].split() == ["total", "2,621,441", "B", "2.50", "MiB"]
