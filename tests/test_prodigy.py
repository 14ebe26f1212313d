"""Prodigy and DAdaptAdam: one estimate for all groups and ranks, without the loss."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import oput_dist as oput
from tests.cases.whole_model import APART, ESTIMATED, START
from tests.formulas import whole_model
from tests.parity import STEPS, difference, pull, start, train
from tests.pool import Pool

CLASSES = [oput.Prodigy, oput.DAdaptAdam]
both = pytest.mark.parametrize("cls", CLASSES)


def walk(optimizer: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for i, p in enumerate(params):
            p.grad = pull(p.detach(), i, step)
        optimizer.step()


def estimates(optimizer: Any) -> list[float]:
    return [float(group["d"]) for group in optimizer.param_groups]


@both
def test_the_estimate_grows_and_is_one_for_all_groups(cls: Any) -> None:
    params = [nn.Parameter(p) for p in start()]
    optimizer = cls([{"params": params[:2]}, {"params": params[2:], "lr": 0.5, "betas": (0.8, 0.9)}], d0=1e-4)
    seen = []
    for step in range(40):
        walk(optimizer, params, range(step, step + 1))
        first, second = estimates(optimizer)
        assert first == second
        seen.append(first)
    assert seen[0] == 1e-4
    assert seen == sorted(seen)
    assert seen[-1] > 1e-3


@both
def test_a_group_that_comes_later_has_the_estimate_of_the_others(cls: Any) -> None:
    params = [nn.Parameter(p) for p in start()]
    optimizer = cls([{"params": params[:2], "d0": 1e-3}], d0=1e-6)
    walk(optimizer, params[:2], range(8))
    assert estimates(optimizer)[0] > 1e-3
    optimizer.add_param_group({"params": params[2:]})
    first, second = optimizer.param_groups
    assert second["d0"] == 1e-3
    for name in optimizer.recipe(first, (1,)).kept:
        assert first[name] == second[name]
    walk(optimizer, params, range(8, 12))
    assert estimates(optimizer)[0] == estimates(optimizer)[1]


@both
@pytest.mark.parametrize(("name", "value"), [("d0", 1e-3), ("growth_rate", 1.5)])
def test_groups_share_what_the_estimate_follows_from(cls: Any, name: str, value: float) -> None:
    params = [nn.Parameter(p) for p in start()]
    optimizer = cls(params[:2])
    with pytest.raises(ValueError, match=rf"{name}={value} is not allowed: must be .* as in the first group"):
        optimizer.add_param_group({"params": params[2:], name: value})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=rf"{name}=-1 is not allowed: must be a"):
        optimizer.add_param_group({"params": params[2:], name: -1})
    optimizer.add_param_group({"params": params[2:], name: optimizer.defaults[name]})


@both
@pytest.mark.parametrize("value", [0.99, math.nan, "fast", True, None])
def test_growth_rate_is_at_least_one(cls: Any, value: Any) -> None:
    with pytest.raises(ValueError, match=r"growth_rate=.* is not allowed: must be a number >= 1, math.inf"):
        cls([nn.Parameter(torch.ones(2))], growth_rate=value)


@both
def test_what_is_bounded_grows_no_faster(cls: Any) -> None:
    """But Prodigy's first estimate beyond ``d0`` is taken as it is."""
    params = [nn.Parameter(p) for p in start()]
    optimizer = cls(params, d0=1e-4, growth_rate=1.1)
    seen = []
    for step in range(23):
        walk(optimizer, params, range(step, step + 1))
        seen.append(estimates(optimizer)[0])
    grown = [now / before for before, now in itertools.pairwise(seen) if before > 1e-4]
    assert max(grown) <= 1.1 * (1 + 1e-12)
    assert sum(ratio > 1.09 for ratio in grown) > 5


@both
def test_without_gradients_or_with_zeros_the_estimate_stays(cls: Any) -> None:
    params = [nn.Parameter(p) for p in start()]
    optimizer = cls(params, d0=1e-3)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, s) for p, s in zip(params, start(), strict=True))
    assert estimates(optimizer) == [1e-3]
    walk(optimizer, params, range(8))
    kept = {
        name: float(optimizer.param_groups[0][name]) for name in optimizer.recipe(optimizer.param_groups[0], (1,)).kept
    }
    assert kept["d"] > 1e-3
    optimizer.zero_grad()
    optimizer.step()
    assert kept == {name: float(optimizer.param_groups[0][name]) for name in kept}


@both
def test_the_estimate_survives_a_state_dict_and_a_copy(cls: Any) -> None:
    params = [nn.Parameter(p) for p in start()]
    optimizer = cls(params, **START)
    walk(optimizer, params, range(6))
    ends = []
    for way in ("state dict", "copy"):
        if way == "copy":
            other, others = copy.deepcopy((optimizer, params))
        else:
            others = [nn.Parameter(p.detach().clone()) for p in params]
            other = cls(others, **{**START, "d0": 1e-6})
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        walk(other, others, range(6, 12))
        ends.append(([p.detach() for p in others], estimates(other)))
    walk(optimizer, params, range(6, 12))
    for found, d in ends:
        assert all(torch.equal(f, p) for f, p in zip(found, params, strict=True))
        assert d == estimates(optimizer)


def sharded(name: str, settings: dict[str, Any], missing: int | None) -> tuple[list[Tensor], list[float]]:
    """Rows on all ranks, of which one may have no gradients, or be given a loss that nobody needs."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(p, mesh, [Shard(0)], src_data_rank=None)) for p in start()]
    optimizer = getattr(oput, name)([{"params": params[:2]}, {"params": params[2:], **APART}], **settings)
    for step in range(STEPS):
        wholes = [p.detach().full_tensor() for p in params]
        for i, (p, whole) in enumerate(zip(params, wholes, strict=True)):
            gradient = distribute_tensor(pull(whole, i, step), mesh, [Shard(0)], src_data_rank=None)
            p.grad = None if dist.get_rank() == missing and step == 5 else gradient
        optimizer.step(lambda: float(dist.get_rank()))
    whole = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]
    return whole, estimates(optimizer)


@pytest.mark.parametrize("name", ["Prodigy", "DAdaptAdam"])
def test_all_ranks_have_one_estimate(pool: Pool, name: str) -> None:
    settings = {**START, "decouple": True}
    wanted = train(getattr(whole_model, name), settings, APART)
    for found, _ in pool.run(3, sharded, name, settings, None):
        assert difference(found, wanted) <= ESTIMATED
    everyone = pool.run(3, sharded, name, settings, 1)
    assert len({d for _, estimated in everyone for d in estimated}) == 1
    assert difference(everyone[0][0], wanted) > ESTIMATED
