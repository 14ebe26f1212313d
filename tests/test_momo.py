"""Momo: the step size from the loss, against the formula, and what only an optimizer of the whole model has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import oput_dist as oput
from tests.parity import EXACT, STEPS, difference, pull, start
from tests.pool import Pool

SECOND = {"lr": 0.003, "weight_decay": 0.07}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"bias_correction": True, "lr": 0.2, "weight_decay": 0.1},
    {"use_fstar": True, "lb": -1.0, "lr": 0.5, "beta": 0.5},
    {"use_fstar": True, "bias_correction": True, "lr": 2.0},
]


def loss_of(params: list[Tensor]) -> Tensor:
    return torch.stack([(0.15 * (p - 0.5) ** 2).sum() for p in params]).sum()


class Formula:
    """Momo in plain numbers, written from the paper: one group's step."""

    def __init__(
        self,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        beta: float = 0.9,
        lb: float = 0.0,
        bias_correction: bool = False,
        use_fstar: bool = False,
    ) -> None:
        self.lr, self.weight_decay, self.beta, self.lb = lr, weight_decay, beta, lb
        self.bias_correction, self.use_fstar, self.fstar = bias_correction, use_fstar, lb

    def tau(self, t: int, f: float, gamma: float, pd: float, dd: float) -> float:
        rho = 1 - self.beta**t if self.bias_correction else 1.0
        a = 1 + self.lr * self.weight_decay
        if self.use_fstar and a * f + pd - a * gamma < a * rho * self.fstar:
            self.fstar = max((a * f + pd - a * gamma) / (2 * a * rho), self.lb)
        tau = min(self.lr / rho, max(a * (f - rho * self.fstar - gamma) + pd, 0.0) / dd)
        if self.use_fstar:
            self.fstar = max((f + pd - gamma - tau * dd / 2) / rho, self.lb)
        return tau


def by_formula(settings: dict[str, Any]) -> list[Tensor]:
    params = start()
    groups = [Formula(**settings), Formula(**{**settings, **SECOND})]
    beta = groups[0].beta
    f = gamma = 0.0
    averages = [torch.zeros_like(p) for p in params]
    for t in range(1, STEPS + 1):
        grads = [pull(p, i, t - 1) for i, p in enumerate(params)]
        old = 0.0 if t == 1 and not groups[0].bias_correction else beta
        f = old * f + (1 - old) * loss_of(params).item()
        gamma = old * gamma + (1 - old) * sum((g * p).sum().item() for g, p in zip(grads, params, strict=True))
        averages = [old * d + (1 - old) * g for d, g in zip(averages, grads, strict=True)]
        pd = sum((d * p).sum().item() for d, p in zip(averages, params, strict=True))
        dd = sum((d * d).sum().item() for d in averages)
        taus = [group.tau(t, f, gamma, pd, dd) for group in groups]
        shrink = [1 + group.lr * group.weight_decay for group in groups]
        params = [(p - taus[i // 2] * averages[i]) / shrink[i // 2] for i, p in enumerate(params)]
    return params


def trained(settings: dict[str, Any], backend: str, closure: bool = False) -> list[Tensor]:
    params = [nn.Parameter(p) for p in start()]
    optimizer = oput.Momo([{"params": params[:2]}, {"params": params[2:], **SECOND}], backend=backend, **settings)
    for step in range(STEPS):

        def evaluate(step: int = step) -> Tensor:
            for i, p in enumerate(params):
                p.grad = pull(p.detach(), i, step)
            return loss_of([p.detach() for p in params])

        if closure:
            optimizer.step(evaluate)
        else:
            optimizer.step(loss=evaluate())
    return [p.detach() for p in params]


@pytest.mark.parametrize("backend", ["eager", "foreach"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "defaults")
def test_equals_the_formula(settings: dict[str, Any], backend: str) -> None:
    assert difference(trained(settings, backend), by_formula(settings)) <= 10 * EXACT


def test_a_closure_gives_the_loss() -> None:
    assert difference(trained({}, "eager", closure=True), trained({}, "eager")) == 0.0


def test_without_the_loss_it_raises_and_nothing_has_changed() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = oput.Momo([p])
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"needs the batch loss: call step\(loss=loss\)"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state[p]


def test_running_scalars_survive_a_state_dict() -> None:
    def steps(optimizer: Any, p: nn.Parameter, numbers: range) -> None:
        for i in numbers:
            p.grad = pull(p.detach(), 0, i)
            optimizer.step(loss=loss_of([p.detach()]))

    settings = {"use_fstar": True, "bias_correction": True, "lr": 2.0}
    p, q = nn.Parameter(start()[0]), nn.Parameter(start()[0])
    first = oput.Momo([p], **settings)
    steps(first, p, range(4))
    q.data.copy_(p.detach())
    second = oput.Momo([q], **settings)
    second.load_state_dict(first.state_dict())
    steps(first, p, range(4, 7))
    steps(second, q, range(4, 7))
    assert torch.equal(p, q)


def sharded(settings: dict[str, Any]) -> list[Tensor]:
    """FSDP-like rows on all ranks; each rank reports another loss, whose mean is the true one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [nn.Parameter(distribute_tensor(p, mesh, [Shard(0)], src_data_rank=None)) for p in start()]
    optimizer = oput.Momo([{"params": params[:2]}, {"params": params[2:], **SECOND}], **settings)
    for step in range(STEPS):
        wholes = [p.detach().full_tensor() for p in params]
        for i, (p, whole) in enumerate(zip(params, wholes, strict=True)):
            p.grad = distribute_tensor(pull(whole, i, step), mesh, [Shard(0)], src_data_rank=None)
        away = dist.get_rank() - (dist.get_world_size() - 1) / 2
        optimizer.step(loss=loss_of(wholes) + away)
    return [p.detach().full_tensor() for p in params]


@pytest.mark.parametrize("n", [2, 3])
def test_sums_over_all_parameters_and_the_mean_loss(pool: Pool, n: int) -> None:
    for settings in SETTINGS[1:3]:
        wanted = by_formula(settings)
        for found in pool.run(n, sharded, settings):
            assert difference(found, wanted) <= 10 * EXACT


@pytest.mark.parametrize("name", ["Momo", "MomoAdam"])
def test_ascending_minus_the_loss_is_descending(name: str) -> None:
    ends = []
    for sign in (1.0, -1.0):
        params = [nn.Parameter(p) for p in start()]
        optimizer = getattr(oput, name)(params, lr=0.5, maximize=sign < 0)
        for step in range(6):
            for i, p in enumerate(params):
                p.grad = sign * pull(p.detach(), i, step)
            optimizer.step(loss=sign * loss_of([p.detach() for p in params]))
        ends.append([p.detach() for p in params])
    assert difference(*ends) == 0.0
