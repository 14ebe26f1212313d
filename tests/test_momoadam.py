"""MomoAdam against its authors' code and the formula, alone and over ranks; and its family's warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import momo
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import oput_dist as oput
from tests.formulas import whole_model
from tests.parity import EXACT, STEPS, difference, pull, start
from tests.pool import Pool

LIMIT = 10 * EXACT  # sums in another order
ALONE: list[dict[str, Any]] = [
    {},
    {"lr": 0.3, "weight_decay": 0.1},
    {"lr": 0.3, "weight_decay": 0.1, "divide": False},
    {"lr": 0.5, "betas": (0.5, 0.9), "eps": 1e-3, "lb": -1.0},
    {"lr": 2.0, "weight_decay": 0.1, "use_fstar": True},
    {"lr": 0.5, "use_fstar": True, "lb": -50.0, "betas": (0.8, 0.99)},
    {"lr": 0.5, "use_fstar": True, "lb": 10.0, "betas": (0.8, 0.99)},
]
GROUPS: list[dict[str, Any]] = [
    {"lr": 0.3, "weight_decay": 0.1},
    {"lr": 0.3, "weight_decay": 0.1, "divide": False, "use_fstar": True},
    {"lr": 0.5, "betas": (0.5, 0.9), "decouple_lr": True, "max_lr": 2.0, "weight_decay": 0.1},
    {"lr": 0.5, "decouple_lr": True, "max_lr": 2.0, "weight_decay": 0.1, "divide": False},
]
SECOND = {"lr": 0.05, "weight_decay": 0.07, "lb": -2.0}


@pytest.fixture
def double() -> Iterator[None]:
    """The authors' code keeps an average in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def loss_of(params: list[Tensor]) -> Tensor:
    return torch.stack([(0.15 * (p.detach() - 0.5) ** 2).sum() for p in params]).sum()


def trained(make: Callable[..., Any], settings: dict[str, Any], second: dict[str, Any] | None = None) -> list[Tensor]:
    params = [nn.Parameter(p) for p in start()]
    groups = [{"params": params}] if second is None else [{"params": params[:2]}, {"params": params[2:], **second}]
    optimizer = make(groups, **settings)
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad = pull(p.detach(), i, step)
        optimizer.step(loss=loss_of(params))
    return [p.detach() for p in params]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("settings", ALONE, ids=lambda s: "-".join(s) or "defaults")
def test_equals_the_authors_code(settings: dict[str, Any]) -> None:
    wanted = trained(momo.MomoAdam, settings)
    assert difference(trained(oput.MomoAdam, {**settings, "backend": "eager"}), wanted) <= LIMIT
    assert difference(trained(whole_model.MomoAdam, settings), wanted) <= LIMIT


@pytest.mark.parametrize("backend", ["eager", "foreach"])
@pytest.mark.parametrize("settings", GROUPS, ids=lambda s: "-".join(s))
def test_equals_the_formula_with_two_groups(settings: dict[str, Any], backend: str) -> None:
    """The authors' code lets groups share the bound of the loss that each has changed."""
    wanted = trained(whole_model.MomoAdam, settings, SECOND)
    assert difference(trained(oput.MomoAdam, {**settings, "backend": backend}, SECOND), wanted) <= LIMIT


def sharded(settings: dict[str, Any]) -> list[Tensor]:
    """Rows on all ranks; each rank reports another loss, whose mean is the true one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(p, mesh, [Shard(0)], src_data_rank=None)) for p in start()]
    optimizer = oput.MomoAdam([{"params": params[:2]}, {"params": params[2:], **SECOND}], **settings)
    for step in range(STEPS):
        wholes = [p.detach().full_tensor() for p in params]
        for i, (p, whole) in enumerate(zip(params, wholes, strict=True)):
            p.grad = distribute_tensor(pull(whole, i, step), mesh, [Shard(0)], src_data_rank=None)
        away = dist.get_rank() - (dist.get_world_size() - 1) / 2
        optimizer.step(loss=loss_of(wholes) + away)
    return [p.detach().full_tensor() for p in params]


def test_sums_over_all_parameters_and_the_mean_loss(pool: Pool) -> None:
    for settings in GROUPS[:2]:
        wanted = trained(whole_model.MomoAdam, settings, SECOND)
        for found in pool.run(3, sharded, settings):
            assert difference(found, wanted) <= LIMIT


@pytest.mark.parametrize("cls", [oput.Momo, oput.MomoAdam])
def test_a_group_that_comes_later_knows_the_averages(cls: Any) -> None:
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = cls([p], lb=-1.0)
    for _ in range(3):
        p.grad = torch.ones(3)
        optimizer.step(loss=2.0)
    optimizer.add_param_group({"params": q, "lb": -3.0})
    first, second = optimizer.param_groups
    assert second["updates"] == 3
    assert second["loss_avg"] == first["loss_avg"] > 0
    assert second["dot_avg"] == first["dot_avg"]
    assert second["fstar"] == -3.0
    assert first["fstar"] == -1.0


@pytest.mark.parametrize("cls", [oput.Momo, oput.MomoAdam])
def test_without_the_loss_it_raises_and_nothing_has_changed(cls: Any) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = cls([p])
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"needs the batch loss: call step\(loss=loss\)"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state[p]


def test_momo_warns_of_a_rate_with_which_it_is_sgd() -> None:
    with pytest.warns(UserWarning, match=r"Momo: lr=0\.01 .* as in SGD with momentum: write lr=1\.0"):
        oput.Momo([nn.Parameter(torch.ones(3))], lr=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oput.Momo([nn.Parameter(torch.ones(3))], lr=0.1)
        oput.MomoAdam([nn.Parameter(torch.ones(3))], lr=1e-2)
