"""What sharding costs and saves, counted: collectives in a step, and bytes of state on each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import oput_dist as oput
from tests.layouts import Weights
from tests.meshes import world_mesh
from tests.pool import Pool
from tests.toy import NAMES, create

BOUNDARIES = {  # with one all-reduce each
    **dict.fromkeys(["a2gradexp", "a2gradinc", "a2graduni", "adammini", "adamp", "amos", "apollo", "dadaptadam"], 1),
    **dict.fromkeys(["lamb", "lars", "mars", "novograd", "prodigy", "ranger", "rangeradabelief", "sgdp", "sm3"], 1),
    **dict.fromkeys(["stableadamw", "swats"], 1),
    "adafactor": 2,
    "came": 3,
    "ranger21": 2,
}
SOME = ["adafactor", "adamw", "came", "lamb", "lion", "prodigy", "sm3"]
MANY, COUNT = 300, 10  # parameters: where their number is the point, and elsewhere


def shapes(count: int) -> list[tuple[int, ...]]:
    return [(3 + i % 5, 4) if i % 2 else (2 + i % 7,) for i in range(count)]


def collectives(work: Callable[[], Any]) -> dict[str, int]:
    """The collectives that really ran, by their names in c10d, from the profiler: no way of calling one escapes it.

    The events as they were recorded: making torch's table of them costs more than all the steps do.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    names = Counter(event.name() for event in profile.profiler.kineto_results.events())
    return {name.removeprefix("c10d::"): count for name, count in names.items() if name.startswith("c10d::")}


def trained(layout: str, name: str, count: int = COUNT, **options: Any) -> torch.optim.Optimizer:
    """An optimizer over ``count`` parameters that all have gradients, before its first step."""
    module = Weights({f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes(count))})
    if layout == "fsdp2":
        fully_shard(module)
    elif layout == "hsdp":
        fully_shard(module, mesh=world_mesh((2, 2), ("replicate", "shard")))
    else:
        options["shard_group"] = dist.group.WORLD
    module({f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes(count))}).backward()
    return create(name, module, weight_decay=0.1, **options)


def count_steps(
    layout: str, names: list[str], options: dict[str, Any], count: int = COUNT
) -> dict[str, dict[str, float]]:
    """The collectives of a step, the mean of the first two."""
    counted = {}
    for name in names:
        optimizer = trained(layout, name, count, **options)
        both = collectives(lambda optimizer=optimizer: [optimizer.step() for _ in range(2)])
        counted[name] = {key: n / 2 for key, n in both.items()}
    return counted


def count_controls() -> list[dict[str, int]]:
    tensor = torch.ones(4)

    def gather() -> None:
        dist.all_gather([torch.empty(4) for _ in range(dist.get_world_size())], tensor)

    return [collectives(lambda: dist.all_reduce(tensor)), collectives(gather)]


def test_the_counter_counts(pool: Pool) -> None:
    assert pool.run(2, count_controls) == [[{"allreduce_": 1}, {"allgather_": 1}]] * 2


def all_reduces(name: str) -> dict[str, int]:
    if name in ("muon", "shampoo", "soap"):
        # Matrices to their owners and back; and in the first of both steps the ranks tell each other what they hold.
        return {"alltoall_base_": 2, "allgather_": 1}
    return {"allreduce_": BOUNDARIES[name]} if name in BOUNDARIES else {}


@pytest.mark.parametrize(("layout", "n", "names"), [("fsdp2", 2, NAMES), ("fsdp2", 3, SOME), ("hsdp", 4, SOME)])
def test_one_all_reduce_for_all_sums_of_a_boundary_and_none_without(
    pool: Pool, layout: str, n: int, names: list[str]
) -> None:
    wanted = {name: all_reduces(name) for name in names}
    assert pool.run(n, count_steps, layout, names, {}, timeout=120.0) == [wanted] * n


def test_one_all_reduce_whatever_the_number_of_parameters(pool: Pool) -> None:
    assert (
        pool.run(2, count_steps, "fsdp2", ["lamb", "sm3"], {}, MANY)
        == [{"lamb": {"allreduce_": 1}, "sm3": {"allreduce_": 1}}] * 2
    )


@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"cautious": True}], ids=["clipped", "cautious"])
def test_clipping_and_caution_are_one_more_all_reduce(pool: Pool, option: dict[str, Any]) -> None:
    wanted = {"adamw": {"allreduce_": 1}, "lamb": {"allreduce_": 2}, "adafactor": {"allreduce_": 3}}
    assert pool.run(2, count_steps, "fsdp2", list(wanted), option) == [wanted] * 2


def test_zero1_adds_one_gather_of_the_updated_parameters(pool: Pool) -> None:
    wanted = {name: {"_allgather_base_": 1} | all_reduces(name) for name in SOME}
    assert pool.run(3, count_steps, "zero1", SOME, {}) == [wanted] * 3


def count_with_an_idle_rank(layout: str) -> dict[str, list[dict[str, int]]]:
    """Rank 1 has no gradient at all, from the first step on; it must still take part in every collective."""
    counted = {}
    for name in ("adamw", "lamb", "stableadamw"):
        optimizer = trained(layout, name)
        if dist.get_rank() == 1:
            optimizer.zero_grad()
        counted[name] = [collectives(optimizer.step) for _ in range(2)]
    return counted


@pytest.mark.parametrize("layout", ["fsdp2", "zero1"])
def test_an_idle_rank_takes_part_in_every_collective(pool: Pool, layout: str) -> None:
    gather = {"_allgather_base_": 1} if layout == "zero1" else {}
    norms = {"allreduce_": 1}
    wanted = {"adamw": [gather] * 2, "lamb": [gather | norms] * 2, "stableadamw": [gather | norms] * 2}
    assert pool.run(2, count_with_an_idle_rank, layout) == [wanted] * 2


def measure_state(layout: str, names: list[str]) -> dict[str, tuple[int, int, int, int]]:
    """For each optimizer: state_bytes, the same from the tensors, that of one plain process, the largest allowed."""
    measured = {}
    n = dist.get_world_size()
    for name in names:
        sharded = trained(layout, name)
        sharded.step()
        plain = create(name, [torch.randn(shape, requires_grad=True) for shape in shapes(COUNT)])
        for p in plain.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        plain.step()
        whole = [v for state in plain.state.values() for k, v in state.items() if k != "step"]
        remainder = sum(v[0].numel() * v.element_size() for v in whole)  # one row of each
        counters = 4 * COUNT
        local = [
            v.to_local() if isinstance(v, DTensor) else v for state in sharded.state.values() for v in state.values()
        ]
        measured[name] = (
            oput.state_bytes(sharded),
            sum(v.untyped_storage().nbytes() if v.ndim else v.element_size() for v in local),
            oput.state_bytes(plain),
            (oput.state_bytes(plain) - counters) // n + remainder + counters,
        )
    return measured


STATES = {
    **dict.fromkeys(["lion", "sgd", "sgdw", "signum", "tiger", "qhm", "accsgd"], 1),
    **dict.fromkeys(["adam", "adamp", "adamw", "adamwschedulefree", "adopt", "lamb", "laprop", "nadam"], 2),
    **dict.fromkeys(["qhadam", "radam", "stableadamw", "yogi"], 2),
    **dict.fromkeys(["ademamix", "aggmo", "diffgrad", "madgrad", "mars", "pid", "apollo"], 3),
    **dict.fromkeys(["adan", "ranger21"], 4),
}


@pytest.mark.parametrize(("layout", "n"), [("fsdp2", 2), ("fsdp2", 3), ("zero1", 3), ("zero1", 4)])
def test_state_is_partitioned(pool: Pool, layout: str, n: int) -> None:
    elements = sum(torch.Size(shape).numel() for shape in shapes(COUNT))
    names = [name for name in NAMES if name in STATES]
    ranks = pool.run(n, measure_state, layout, names)
    for name in names:
        for reported, from_tensors, whole, limit in (rank[name] for rank in ranks):
            assert reported == from_tensors
            assert whole == 4 * elements * STATES[name] + 4 * COUNT
            assert reported <= limit
        # Together the ranks hold each element once, and each rank its own counters.
        assert sum(rank[name][0] - 4 * COUNT for rank in ranks) == whole - 4 * COUNT


def steps_at_lr_zero(lrs: list[float]) -> list[float]:
    """Rank 1 has its first gradient in the second step."""
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None))
    optimizer = oput.AdamW([p])
    for step, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"] = lr
        idle = dist.get_rank() == 1 and step == 0
        p.grad = None if idle else distribute_tensor(torch.ones(4), mesh, [Shard(0)], src_data_rank=None)
        optimizer.step()
    return p.to_local().tolist()


@pytest.mark.parametrize("lrs", [[0.0, 0.0], [0.1, 0.0]])
def test_an_idle_rank_at_lr_zero_does_not_hang(pool: Pool, lrs: list[float]) -> None:
    pool.run(2, steps_at_lr_zero, lrs, timeout=20.0)


def scalar_without_gradient_on_one_rank() -> float:
    p, q = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.ones(4))
    optimizer = oput.AdamW([p, q], shard_group=dist.group.WORLD, lr=0.1)
    p.grad = torch.tensor(1.0) if dist.get_rank() == 0 else None
    q.grad = torch.ones(4)
    optimizer.step()
    return p.item()


def test_replicas_of_a_scalar_stay_equal_under_zero1(pool: Pool) -> None:
    first, second = pool.run(2, scalar_without_gradient_on_one_rank)
    assert first == second


def frozen_with_an_old_gradient() -> list[float]:
    p = nn.Parameter(torch.ones(4))
    optimizer = oput.SGD([p], shard_group=dist.group.WORLD, lr=0.1)
    p.grad = torch.ones(4)
    p.requires_grad_(False)
    optimizer.step()
    return p.tolist()


def test_replicas_of_a_frozen_parameter_stay_equal_under_zero1(pool: Pool) -> None:
    assert pool.run(2, frozen_with_an_old_gradient) == [[1.0] * 4] * 2
