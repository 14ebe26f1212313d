"""Roots and bases that are found beside the training: taken over when they should be, also by who goes on elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import oput_dist as oput
from tests.formulas import kronecker as formulas
from tests.parity import pull
from tests.pool import Pool

SHAPES = [(6, 5), (7, 4), (5, 3)]
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.0, "precondition_frequency": 4, "refresh_delay": 2}
BOTH = [oput.Shampoo, oput.SOAP]


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], start: int, stop: int) -> list[Tensor]:
    for step in range(start, stop):
        for i, p in enumerate(params):
            p.grad = pull(p.detach(), i, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def apart(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max((f - w).abs().max().item() for f, w in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("make", "formula"), [(oput.Shampoo, formulas.shampoo), (oput.SOAP, formulas.soap)])
@pytest.mark.parametrize("delay", [1, 3])
def test_what_is_due_is_taken_over_later(make: Any, formula: Callable[..., None], delay: int) -> None:
    """All fall due at the same steps here, but the first time at once."""
    ours = nn.Parameter(torch.linspace(-1, 1, 30, dtype=torch.float64).view(6, 5))
    wanted, prompt, memory = ours.detach().clone(), ours.detach().clone(), [{}, {}]
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.0, "precondition_frequency": 4}
    if make is oput.Shampoo:
        options["eps"] = 1e-4  # the first gradient has a null space, where a smaller one would make much of rounding
    optimizer = make([ours], **options, refresh_delay=delay, stagger=False)
    for step in range(14):
        ours.grad = pull(ours.detach(), 0, step)
        formula(wanted, pull(wanted, 0, step), memory[0], step + 1, **options, delay=delay)
        formula(prompt, pull(prompt, 0, step), memory[1], step + 1, **options)
        optimizer.step()
    assert (ours - wanted).abs().max() < 1e-11
    assert (prompt - wanted).abs().max() > 1e-4


@pytest.mark.parametrize("make", BOTH)
def test_threads_change_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it matter whether there is a thread: what was lost is found from what was kept."""
    params = parameters()
    found = train(make(params, **OPTIONS), params, 0, 13)
    for module in ("shampoo", "soap"):
        monkeypatch.setattr(
            f"oput_dist.matrix.{module}.taken_up",
            lambda held, step, axes, find: find([held[f"waiting_{axis}"][places] for axis, places in axes.items()]),
        )
    params = parameters()
    assert apart(train(make(params, **OPTIONS), params, 0, 13), found) < 1e-13


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("stop", [5, 6, 7, 8])
def test_a_run_goes_on_while_something_is_put_off(make: Any, stop: int) -> None:
    params = parameters()
    optimizer = make(params, **OPTIONS)
    train(optimizer, params, 0, stop)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(others, **OPTIONS)
    other.load_state_dict(saved)
    copied, theirs = copy.deepcopy((optimizer, params))
    wanted = train(optimizer, params, stop, stop + 6)
    assert apart(train(other, others, stop, stop + 6), wanted) < 1e-13
    assert apart(train(copied, theirs, stop, stop + 6), wanted) < 1e-13


@pytest.mark.parametrize("make", BOTH)
def test_a_state_dict_from_before_there_was_a_delay(make: Any) -> None:
    params = parameters()
    optimizer = make(params, **{**OPTIONS, "refresh_delay": 0})
    train(optimizer, params, 0, 6)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["refresh_delay"]
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(others, **OPTIONS)
    other.load_state_dict(saved)
    optimizer.param_groups[0]["refresh_delay"] = OPTIONS["refresh_delay"]  # from now on
    assert apart(train(other, others, 6, 15), train(optimizer, params, 6, 15)) < 1e-13


@pytest.mark.parametrize("make", BOTH)
def test_a_delay_that_was_switched_off(make: Any) -> None:
    params = parameters()
    optimizer = make(params, **OPTIONS)
    train(optimizer, params, 0, 6)
    optimizer.param_groups[0]["refresh_delay"] = 0
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = make(others, **OPTIONS)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert apart(train(other, others, 6, 12), train(optimizer, params, 6, 12)) < 1e-13


def sharded(make: Any, stop: int) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)], src_data_rank=None)) for p in parameters()]
    optimizer = make(params, **OPTIONS)
    for step in range(stop):
        for i, p in enumerate(params):
            whole = pull(p.detach().full_tensor(), i, step)
            p.grad = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
        optimizer.step()
    return [p.detach().full_tensor() for p in params]


@pytest.mark.parametrize("make", BOTH)
def test_the_same_on_two_ranks(pool: Pool, make: Any) -> None:
    params = parameters()
    wanted = train(make(params, **OPTIONS), params, 0, 13)
    for found in pool.run(2, sharded, make, 13):
        assert apart(found, wanted) < 1e-11


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize(("delay", "message"), [(-1, "refresh_delay"), (4, "below precondition_frequency=4")])
def test_bad_delays(make: Any, delay: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(parameters(), precondition_frequency=4, refresh_delay=delay)
