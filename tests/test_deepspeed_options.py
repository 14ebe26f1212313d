"""DeepSpeed's own options change nothing: buckets, sub-groups, round robin, precision, accumulation, clipping."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import oput_dist as oput
from tests.conformance import FAST, Case, Key
from tests.deepspeed_worlds import (
    LAMB,
    LAST,
    Weighed,
    World,
    compared,
    engine_of,
    enter,
    faults,
    gradients,
    grouped,
    made,
    start_values,
    train,
    weights,
)
from tests.pool import Pool
from tests.test_deepspeed import ONE_EACH

FEW = [c for c in ONE_EACH if c.optimizer.split(".")[1] in ("AdamW", "Lamb", "CAME", "SM3", "Muon", "Prodigy", "Momo")]
PLAIN = [case for case in FEW if not case.loss]  # a loss of 2.5 is not exact in bf16 sums
SMALL = {"reduce_bucket_size": 64, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 10}

WORLDS = {
    "round robin": World(1, options={"round_robin_gradients": True}),
    "round robin, stage 2": World(2, options={"round_robin_gradients": True}),
    "all-reduced": World(1, options={"reduce_scatter": False}),
    "all-reduced, stage 2": World(2, options={"reduce_scatter": False}),
    "overlapping": World(2, options={"overlap_comm": True, "contiguous_gradients": True}),
    "scattered": World(2, options={"contiguous_gradients": False}),
    "small buckets": World(2, options={"reduce_bucket_size": 9, "allgather_bucket_size": 10}),
    "accumulating": World(2, config={"gradient_accumulation_steps": 2}),
    "accumulating, stage 3": World(3, config={"gradient_accumulation_steps": 2}),
    "accumulating, stage 0": World(0, config={"gradient_accumulation_steps": 2}),
    "sub-groups": World(3, options={"sub_group_size": 6, **SMALL}),
    "one sub-group": World(3, groups=1, options={"sub_group_size": 10**9}),
    "overlapping, stage 3": World(3, options={"overlap_comm": True, "sub_group_size": 12}),
    "zero.Init": World(3, options=SMALL, init=True),
    "an instance": World(2, given="instance"),
    "an instance, stage 3": World(3, given="instance"),
    "a callable": World(1, given="callable"),
    "a callable, stage 0": World(0, given="callable"),
}


@pytest.mark.parametrize("name", WORLDS)
def test_options_change_nothing(pool: Pool, name: str) -> None:
    found = faults(pool, 2, WORLDS[name], FEW)
    assert not found, "\n".join(found)


def test_round_robin_and_sub_groups_on_three_ranks(pool: Pool) -> None:
    for world in (WORLDS["round robin, stage 2"], WORLDS["sub-groups"]):
        found = faults(pool, 3, world, FEW)
        assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", range(4))
def test_masters_of_low_precision_are_those_of_one_fp32_process(pool: Pool, stage: int, dtype: str) -> None:
    found = faults(pool, 2, World(stage, dtype=dtype), PLAIN)
    assert not found, "\n".join(found)


def test_the_bf16_optimizer_with_fp32_accumulation(pool: Pool) -> None:
    config = {"data_types": {"grad_accum_dtype": "fp32"}, "gradient_accumulation_steps": 2}
    found = faults(pool, 2, World(1, dtype="bf16", config=config), PLAIN)
    assert not found, "\n".join(found)


# ------------------------------------------------------------------------------------------------------------ offload


@pytest.mark.parametrize("given", ["config", "instance"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_optimizers_change_nothing(pool: Pool, stage: int, given: str) -> None:
    offload = {"device": "cpu", "pin_memory": given == "instance"}
    world = World(stage, given=given, options={"offload_optimizer": offload, "sub_group_size": 12})
    found = faults(pool, 2, world, ONE_EACH if given == "config" else FEW, LAST)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("stage", [2, 3])
def test_offloaded_masters_in_bf16(pool: Pool, stage: int) -> None:
    found = faults(pool, 2, World(stage, dtype="bf16", options={"offload_optimizer": {"device": "cpu"}}), PLAIN)
    assert not found, "\n".join(found)


# ----------------------------------------------------------------------------------------------------------- clipping


def clipped(case: Case, groups: int, norm: float) -> Weighed:
    """One plain process, clipped by torch."""
    params = {name: torch.nn.Parameter(value) for name, value in start_values().items()}
    optimizer = made(case, grouped(params, case, groups), backend="eager")
    for step in range(LAST + 1):
        for name, g in gradients(step).items():
            params[name].grad = g
        torch.nn.utils.clip_grad_norm_(params.values(), norm)
        case.advance(optimizer, step)
    return {name: p.detach().numpy() for name, p in params.items()}


def clipping(world: World, case: Case) -> Weighed:
    deepspeed = enter()
    return weights(deepspeed, train(deepspeed, case, world))


@pytest.mark.parametrize("stage", range(4))
def test_gradients_are_clipped_over_the_whole_model(pool: Pool, stage: int) -> None:
    case = Case("sgd", "oput_dist.SGD", {"lr": 0.5}, FAST, exact=False)
    got = pool.run(2, clipping, World(stage, config={"gradient_clipping": 2.0}), case)
    wanted = clipped(case, 3, 2.0)
    assert [compared(wanted, one, False, 2e-6) for one in got] == [[], []]
    assert compared(clipped(case, 3, 4.0), got[0], False, 1e-2)


# ---------------------------------------------------------------------------------------------------------------- cost


def costs(world: World) -> tuple[int, int, int]:
    """All-reduces of the optimizer's own in one ``engine.step()``, bytes of state, plans made in later steps."""
    deepspeed = enter()
    engine = train(deepspeed, LAMB, world, range(2))
    joined, calls = engine.basic_optimizer.step.__self__, []
    inner, plans = joined._step, []
    reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return reduce(*args, **kwargs)

    def stepping(*args: Any, **kwargs: Any) -> Any:
        dist.all_reduce = counted
        try:
            return inner(*args, **kwargs)
        finally:
            dist.all_reduce = reduce
            plans.append(id(joined._optimizer._plan))

    joined._step = stepping
    train(deepspeed, LAMB, world, range(2, 5), engine)
    return len(calls), oput.state_bytes(engine.basic_optimizer), len(set(plans))


@pytest.mark.parametrize("world", [World(1), World(2), World(3, options={"sub_group_size": 6})])
def test_one_all_reduce_a_step_and_a_share_of_the_state(pool: Pool, world: World) -> None:
    elements, ranks = sum(p.numel() for p in start_values().values()), 2
    for reductions, size, plans in pool.run(ranks, costs, world):
        assert reductions == 3  # in three steps, whatever the number of groups and sub-groups
        assert plans == 1
        # two moments in fp32, padded to what divides; and counters
        assert 2 * 4 * elements / ranks <= size <= 1.2 * 2 * 4 * elements / ranks


# ------------------------------------------------------------------------------------------ the harness is put to test


def local_sums(world: World, case: Case) -> Weighed:
    """Planted fault: norms stay local."""
    deepspeed = enter()
    engine = engine_of(deepspeed, case, world)
    for part in engine.basic_optimizer.step.__self__._zero.partitions:
        for original in part.flat.originals:
            object.__setattr__(original, "groups", ())
    engine.basic_optimizer._plan = None
    return weights(deepspeed, train(deepspeed, case, world, engine=engine))


def shifted(world: World, case: Case) -> Weighed:
    """Planted fault: originals begin one element late."""
    deepspeed = enter()
    engine = engine_of(deepspeed, case, world)
    for part in engine.basic_optimizer.step.__self__._zero.partitions:
        for original in part.flat.originals[:-1]:
            object.__setattr__(original, "offset", original.offset + 1)
    engine.basic_optimizer._plan = None
    return weights(deepspeed, train(deepspeed, case, world, engine=engine))


@pytest.mark.parametrize("fault", [local_sums, shifted])
def test_planted_faults_are_found(pool: Pool, fault: Any) -> None:
    from tests.deepspeed_worlds import reference

    for got in pool.run(2, fault, World(1), LAMB):
        assert any("off by" in line for line in compared(reference(Key(LAMB), 3), got, False))
        assert all(np.isfinite(value).all() for value in got.values())
