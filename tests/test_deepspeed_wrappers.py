"""Averages of weights and Lookahead, around any optimizer, at every ZeRO stage: as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import oput_dist as oput
from tests.conformance import FAST, SECOND, Case, Key
from tests.deepspeed_worlds import (
    Weighed,
    World,
    compared,
    enter,
    faults,
    gradients,
    grouped,
    made,
    reference,
    start_values,
    train,
    weights,
)
from tests.pool import Pool
from tests.test_deepspeed_checkpoint import half, other_half, resumed, straight


def averaged_lookahead(params: Any, **options: Any) -> Any:
    return oput.EMA(oput.Lookahead(oput.Lamb(params, **options), k=2, alpha=0.25), decay=0.5)


DECAY = {"lr": 0.1, "weight_decay": 0.1}
CASES = [
    Case("ema", "oput_dist.EMA", {"base": oput.AdamW, "decay": 0.5, **DECAY}, SECOND),
    Case("swa", "oput_dist.SWA", {"base": oput.SGD, "start": 1, "lr": 0.1, "momentum": 0.9}, {"lr": 0.05}),
    Case("lawa", "oput_dist.LAWA", {"base": oput.Lion, "window": 2, "every": 1, **DECAY}, SECOND),
    Case("lookahead", "oput_dist.Lookahead", {"base": oput.AdamW, "k": 2, "inner_state": "pullback", **DECAY}, SECOND),
    Case("both", f"{__name__}.averaged_lookahead", DECAY, FAST, exact=False),
]
AVERAGES = [case for case in CASES if case.name != "lookahead"]


@pytest.mark.parametrize("stage", range(4))
def test_weights_are_those_of_one_process(pool: Pool, stage: int) -> None:
    options = {"sub_group_size": 12} if stage == 3 else {}
    found = faults(pool, 2, World(stage, options=options, given="callable"), CASES)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("n", "stage", "dtype"), [(3, 1, "fp32"), (1, 3, "fp32"), (2, 0, "bf16"), (2, 2, "bf16")])
def test_on_other_ranks_and_in_low_precision(pool: Pool, n: int, stage: int, dtype: str) -> None:
    found = faults(pool, n, World(stage, given="callable", dtype=dtype), CASES)
    assert not found, "\n".join(found)


def shown(world: World, cases: list[Case]) -> list[tuple[Weighed, Weighed, list[Weighed]]]:
    """The model's weights inside of ``averaged()``, after it, and what training makes of them then."""
    deepspeed, found = enter(), []
    for case in cases:
        engine = train(deepspeed, case, world)
        with engine.basic_optimizer.averaged():
            inside = weights(deepspeed, engine)
        after = weights(deepspeed, engine)
        train(deepspeed, case, world, range(4, 5), engine)
        found.append((inside, after, [weights(deepspeed, engine)]))
    return found


def averages(case: Case) -> Weighed:
    """One plain process."""
    params = {name: torch.nn.Parameter(value) for name, value in start_values().items()}
    optimizer = (
        made(case, grouped(params, case, 3), backend="eager")
        if case.name != "both"
        else made(case, grouped(params, case, 3))
    )
    for step in range(4):
        for name, g in gradients(step).items():
            params[name].grad = g
        case.advance(optimizer, step)
    with optimizer.averaged():
        return {name: p.detach().numpy().copy() for name, p in params.items()}


@pytest.mark.parametrize("stage", range(4))
def test_the_model_shows_the_average_and_goes_on_from_its_own_weights(pool: Pool, stage: int) -> None:
    for ranks in pool.run(2, shown, World(stage, given="callable"), AVERAGES):
        for case, (inside, after, (further,)) in zip(AVERAGES, ranks, strict=True):
            assert compared(averages(case), inside, case.exact) == [], case.name
            assert compared(reference(Key(case), 3), inside, exact=False), f"{case.name}: no average"
            assert compared(reference(Key(case), 3), after, case.exact) == [], case.name
            assert compared(reference(Key(case), 3, 5), further, case.exact) == [], case.name


@pytest.mark.parametrize("stage", range(4))
def test_checkpoints_go_on_bitwise(pool: Pool, stage: int, tmp_path: Path) -> None:
    world = World(stage, given="callable")
    loaded, through = pool.run(2, resumed, world, CASES, str(tmp_path))[0], pool.run(2, straight, world, CASES)[0]
    for case, got, wanted in zip(CASES, loaded, through, strict=True):
        assert compared(wanted, got, exact=True) == [], case.name


def test_whole_state_goes_on_at_another_stage_on_other_ranks(pool: Pool) -> None:
    saved = pool.run(2, half, World(1, given="callable"), CASES, "")[0]
    for got in pool.run(3, other_half, World(3, given="callable"), CASES, saved, ""):
        for case, one in zip(CASES, got, strict=True):
            assert compared(reference(Key(case), 3), one, case.exact) == [], case.name
