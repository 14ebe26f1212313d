"""FSDP1: what users do around it. The trajectories of all optimizers under it are in tests/test_conformance.py."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import oput_dist as oput
from tests.pool import Pool


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def wrapped(use_orig_params: bool, module: nn.Module | None = None, **options: Any) -> FullyShardedDataParallel:
    options = {"device_id": torch.device("cpu"), "use_orig_params": use_orig_params, **options}
    return FullyShardedDataParallel(module or model(), **options)


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int = 3,
    before_step: Callable[[], None] | None = None,
) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        if before_step is not None:
            before_step()
        optimizer.step()


def whole(module: nn.Module) -> Tensor:
    """All parameters, flat, in the order of the module."""
    with FullyShardedDataParallel.summon_full_params(module, writeback=False):
        return torch.cat([p.detach().flatten() for p in module.parameters()])


def distance(sharded: nn.Module, plain: nn.Module) -> float:
    """Largest difference from what one process got, relative to how far it went."""
    wanted, start = whole(plain), whole(model())
    return float((whole(sharded)[: len(wanted)] - wanted).abs().max() / (wanted - start).abs().max())


def bare(use_orig_params: bool) -> float:
    sharded, plain = wrapped(use_orig_params), model()
    for module in (sharded, plain):
        train(module, oput.AdamW(module.parameters(), lr=0.1))
    return distance(sharded, plain)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_elementwise_takes_bare_parameters(pool: Pool, use_orig_params: bool) -> None:
    assert pool.run(2, bare, use_orig_params) == [0.0, 0.0]


def refusals(use_orig_params: bool) -> list[str]:
    module = wrapped(use_orig_params)
    module(torch.ones(2, 5)).sum().backward()
    before = [p.detach().clone() for p in module.parameters()]
    found = []
    for attempt in (
        lambda: oput.Lamb(module.parameters()).step(),
        lambda: oput.AdamW(module.parameters(), max_grad_norm=1.0).step(),
        lambda: oput.clip_grad_norm_(list(module.parameters()), 1.0),
        lambda: oput.AdamW(module, shard_group=torch.distributed.group.WORLD).step(),
    ):
        with pytest.raises(ValueError, match="FSDP1") as error:
            attempt()
        found.append(str(error.value))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    return found


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_norms_of_bare_parameters_are_refused_on_every_rank(pool: Pool, use_orig_params: bool) -> None:
    for messages in pool.run(2, refusals, use_orig_params):
        assert all("pass the wrapped module" in message for message in messages[:3])
        assert "module=fsdp_module" in messages[0]
        assert "leave shard_group out" in messages[3]
        assert ("'0.weight'" if use_orig_params else "'_flat_param'") in messages[3]


def disturbed(use_orig_params: bool, strategy: str) -> float:
    """What moves or replaces the views of parameters between steps must not disturb the optimizer."""
    sharded, plain = wrapped(use_orig_params, sharding_strategy=ShardingStrategy[strategy]), model()
    ours, theirs = oput.Lamb(sharded, lr=0.1, weight_decay=0.1), oput.Lamb(plain, lr=0.1, weight_decay=0.1)

    def look() -> None:
        with torch.no_grad():
            sharded.eval()(torch.ones(2, 5))
        sharded.train()

    def rewrite() -> None:
        with FullyShardedDataParallel.summon_full_params(sharded, writeback=True):
            pass

    def move() -> None:
        """Between backward and the step; FSDP1 writes it back to its flat parameter before the next forward."""
        train(sharded, ours, 1, before_step=clone if use_orig_params else None)
        train(plain, theirs, 1)

    def clone() -> None:
        for p in sharded.parameters():
            p.data = p.data.clone()

    def reload() -> None:
        sharded.load_state_dict(sharded.state_dict())

    def idle() -> None:
        ours.zero_grad()
        ours.step()

    for disturb in (look, rewrite, move, reload, idle):
        train(sharded, ours, 2)
        train(plain, theirs, 2)
        disturb()
    train(sharded, ours, 2)
    train(plain, theirs, 2)
    return distance(sharded, plain)


@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD"])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_lamb_through_evaluation_summoning_moving_and_loading(pool: Pool, use_orig_params: bool, strategy: str) -> None:
    for error in pool.run(2, disturbed, use_orig_params, strategy):
        assert error <= 1e-6


def copies(use_orig_params: bool) -> tuple[float, str]:
    module = wrapped(use_orig_params)
    optimizer = oput.Lamb(module, lr=0.1, weight_decay=0.1)  # without decay Lamb takes no norms
    train(module, optimizer)
    twin = copy.deepcopy(optimizer)
    for group, other in zip(optimizer.param_groups, twin.param_groups, strict=True):
        for p, q in zip(group["params"], other["params"], strict=True):
            q.grad = p.grad
    optimizer.step()
    twin.step()
    apart = 0.0
    for p, q in zip(optimizer.param_groups[0]["params"], twin.param_groups[0]["params"], strict=True):
        assert p is not q
        apart = max(apart, float((p - q).abs().max()) if p.numel() else 0.0)
    with pytest.raises(TypeError) as error:
        pickle.dump(optimizer, io.BytesIO())
    return apart, str(error.value)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_copies_keep_shapes_and_pickles_are_refused(pool: Pool, use_orig_params: bool) -> None:
    for apart, message in pool.run(2, copies, use_orig_params):
        assert apart == 0.0
        assert "save its state_dict()" in message


def frozen() -> float:
    """FSDP1 may mix trained and frozen parameters in one flat parameter if it keeps the original ones."""
    modules = [model(), model()]
    for module in modules:
        module[0].weight.requires_grad_(False)
    sharded, plain = wrapped(True, modules[0]), modules[1]
    for module in (sharded, plain):
        train(module, oput.Lamb(module, lr=0.1, max_grad_norm=0.1))
    return distance(sharded, plain)


def test_frozen_parameters_in_a_flat_one(pool: Pool) -> None:
    for error in pool.run(2, frozen):
        assert error <= 1e-6


class Tied(nn.Module):
    """Two modules that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.out = nn.Linear(5, 7, bias=False), nn.Linear(5, 7)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x)[:, :5])


def tied(wrap: Callable[[nn.Module], nn.Module]) -> tuple[float, list[str]]:
    sharded, plain = wrap(Tied()), Tied()
    ours, theirs = (oput.Lamb(m, lr=0.1, max_grad_norm=0.5) for m in (sharded, plain))
    train(sharded, ours)
    train(plain, theirs)
    wanted, start = whole(plain), whole(Tied())
    error = float((whole(sharded)[: len(wanted)] - wanted).abs().max() / (wanted - start).abs().max())
    return error, ours.param_groups[0]["param_names"]


def fsdp1_orig(module: nn.Module) -> nn.Module:
    return wrapped(True, module)


def fsdp1_flat(module: nn.Module) -> nn.Module:
    return wrapped(False, module)


@pytest.mark.parametrize("wrap", [fsdp1_orig, fsdp1_flat])
def test_a_shared_parameter_is_counted_once(pool: Pool, wrap: Callable[[nn.Module], nn.Module]) -> None:
    for error, names in pool.run(2, tied, wrap):
        assert error <= 1e-6
        assert names == (["embed.weight", "out.bias"] if wrap is fsdp1_orig else ["_flat_param"])
