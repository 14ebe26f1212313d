"""Optimizer accumulation: gradients go into the state, and parameters stay until a step that is meant to move them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optimi
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import oput_dist as oput
from oput_dist.optimizers import OPTIMIZERS
from oput_dist.wrappers.lookahead import Lookahead
from tests import releasing
from tests.pool import Pool
from tests.toy import create, make, parameters, same, tensors, walk

EVERY = 3


def accumulates(name: str) -> bool:
    try:
        create(name, parameters()).optimizer_accumulation = True
    except ValueError:
        return False
    return True


YES = [name for name in OPTIMIZERS if accumulates(name)]
SAME: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Any], dict[str, Any]]] = {
    "adam": (oput.Adam, optimi.Adam, {"betas": (0.9, 0.99), "eps": 1e-6}, {}),
    "adamw": (oput.AdamW, optimi.AdamW, {"betas": (0.9, 0.99), "eps": 1e-6}, {}),
    "lion": (oput.Lion, optimi.Lion, {}, {}),
    "sgd": (oput.SGD, optimi.SGD, {"momentum": 0.9}, {"momentum": 0.9}),
    "sgdw": (
        oput.SGDW,
        optimi.SGD,
        {"momentum": 0.9, "dampening": True},
        {"momentum": 0.9, "dampening": True, "decouple_wd": True},
    ),
    "adan": (oput.Adan, optimi.Adan, {"eps": 1e-6}, {}),
    "stableadamw": (oput.StableAdamW, optimi.StableAdamW, {"betas": (0.9, 0.99), "eps": 1e-6}, {}),
}


def released(make: Callable[..., Any], prepare: Callable[..., None], options: dict[str, Any]) -> list[Tensor]:
    """Twelve backward passes, of which every fourth moves parameters: where they are after each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    optimizer = make(model.parameters(), lr=0.05, weight_decay=0.1, gradient_release=True, **options)
    prepare(model, optimizer)
    drawn, found = torch.Generator().manual_seed(3), []
    for i in range(12):
        optimizer.optimizer_accumulation = (i + 1) % 4 != 0
        model(torch.randn(6, 5, generator=drawn, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found += [p.detach().clone() for p in model.parameters()]
    return found


@pytest.mark.parametrize("name", SAME)
def test_trajectories_are_those_of_optimi(name: str) -> None:
    ours, theirs, our_options, their_options = SAME[name]
    found = released(ours, oput.prepare_for_gradient_release, our_options)
    wanted = released(theirs, optimi.prepare_for_gradient_release, their_options)
    assert max((f - w).abs().max().item() for f, w in zip(found, wanted, strict=True)) < 1e-15
    assert not torch.equal(found[0], found[-4])


@pytest.mark.parametrize("name", YES)
def test_a_step_that_accumulates_is_one_without_decay_that_is_taken_back(name: str) -> None:
    params, others = parameters(), parameters()
    optimizer, other = make(name, params), make(name, others)
    for step in range(2 * EVERY):
        moves = (step + 1) % EVERY == 0
        before = [p.detach().clone() for p in params]
        optimizer.optimizer_accumulation = not moves
        walk(optimizer, params, range(step, step + 1))
        other.param_groups[0]["weight_decay"] = 0.1 if moves else 0.0
        counts = {k: v for k, v in other.param_groups[0].items() if k == "steps_since_refresh"}
        walk(other, others, range(step, step + 1))
        if not moves:
            assert same(params, before)
            other.param_groups[0].update(counts)
            with torch.no_grad():
                for p, value in zip(others, before, strict=True):
                    p.copy_(value)
    assert same(params, others)
    assert not same(params, tensors(0))
    for p, q in zip(params, others, strict=True):
        assert all(torch.equal(optimizer.state[p][k], other.state[q][k]) for k in other.state[q])
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.1}


def test_sgd_moves_by_the_sum_of_all_gradients() -> None:
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = oput.SGD([p], lr=1.0, momentum=0.5)
    for i, gradient in enumerate([1.0, 10.0, 100.0, 1000.0]):
        optimizer.optimizer_accumulation = i < 3
        p.grad = torch.full_like(p, gradient)
        optimizer.step()
    assert p.item() == -(1 / 8 + 10 / 4 + 100 / 2 + 1000)
    assert optimizer.state[p]["step"].item() == 4


def spread(wrap: str, options: dict[str, Any]) -> list[Any]:
    """Parameters after three steps of two passes each, with gradient release."""
    given = {"shard_group": dist.group.WORLD} if options.pop("zero1", False) else {}
    model, optimizer = releasing.started(wrap, "lamb", True, dtype=torch.float64, **options, **given)
    for step in range(6):
        optimizer.optimizer_accumulation = step % 2 == 0
        model(releasing.batch(step)).backward()
        if step == 0:
            before = [p.detach().clone() for p in model.parameters()]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    assert not torch.equal(whole[0], before[0].full_tensor() if isinstance(before[0], DTensor) else before[0])
    return [p.detach().numpy() for p in whole]


def test_sharded_as_replicated(pool: Pool) -> None:
    wanted = pool.run(2, spread, "ddp", {})
    for found in (*pool.run(2, spread, "fsdp2", {}), *pool.run(2, spread, "ddp", {"zero1": True})):
        assert max(abs(f - w).max() for f, w in zip(found, wanted[0], strict=True)) < 1e-14


REFUSALS = {
    "plain sgd": (lambda p: oput.SGD(p), "no state, and no average of gradients"),
    "rmsprop": (lambda p: oput.RMSprop(p), "square_avg, and no average"),
    "adafactor": (lambda p: oput.Adafactor(p), "no average of gradients"),
    "schedule-free": (lambda p: oput.AdamWScheduleFree(p), "z, exp_avg_sq, and no average"),
    "prodigy": (lambda p: oput.Prodigy(p), "sums over the whole model"),
    "muon": (lambda p: oput.Muon(p), "whole matrices"),
    "ranger": (lambda p: oput.Ranger(p), "lookahead"),
    "accsgd": (lambda p: oput.AccSGD(p), "average of places"),
    "swats": (lambda p: oput.SWATS(p), "go on as SGD"),
    "amos": (lambda p: oput.Amos(p, momentum=0.9), "decay grows"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_would_lose_gradients_is_refused(case: str) -> None:
    make, why = REFUSALS[case]
    optimizer = make([nn.Parameter(torch.zeros(3, 4))])
    with pytest.raises(ValueError, match=why):
        optimizer.optimizer_accumulation = True
    assert not optimizer.optimizer_accumulation
    optimizer.optimizer_accumulation = False


def test_bad_values_and_wrappers() -> None:
    optimizer = oput.AdamW(parameters())
    with pytest.raises((TypeError, ValueError), match="optimizer_accumulation=1"):
        optimizer.optimizer_accumulation = 1  # type: ignore[assignment]
    wrapped = Lookahead(optimizer)
    with pytest.raises(TypeError, match="Lookahead"):
        wrapped.optimizer_accumulation = True
    assert not wrapped.optimizer_accumulation
