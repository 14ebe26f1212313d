"""NaN and infinity: steps that are skipped on all ranks together, and torch's GradScaler."""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import oput_dist as oput
from tests.pool import Pool
from tests.toy import create, every_optimizer, make, parameters, same, tensors, walk

BAD = (math.nan, math.inf, -math.inf)


@every_optimizer
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_gradient_changes_nothing(name: str, bad: float) -> None:
    params = parameters()
    optimizer = make(name, params, skip_nonfinite=True)
    walk(optimizer, params, range(2))
    before = copy.deepcopy((params, optimizer.state_dict()))
    for p, g in zip(params, tensors(5), strict=True):
        p.grad = g
    grad = params[-1].grad
    assert grad is not None
    grad.view(-1)[-1] = bad
    optimizer.step()
    assert optimizer.skipped == 1
    assert same([p.detach() for p in params], [p.detach() for p in before[0]])
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1]["state"], rtol=0, atol=0)
    walk(optimizer, params, range(2, 4))
    other = parameters()
    plain = make(name, other)
    assert same([p.detach() for p in params], walk(plain, other, range(4)))
    assert optimizer.skipped == 1


@pytest.mark.parametrize("bad", [1, "yes", None])
def test_skip_nonfinite_is_true_or_false(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"skip_nonfinite=.*True or False"):
        oput.AdamW(parameters(), skip_nonfinite=bad)


def one_bad_rank(name: str, kind: str) -> tuple[list[list[float]], int, bool, float]:
    """Rank 1 has NaN in its shard, no gradient in one parameter, or none at all; how long the step takes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    params = [nn.Parameter(distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)], src_data_rank=None)) for _ in "ab"]
    optimizer = create(name, params, lr=0.1, skip_nonfinite=True)
    for turn in range(2):
        for p in params:
            p.grad = distribute_tensor(torch.randn(4, 3), mesh, [Shard(0)], src_data_rank=None)
        if turn and dist.get_rank() == 1:
            gradient = params[0].grad
            assert isinstance(gradient, DTensor)
            if kind == "nan":
                gradient.to_local().fill_(math.nan)
            else:
                params[0].grad = None
                params[1].grad = params[1].grad if kind == "one missing" else None
        before = [p.detach().clone() for p in params]
        began = time.monotonic()
        optimizer.step()
        took = time.monotonic() - began
    moved = any(not torch.equal(p.to_local(), b.to_local()) for p, b in zip(params, before, strict=True))
    vectors = [v.to_local().flatten().tolist() for p in params for k, v in optimizer.state[p].items() if "_var" in k]
    return vectors, optimizer.skipped, moved, took


@pytest.mark.parametrize("kind", ["nan", "one missing", "all missing"])
@pytest.mark.parametrize("name", ["adamw", "lamb", "adamp", "adafactor"])
def test_one_rank_cannot_keep_the_others_waiting(pool: Pool, name: str, kind: str) -> None:
    (vectors, skipped, moved, took), (others, *rest) = pool.run(2, one_bad_rank, name, kind, timeout=20.0)
    assert took < 5.0
    assert skipped == rest[0] == (1 if kind == "nan" else 0)
    assert moved == (kind != "nan")
    assert rest[1] == (kind == "one missing")
    assert vectors == others  # row and column statistics are the same on all ranks


# ------------------------------------------------------------------------------------------------------- GradScaler


def scaled(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], overflows: tuple[int, ...]) -> list[float]:
    """Six steps of a loss scaled by 1024 at first; the scales after each."""
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    scales = []
    for step in range(6):
        optimizer.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(params, tensors(100 + step), strict=True))
        scaler.scale(loss).backward()  # type: ignore[arg-type]
        if step in overflows:
            assert params[0].grad is not None
            params[0].grad.view(-1)[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


@every_optimizer
def test_the_scale_of_a_grad_scaler_cancels(name: str) -> None:
    params, other, third = parameters(), parameters(), parameters()
    optimizer = make(name, params, max_grad_norm=1.0)
    assert scaled(optimizer, params, (1, 4)) == [1024.0, 512.0, 512.0, 512.0, 256.0, 256.0]
    assert optimizer.skipped == 2
    wanted = make(name, other, max_grad_norm=1.0)
    for step in (0, 2, 3, 5):
        walk(wanted, other, range(step, step + 1))
    assert same([p.detach() for p in params], [p.detach() for p in other])  # powers of two scale exactly
    unfolded = make(name, third)
    walk(unfolded, third, range(1))
    assert params[0].grad is not None
    assert not same([params[0].grad], [tensors(105)[0]])  # gradients stay as they are, scaled


def scaled_on_ranks(layout: str) -> tuple[list[float], list[Tensor], int]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    scaler = GradScaler("cpu", init_scale=64.0, growth_interval=2)
    wrapped: nn.Module = module
    if layout == "fsdp2":
        fully_shard(module)
    elif layout == "fsdp1":
        wrapped = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)
        # its default group is the one that was there when torch's module was imported: in these workers an old one
        scaler = ShardedGradScaler("cpu", init_scale=64.0, growth_interval=2, process_group=dist.group.WORLD)
    else:
        wrapped = DistributedDataParallel(module)
    options = {"shard_group": dist.group.WORLD} if layout == "zero1" else {}
    optimizer = oput.Lamb(wrapped, lr=0.1, weight_decay=0.1, **options)
    scales = []
    for step in range(4):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        scaler.scale(wrapped(x).square().mean()).backward()
        if step == 1 and (dist.get_rank() == 1 or not layout.startswith("fsdp")):
            gradient = next(p.grad for p in wrapped.parameters() if p.grad is not None)
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).fill_(math.inf)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    if layout == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(wrapped):
            return scales, [p.detach().clone() for p in wrapped.parameters()], optimizer.skipped
    wholes = [p.full_tensor() if isinstance(p, DTensor) else p for p in wrapped.parameters()]
    return scales, [w.detach() for w in wholes], optimizer.skipped


@pytest.mark.parametrize("layout", ["ddp", "zero1", "fsdp2", "fsdp1"])
def test_sharded_ranks_skip_and_scale_together(pool: Pool, layout: str) -> None:
    """With FSDP only rank 1 sees the overflow; with replicas all do. FSDP1's scaler skips the step by itself."""
    ((scales, found, skipped),) = pool.run(1, scaled_on_ranks, "ddp")
    assert skipped == 1
    for rank_scales, params, rank_skipped in pool.run(2, scaled_on_ranks, layout):
        assert rank_scales == scales
        assert rank_skipped == (0 if layout == "fsdp1" else 1)
        for p, wanted in zip(params, found, strict=True):
            torch.testing.assert_close(p, wanted, rtol=0, atol=2e-7)
