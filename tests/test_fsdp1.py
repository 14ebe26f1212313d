"""FSDP1 hands out flat pieces without shapes: elementwise optimizers are right on them, the others must refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import oput_dist as oput
from tests.pool import Pool


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))


def wrapped(use_orig_params: bool) -> FullyShardedDataParallel:
    return FullyShardedDataParallel(model(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)


def train(module: nn.Module, steps: int = 3) -> None:
    optimizer = oput.AdamW(module.parameters(), lr=0.1)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def difference(use_orig_params: bool) -> float:
    sharded, plain = wrapped(use_orig_params), model()
    train(sharded)
    train(plain)
    with FullyShardedDataParallel.summon_full_params(sharded):
        flat = torch.cat([p.detach().flatten() for p in sharded.parameters()])
        expected = torch.cat([p.detach().flatten() for p in plain.parameters()])
        return float((flat[: len(expected)] - expected).abs().max())


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_elementwise_as_one_process(pool: Pool, use_orig_params: bool) -> None:
    assert pool.run(2, difference, use_orig_params) == [0.0, 0.0]


def refusals() -> list[str]:
    module = wrapped(use_orig_params=True)
    module(torch.ones(2, 5)).sum().backward()
    before = [p.detach().clone() for p in module.parameters()]
    found = []
    for attempt in (
        lambda: oput.Lamb(module).step(),
        lambda: oput.AdamW(module, max_grad_norm=1.0).step(),
        lambda: oput.clip_grad_norm_(module.parameters(), 1.0),
    ):
        with pytest.raises(ValueError, match="FSDP2") as error:
            attempt()
        found.append(str(error.value))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    return found


def test_norms_are_refused_on_every_rank(pool: Pool) -> None:
    for messages in pool.run(2, refusals):
        assert "'_fsdp_wrapped_module.0.weight'" in messages[0]
        assert all("fully_shard" in message for message in messages)
