"""Schedule-free optimizers: the two modes, under every way to hold parameters, and across checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import oput_dist as oput
from tests.pool import Pool
from tests.toy import largest_difference, make, parameters, same, walk

NAMES = ["adamwschedulefree", "sgdschedulefree"]
every = pytest.mark.parametrize("name", NAMES)


def average(name: str, steps: int) -> list[Tensor]:
    """The weighted mean of the iterates z by its definition, and y from it: what eval mode must show."""
    beta, lr, decay, b2 = 0.9, 0.05, 0.1, 0.999
    from tests.toy import tensors

    x = z = [p.detach().double() for p in parameters()]
    v = [torch.zeros_like(p) for p in x]
    total = 0.0
    for t in range(1, steps + 1):
        y = [(1 - beta) * zi + beta * xi for zi, xi in zip(z, x, strict=True)]
        grads = [g.double() for g in tensors(100 + t - 1)]
        if name.startswith("adamw"):
            v = [b2 * vi + (1 - b2) * g**2 for vi, g in zip(v, grads, strict=True)]
            grads = [g / ((vi / (1 - b2**t)).sqrt() + 1e-8) for g, vi in zip(grads, v, strict=True)]
        z = [zi - lr * (g + decay * yi) for zi, g, yi in zip(z, grads, y, strict=True)]
        total += lr**2
        x = [xi + lr**2 / total * (zi - xi) for xi, zi in zip(x, z, strict=True)]
    return x


@every
def test_eval_shows_the_average_and_train_goes_back(name: str) -> None:
    params = parameters()
    optimizer: Any = make(name, params)
    before = walk(optimizer, params, range(5))
    optimizer.eval()
    optimizer.eval()  # twice is once
    assert largest_difference([p.detach().double() for p in params], average(name, 5)) <= 2e-6
    assert largest_difference([p.detach() for p in params], before) > 1e-2
    optimizer.train()
    assert largest_difference([p.detach() for p in params], before) <= 1e-6


@every
def test_a_step_in_eval_mode_is_refused_and_nothing_changes(name: str) -> None:
    params = parameters()
    optimizer: Any = make(name, params)
    walk(optimizer, params, range(2))
    optimizer.eval()
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"in eval mode: call optimizer.train\(\)"):
        optimizer.step()
    assert same([p.detach() for p in params], before)
    optimizer.train()
    walk(optimizer, params, range(2, 3))


@every
def test_before_the_first_step_both_modes_are_the_same(name: str) -> None:
    params = parameters()
    optimizer: Any = make(name, params)
    optimizer.eval()
    optimizer.train()
    assert same([p.detach() for p in params], [p.detach() for p in parameters()])


@every
def test_mode_and_weights_survive_a_state_dict(name: str) -> None:
    params = parameters()
    optimizer: Any = make(name, params, warmup_steps=3)
    walk(optimizer, params, range(4))
    optimizer.eval()
    saved, weights = optimizer.state_dict(), [nn.Parameter(p.detach().clone()) for p in params]
    other: Any = make(name, weights, lr=9.0)
    other.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="eval mode"):
        other.step()
    for each in (optimizer, other):
        each.train()
    assert same(walk(optimizer, params, range(4, 7)), walk(other, weights, range(4, 7)))


@every
def test_a_skipped_step_leaves_the_weights_of_the_average(name: str) -> None:
    params, other = parameters(), parameters()
    optimizer, plain = make(name, params, skip_nonfinite=True), make(name, other)
    for step in range(4):
        if step == 2:
            params[0].grad = torch.full_like(params[0], torch.nan)
            optimizer.step()
        walk(optimizer, params, range(step, step + 1))
        walk(plain, other, range(step, step + 1))
    assert same([p.detach() for p in params], [p.detach() for p in other])


@pytest.mark.parametrize("option", [{"betas": (0.0, 0.9)}, {"warmup_steps": -1}, {"warmup_steps": 1.5}, {"r": -1.0}])
def test_bad_options(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"AdamWScheduleFree: {next(iter(option))}="):
        oput.AdamWScheduleFree(parameters(), **option)


def modes(layout: str, name: str) -> list[list[Tensor]]:
    """The whole parameters in eval mode, and back in train mode, after some steps."""
    torch.manual_seed(0)
    module: nn.Module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 7))
    if layout == "fsdp2":
        fully_shard(module)
    if layout == "fsdp1":
        module = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)
    options = {"shard_group": dist.group.WORLD} if layout == "zero1" else {}
    optimizer: Any = oput.create(name, module, lr=0.1, weight_decay=0.1, **options)
    for step in range(4):
        optimizer.zero_grad()
        module(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    found = []
    for switch in (optimizer.eval, optimizer.train):
        switch()
        with torch.no_grad():  # leaves FSDP's parameters gathered: they must not be taken for new ones
            found.append([module(torch.ones(4, 5))])
        if layout == "fsdp1":
            with FullyShardedDataParallel.summon_full_params(module):
                found.append([p.detach().clone() for p in module.parameters()])
        else:
            wholes = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
            found.append([w.detach().clone() for w in wholes])
    return found


@every
@pytest.mark.parametrize("layout", ["zero1", "fsdp2", "fsdp1"])
def test_modes_under_sharding(pool: Pool, layout: str, name: str) -> None:
    (wanted,) = pool.run(1, modes, "plain", name)
    for found in pool.run(2, modes, layout, name):
        for ours, theirs in zip(found, wanted, strict=True):
            assert largest_difference(ours, theirs) <= 2e-6
    assert largest_difference(wanted[1], wanted[3]) > 1e-3


@every
def test_what_has_not_stepped_is_left_alone(name: str) -> None:
    params = parameters()
    optimizer: Any = make(name, params)
    optimizer.param_groups[0]["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # as torch.distributed.checkpoint makes state
    assert optimizer.state[params[0]]["z"].shape == params[0].shape
    optimizer.eval()
    assert same([p.detach() for p in params], [p.detach() for p in parameters()])


def frozen_between() -> list[Tensor]:
    torch.manual_seed(0)
    module = nn.Linear(3, 4)
    group = {"shard_group": dist.group.WORLD} if dist.get_world_size() > 1 else {}
    optimizer = oput.SGDScheduleFree(module, lr=0.1, **group)
    for step in range(3):
        optimizer.zero_grad()
        module(torch.randn(5, 3, generator=torch.Generator().manual_seed(step))).square().sum().backward()
        optimizer.step()
    module.weight.requires_grad_(False)
    optimizer.eval()
    module.weight.requires_grad_(True)
    optimizer.train()
    return [p.detach().clone() for p in module.parameters()]


def test_a_parameter_frozen_between_the_modes(pool: Pool) -> None:
    (wanted,) = pool.run(1, frozen_between)
    for found in pool.run(2, frozen_between):
        assert largest_difference(found, wanted) <= 1e-6


@every
def test_a_tensor_lr_keeps_the_running_values_numbers(name: str) -> None:
    params, other = parameters(), parameters()
    optimizer, plain = make(name, params, lr=torch.tensor(0.05, dtype=torch.float64)), make(name, other)
    assert same(walk(optimizer, params, range(3)), walk(plain, other, range(3)))
    assert isinstance(optimizer.param_groups[0]["weight_sum"], float)
