"""Checkpoints of DeepSpeed go on exactly, with state of every kind, and schedules keep ratios of learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.conformance import SECOND, Case, Key
from tests.deepspeed_worlds import (
    LAMB,
    LAST,
    Weighed,
    World,
    compared,
    engine_of,
    enter,
    reference,
    train,
    weights,
)
from tests.pool import Pool
from tests.test_deepspeed import ONE_EACH

KINDS = (
    "AdamW",
    "Lamb",
    "CAME",
    "SM3",
    "Muon",
    "Prodigy",
    "Momo",
    "AdamWScheduleFree",
    "A2GradInc",
    "Sophia",
    "Ranger21",
)
CASES = [case for case in ONE_EACH if case.optimizer.split(".")[1] in KINDS]


def resumed(world: World, cases: list[Case], folder: str) -> list[Weighed]:
    """Half of the training, saved; the other half in a new engine."""
    deepspeed = enter()
    found = []
    for number, case in enumerate(cases):
        first = train(deepspeed, case, world, range(2))
        first.save_checkpoint(f"{folder}/{number}", tag="half")
        first.destroy()
        second = engine_of(deepspeed, case, world)
        path, _ = second.load_checkpoint(f"{folder}/{number}", tag="half")
        assert path is not None
        train(deepspeed, case, world, range(2, LAST + 1), second)
        found.append(weights(deepspeed, second))
        second.destroy()
    return found


def straight(world: World, cases: list[Case]) -> list[Weighed]:
    deepspeed = enter()
    return [weights(deepspeed, train(deepspeed, case, world)) for case in cases]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("stage", range(4))
def test_a_loaded_checkpoint_goes_on_bitwise(pool: Pool, stage: int, groups: int, tmp_path: Path) -> None:
    world = World(stage, groups, options={"sub_group_size": 12} if stage == 3 else {})
    loaded = pool.run(2, resumed, world, CASES, str(tmp_path), timeout=300.0)
    through = pool.run(2, straight, world, CASES, timeout=300.0)
    for case, got, wanted in zip(CASES, loaded[0], through[0], strict=True):
        assert compared(wanted, got, exact=True) == [], case.name
        assert compared(reference(Key(case), groups), got, exact=False) == [], case.name
        assert compared(reference(Key(case), groups, 2), got, exact=False), f"{case.name} does not move"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_checkpoints_of_bf16_go_on_bitwise(pool: Pool, stage: int, tmp_path: Path) -> None:
    world, cases = World(stage, dtype="bf16"), [LAMB, Case("adamw", "oput_dist.AdamW", {"lr": 0.1}, SECOND)]
    loaded = pool.run(2, resumed, world, cases, str(tmp_path))
    through = pool.run(2, straight, world, cases)
    for got, wanted in zip(loaded[0], through[0], strict=True):
        assert compared(wanted, got, exact=True) == []


def loading_another(world: World, case: Case, other: Case, folder: str) -> str:
    deepspeed = enter()
    train(deepspeed, case, world, range(1)).save_checkpoint(folder, tag="one")
    engine = engine_of(deepspeed, other, world)
    try:
        engine.load_checkpoint(folder, tag="one")
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("stage", range(4))
def test_the_checkpoint_of_another_optimizer_is_refused(pool: Pool, stage: int, tmp_path: Path) -> None:
    other = Case("adamw", "oput_dist.AdamW", {"lr": 0.1}, SECOND)
    for said in pool.run(2, loading_another, World(stage), LAMB, other, str(tmp_path)):
        assert "AdamW: the state dict was saved by Lamb" in said


# ------------------------------------------------------------------------------------------------------------ schedules

COSINE = {"type": "WarmupCosineLR", "params": {"total_num_steps": 10, "warmup_num_steps": 2, "warmup_type": "linear"}}


def rates(world: World, case: Case, folder: str) -> list[tuple[float, ...]]:
    """The learning rates of the groups at each step, with a save and a load in the middle."""
    deepspeed = enter()
    engine, seen = engine_of(deepspeed, case, world), []
    for step in range(4):
        if step == 2:
            engine.save_checkpoint(folder, tag="two")
            engine = engine_of(deepspeed, case, world)
            engine.load_checkpoint(folder, tag="two")
        train(deepspeed, case, world, range(step, step + 1), engine)
        seen.append(tuple(group["lr"] for group in engine.optimizer.param_groups))
    dist.barrier()
    return seen


@pytest.mark.parametrize("stage", range(4))
def test_schedules_of_deepspeed_keep_the_ratios_of_groups(pool: Pool, stage: int, tmp_path: Path) -> None:
    world = World(stage, config={"scheduler": COSINE})
    seen = pool.run(2, rates, world, LAMB, str(tmp_path))[0]
    assert len({lrs[0] for lrs in seen}) == 4
    for lrs in filter(any, seen):  # the warm-up begins at 0
        assert lrs[1] / lrs[0] == pytest.approx(LAMB.second["lr"] / LAMB.options["lr"], rel=1e-12)
        assert lrs[2] == lrs[0]


# ------------------------------------------------------------------------------------------------ schedule-free modes


def averaged(world: World, case: Case) -> tuple[Weighed, Weighed]:
    """The model's weights in eval mode, and back in train mode."""
    deepspeed = enter()
    engine: Any = train(deepspeed, case, world)
    engine.basic_optimizer.eval()
    there = weights(deepspeed, engine)
    engine.basic_optimizer.train()
    return there, weights(deepspeed, engine)


@pytest.mark.parametrize("stage", range(4))
def test_eval_mode_reaches_the_weights_of_the_model(pool: Pool, stage: int) -> None:
    case = next(case for case in ONE_EACH if case.optimizer.endswith("AdamWScheduleFree"))
    plain = pool.run(1, averaged, World(0), case)[0]
    for there, back in pool.run(2, averaged, World(stage), case):
        assert compared(plain[0], there, exact=True) == []
        assert compared(plain[1], back, exact=True) == []
        assert compared(plain[1], there, exact=False)
