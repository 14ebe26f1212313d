"""What gradient release cannot do, it refuses: when it is prepared, or in the loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import oput_dist as oput
from oput_dist.wrappers.lookahead import Lookahead
from tests.pool import Pool


def prepared() -> tuple[nn.Module, oput.Optimizer]:
    model = nn.Linear(2, 2)
    optimizer = oput.AdamW(model, gradient_release=True)
    oput.prepare_for_gradient_release(model, optimizer)
    return model, optimizer


def test_refused_when_made_or_prepared() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0 cannot go together"):
        oput.AdamW(model, gradient_release=True, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="skip_nonfinite=True cannot go together"):
        oput.AdamW(model, gradient_release=True, skip_nonfinite=True)
    with pytest.raises(ValueError, match="gradient_release='yes'"):
        oput.AdamW(model, gradient_release="yes")  # type: ignore[arg-type]
    prepare: Callable[..., None] = oput.prepare_for_gradient_release
    optimizer = oput.AdamW(model, gradient_release=True)
    with pytest.raises(TypeError, match=r"must be the nn\.Module"):
        prepare(optimizer, model)
    with pytest.raises(TypeError, match="this is a SGD"):
        prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="with Lookahead"):
        prepare(model, Lookahead(optimizer))
    with pytest.raises(ValueError, match="make it with gradient_release=True"):
        prepare(model, oput.AdamW(model))
    with pytest.raises(ValueError, match="no parameter of the model"):
        prepare(other, optimizer)
    model(torch.ones(2)).sum().backward()
    with pytest.raises(ValueError, match=r"'weight' has a gradient from before: call optimizer.step\(\) or zero_grad"):
        prepare(model, optimizer)
    optimizer.zero_grad()
    handle = model.bias.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="'bias' has a post_accumulate_grad hook already"):
        prepare(model, optimizer)
    assert not model.weight._post_accumulate_grad_hooks
    handle.remove()
    prepare(model, optimizer)
    with pytest.raises(ValueError, match="prepared already"):
        prepare(model, optimizer)
    with pytest.raises(ValueError, match="a group cannot be added"):
        optimizer.add_param_group({"params": list(other.parameters())})


def test_refused_in_the_loop() -> None:
    model, optimizer = prepared()
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"step\(closure\) is not possible"):
        optimizer.step(lambda: 0.0)
    for _ in range(2):
        model(x).sum().backward()
    with pytest.raises(RuntimeError, match="2 backward passes came before this step"):
        optimizer.step()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(x).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler is not possible"):
        scaler.step(optimizer)
    del optimizer.grad_scale, optimizer.found_inf
    model.weight.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="'weight' has a gradient that was not released"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.param_groups[0]["lr"] = -1.0
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="lr=-1"):
        model(x).sum().backward()
    assert torch.equal(model.weight, before)
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.zero_grad()
    model(x).sum().backward()  # and after an error it goes on
    assert not torch.equal(model.weight, before)


def test_reentrant_checkpointing_is_refused_and_the_other_is_right() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    for reentrant in (True, False):
        (model, _), (plain, ordinary) = prepared(), prepared()
        oput.remove_gradient_release(plain)
        plain.load_state_dict(model.state_dict())
        y = checkpoint(model, checkpoint(model, x, use_reentrant=reentrant), use_reentrant=reentrant)
        before = model.weight.detach().clone()
        if reentrant:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                y.sum().backward()
            assert torch.equal(model.weight, before)
            continue
        y.sum().backward()
        plain(plain(x)).sum().backward()
        ordinary.step()
        assert torch.equal(model.weight, plain.weight)
        assert not torch.equal(model.weight, before)


def test_a_use_of_the_old_parameter_in_the_same_pass_is_noticed() -> None:
    model, _ = prepared()
    x = torch.ones(2, requires_grad=True)
    y = x * model.bias.detach()  # its backward pass needs the bias as it was
    z = model(y * 1.0)
    z.register_hook(lambda g: None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def refusals() -> None:
    """What several ranks refuse."""
    prepare = oput.prepare_for_gradient_release

    def pair(model: nn.Module, cls: Any = oput.AdamW, **options: Any) -> tuple[nn.Module, oput.Optimizer]:
        return model, cls(model, gradient_release=True, **options)

    with pytest.raises(ValueError, match="several ranks run, and nothing in this model averages"):
        prepare(*pair(nn.Linear(2, 2)))
    ddp = DistributedDataParallel(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="several ranks run"):
        prepare(*pair(ddp.module))
    with pytest.raises(ValueError, match="find_unused_parameters=True"):
        prepare(*pair(DistributedDataParallel(nn.Linear(2, 2), find_unused_parameters=True)))
    with pytest.raises(ValueError, match="static_graph=True"):
        prepare(*pair(DistributedDataParallel(nn.Linear(2, 2), static_graph=True)))
    ddp.register_comm_hook(None, allreduce_hook)
    with pytest.raises(ValueError, match="a communication hook is registered already"):
        prepare(*pair(ddp))
    flat = FullyShardedDataParallel(nn.Linear(2, 2), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ValueError, match="use fully_shard"):
        prepare(*pair(flat))
    with pytest.raises(ValueError, match="several ranks run"):
        prepare(*pair(nn.Linear(2, 2), shard_group=dist.group.WORLD))
    mesh = init_device_mesh("cpu", (2,))
    cut = nn.Linear(2, 2)
    for name, p in list(cut.named_parameters()):
        where = [Shard(0)]
        cut.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, where)))
    with pytest.raises(ValueError, match="fully_shard does not reduce"):
        prepare(*pair(cut))


def test_refused_on_several_ranks(pool: Pool) -> None:
    pool.run(2, refusals)


def test_prepared_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = prepared()
    before = model.weight.detach().clone()
    monkeypatch.setattr("oput_dist.engine.release._ranks", lambda: 2)
    with pytest.raises(RuntimeError, match="before init_process_group"):
        model(torch.ones(2)).sum().backward()
    assert torch.equal(model.weight, before)


def test_evaluation_mode_is_noticed_in_the_backward_pass() -> None:
    model = nn.Linear(2, 2)
    optimizer = oput.AdamWScheduleFree(model, gradient_release=True)
    oput.prepare_for_gradient_release(model, optimizer)
    model(torch.ones(2)).sum().backward()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="is in eval mode"):
        model(torch.ones(2)).sum().backward()
    optimizer.train()
    optimizer.zero_grad()
    model(torch.ones(2)).sum().backward()
