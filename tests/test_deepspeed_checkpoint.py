"""Checkpoints of DeepSpeed go on exactly, with state of every kind, and schedules keep ratios of learning rates."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
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
    "Shampoo",
    "SOAP",
    "Prodigy",
    "Momo",
    "AdamWScheduleFree",
    "A2GradInc",
    "Sophia",
    "Ranger21",
)
CODED = Case("adamw int8", "oput_dist.AdamW", {"lr": 0.1, "state_dtype": "int8", "state_overrides": {"*": "int8"}})
CASES = [*(case for case in ONE_EACH if case.optimizer.split(".")[1] in KINDS), CODED]
APART = ("CAME", "SM3", "Shampoo", "Prodigy", "AdamWScheduleFree")  # sums, vectors, matrices, what groups keep
SOME = [*(case for case in CASES if case.optimizer.split(".")[1] in APART), CODED]


def resumed(world: World, cases: list[Case], folder: str) -> list[Weighed]:
    """Where a new engine ends that goes on half-way."""
    return [loaded for loaded, _ in both(world, cases, folder)]


def both(world: World, cases: list[Case], folder: str) -> list[tuple[Weighed, Weighed]]:
    """Half of the training, saved; the other half in a new engine, and in the one that saved."""
    deepspeed = enter()
    found = []
    for number, case in enumerate(cases):
        first = train(deepspeed, case, world, range(2))
        first.save_checkpoint(f"{folder}/{number}", tag="half")
        train(deepspeed, case, world, range(2, LAST + 1), first)
        through = weights(deepspeed, first)
        first.destroy()
        second = engine_of(deepspeed, case, world)
        path, _ = second.load_checkpoint(f"{folder}/{number}", tag="half")
        assert path is not None
        train(deepspeed, case, world, range(2, LAST + 1), second)
        found.append((weights(deepspeed, second), through))
        second.destroy()
    return found


def straight(world: World, cases: list[Case]) -> list[Weighed]:
    deepspeed = enter()
    return [weights(deepspeed, train(deepspeed, case, world)) for case in cases]


@pytest.mark.parametrize(
    ("stage", "groups", "cases"), [(0, 1, CASES), (1, 3, CASES), (2, 3, CASES), (3, 1, SOME), (3, 3, CASES)]
)
def test_a_loaded_checkpoint_goes_on_bitwise(
    pool: Pool, stage: int, groups: int, cases: list[Case], tmp_path: Path
) -> None:
    world = World(stage, groups, options={"sub_group_size": 12} if stage == 3 else {})
    found = pool.run(2, both, world, cases, str(tmp_path), timeout=300.0)[0]
    for case, (got, wanted) in zip(cases, found, strict=True):
        assert compared(wanted, got, exact=True) == [], case.name
        assert compared(reference(Key(case), groups), got, exact=False) == [], case.name
        assert compared(reference(Key(case), groups, 2), got, exact=False), f"{case.name} does not move"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_checkpoints_of_bf16_go_on_bitwise(pool: Pool, stage: int, tmp_path: Path) -> None:
    world, cases = World(stage, dtype="bf16"), [LAMB, Case("adamw", "oput_dist.AdamW", {"lr": 0.1}, SECOND)]
    for got, wanted in pool.run(2, both, world, cases, str(tmp_path))[0]:
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


# ------------------------------------------------------------------------------------------- other numbers of ranks


def half(world: World, cases: list[Case], folder: str) -> list[dict[str, Any]]:
    deepspeed, saved = enter(), []
    for case in cases:
        engine = train(deepspeed, case, world, range(2))
        saved.append(full_state(engine, dist.get_rank() == 0))
        if folder:
            engine.save_checkpoint(folder, tag="half")
    return saved


def full_state(engine: Any, keep: bool) -> dict[str, Any]:
    from oput_dist.deepspeed import full_state_dict

    return full_state_dict(engine, keep=keep)


def other_half(world: World, cases: list[Case], saved: list[dict[str, Any]], folder: str) -> list[Weighed]:
    deepspeed, found = enter(), []
    from oput_dist.deepspeed import load_full_state_dict

    for number, case in enumerate(cases):
        engine = engine_of(deepspeed, case, world)
        if folder:
            assert engine.load_checkpoint(folder, tag="half_universal")[0] is not None
        else:
            load_full_state_dict(engine, saved[number])
        train(deepspeed, case, world, range(2, LAST + 1), engine)
        found.append(weights(deepspeed, engine))
    return found


Saved = Callable[[int, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def saved(pool: Pool) -> Saved:
    """The whole state of each case, half-way, on so many ranks at a stage: once for all who go on from it."""
    return functools.cache(lambda n, stage: pool.run(n, half, World(stage), CASES, "", timeout=300.0)[0])


@pytest.mark.parametrize(
    ("before", "after", "cases"),
    [
        ((2, 1), (3, 3), CASES),
        ((3, 3), (2, 2), SOME),
        ((3, 3), (1, 0), CASES),
        ((1, 0), (2, 1), CASES),
    ],
)
def test_whole_state_goes_on_at_any_stage_on_any_ranks(
    pool: Pool, saved: Saved, before: tuple[int, int], after: tuple[int, int], cases: list[Case]
) -> None:
    states = [state for case, state in zip(CASES, saved(*before), strict=True) if case in cases]
    for got in pool.run(after[0], other_half, World(after[1]), cases, states, "", timeout=300.0):
        for case, one in zip(cases, got, strict=True):
            assert compared(reference(Key(case), 3), one, case.exact) == [], case.name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_universal_checkpoints_of_adamw_on_other_ranks(pool: Pool, stage: int, tmp_path: Path) -> None:
    case = Case("adamw", "oput_dist.AdamW", {"lr": 0.1}, SECOND)
    pool.run(2, half, World(stage), [case], str(tmp_path))
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    convert += ["--input_folder", f"{tmp_path}/half", "--output_folder", f"{tmp_path}/half_universal"]
    convert += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run(convert, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=True, capture_output=True, timeout=120)
    world = World(stage, config={"checkpoint": {"load_universal": True}})
    for ranks in (1, 3):
        for (got,) in pool.run(ranks, other_half, world, [case], [{}], str(tmp_path)):
            assert compared(reference(Key(case), 3), got, exact=True) == []


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
