"""What every torch.optim.Optimizer promises, for every optimizer of the suite."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import oput_dist as oput
from tests.toy import (
    NAMES,
    NORMS,
    create,
    every_optimizer,
    largest_difference,
    make,
    parameters,
    same,
    tensors,
    trajectory,
    walk,
)

# ------------------------------------------------------------------------------------------------- calling step()


@every_optimizer
def test_closure_runs_once_with_gradients_and_its_loss_comes_back(name: str) -> None:
    params = parameters()
    optimizer = make(name, params)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        calls.append(loss)
        return loss

    with torch.no_grad():
        returned = optimizer.step(closure)
    assert calls == [returned]
    other = parameters()
    plain = make(name, other)
    for p in other:
        p.grad = 2 * p.detach()
    assert plain.step() is None
    assert same(params, other)


@every_optimizer
def test_hooks_and_profiler_label(name: str) -> None:
    params = parameters()
    optimizer = make(name, params)
    seen = []
    optimizer.register_step_pre_hook(lambda *args: seen.append(("before", params[0].detach().clone())))
    optimizer.register_step_post_hook(lambda *args: seen.append(("after", params[0].detach().clone())))
    start = params[0].detach().clone()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        end = walk(optimizer, params, range(1))[0]
    assert [word for word, _ in seen] == ["before", "after"]
    assert torch.equal(seen[0][1], start)
    assert torch.equal(seen[1][1], end)
    assert f"Optimizer.step#{type(optimizer).__name__}.step" in {event.key for event in profile.key_averages()}


@every_optimizer
def test_gradients_are_never_modified(name: str) -> None:
    for options in ({}, {"maximize": True}, {"max_grad_norm": 0.1}, {"backend": "eager"}):
        params = parameters()
        optimizer = make(name, params, **options)
        grads = tensors(7)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        kept = [p.grad for p in params]
        optimizer.step()
        assert all(p.grad is k for p, k in zip(params, kept, strict=True))
        assert same(kept, grads)


@every_optimizer
def test_zero_grad(name: str) -> None:
    params = parameters()
    optimizer = make(name, params)
    walk(optimizer, params, range(1))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@every_optimizer
def test_parameters_without_gradient_are_skipped(name: str) -> None:
    params = parameters()
    optimizer = make(name, params)
    walk(optimizer, params, range(2))
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state[params[1]])
    for p, g in zip(params, tensors(5), strict=True):
        p.grad = g
    params[1].grad = None
    optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [False, True, False, False]
    assert all(torch.equal(v, optimizer.state[params[1]][k]) for k, v in state.items())
    assert optimizer.state[params[0]]["step"] == 3


@every_optimizer
def test_maximize_climbs_what_minimize_descends(name: str) -> None:
    params = parameters()
    optimizer = make(name, params, maximize=True)
    for step in range(4):
        for p, g in zip(params, tensors(100 + step), strict=True):
            p.grad = -g
        optimizer.step()
    assert same(params, trajectory(name, 4))


@every_optimizer
def test_eager_and_foreach_agree(name: str) -> None:
    """To the last bit, except that backends add up norms in different orders."""
    for options in ({}, {"maximize": True}, {"decouple_lr": True, "weight_decay": 1e-3}, {"max_grad_norm": 0.5}):
        exact = name not in NORMS and "max_grad_norm" not in options
        eager = trajectory(name, backend="eager", **options)
        for choice in ({"backend": "foreach"}, {"foreach": True}, {}):
            found = trajectory(name, **choice, **options)
            assert largest_difference(found, eager) <= (0.0 if exact else 5e-7)


@every_optimizer
def test_grad_scaler_unscales_and_skips_overflow(name: str) -> None:
    params, scaled = parameters(), parameters()
    reference, optimizer = make(name, params), make(name, scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for step in range(4):
        factors = tensors(100 + step)
        optimizer.zero_grad()
        loss = sum((p * factor).sum() for p, factor in zip(scaled, factors, strict=True))
        if step == 2:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            walk(reference, params, range(step, step + 1))
    assert scaler.get_scale() == 512.0
    assert same(scaled, params)


# ------------------------------------------------------------------------------------------------- learning rates


@every_optimizer
def test_lambda_schedule_equals_setting_lr_by_hand(name: str) -> None:
    params, other = parameters(), parameters()
    optimizer, by_hand = make(name, params), make(name, other)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(5):
        walk(optimizer, params, range(step, step + 1))
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 0.05 * 0.5**step
        walk(by_hand, other, range(step, step + 1))
    assert same(params, other)


@every_optimizer
def test_one_cycle_schedule_drives_lr_and_momentum(name: str) -> None:
    params, other = parameters(), parameters()
    optimizer, by_hand = make(name, params), make(name, other)
    momentum = any(key in optimizer.defaults for key in ("betas", "momentum"))
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=8, cycle_momentum=momentum)
    lrs = []
    for step in range(6):
        group = optimizer.param_groups[0]
        by_hand.param_groups[0].update({k: group[k] for k in ("lr", "momentum", "betas") if k in group})
        lrs.append(group["lr"])
        walk(optimizer, params, range(step, step + 1))
        walk(by_hand, other, range(step, step + 1))
        scheduler.step()
    assert len(set(lrs)) == 6
    assert same(params, other)


@every_optimizer
def test_tensor_lr_equals_float_lr(name: str) -> None:
    lr = torch.tensor(0.05, dtype=torch.float64)
    params = parameters()
    optimizer = make(name, params, lr=lr)
    walk(optimizer, params, range(3))
    lr.mul_(0.5)  # in place, as a scheduler does it
    found = walk(optimizer, params, range(3, 5))
    other = parameters()
    plain = make(name, other)
    walk(plain, other, range(3))
    plain.param_groups[0]["lr"] = 0.025
    assert same(found, walk(plain, other, range(3, 5)))


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_a_schedule_of_100_steps_recompiles_nothing(tensor_lr: bool) -> None:
    params = parameters()
    optimizer = make("lamb", params, lr=torch.tensor(0.05) if tensor_lr else 0.05, backend="compile")
    scheduler = LambdaLR(optimizer, lambda step: 0.97**step)
    walk(optimizer, params, range(2))
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(100):
            scheduler.step()
            walk(optimizer, params, range(step, step + 1))
        double = parameters(torch.float64)
        with pytest.raises(RuntimeError, match="recompile"):  # the guard bites: another dtype would need a program
            walk(make("lamb", double, backend="compile"), double, range(1))
    assert optimizer.state[params[0]]["step"] == 102


# ------------------------------------------------------------------------------------------- parameters and groups


@every_optimizer
def test_every_way_to_give_parameters(name: str) -> None:
    module = nn.Module()
    for i, p in enumerate(parameters()):
        module.register_parameter(f"p{i}", p)
    wanted = trajectory(name)
    ways: list[Callable[[nn.Module], Any]] = [
        lambda m: list(m.parameters()),
        lambda m: m.parameters(),
        lambda m: m.named_parameters(),
        lambda m: [{"params": m.parameters()}],
        lambda m: [{"params": list(m.parameters())[:1], "lr": 0.05}, {"params": list(m.parameters())[1:]}],
        lambda m: [{"params": list(m.named_parameters())}],
        lambda m: m,
    ]
    for way in ways:
        trained = copy.deepcopy(module)
        optimizer = make(name, way(trained))
        assert same(walk(optimizer, list(trained.parameters()), range(6)), wanted)
    assert sorted(n for g in optimizer.param_groups for n in g["param_names"]) == ["p0", "p1", "p2", "p3"]


@every_optimizer
def test_add_param_group(name: str) -> None:
    params, other = parameters(), parameters()
    optimizer, whole = make(name, params[:2]), make(name, [{"params": other[:2]}, {"params": other[2:], "lr": 0.01}])
    walk(optimizer, params, range(2))  # the others have gradients, but nobody updates them
    assert same(params[2:], tensors(0)[2:])
    optimizer.add_param_group({"params": params[2:], "lr": 0.01})
    found = walk(optimizer, params, range(2, 5))
    for step in range(2):
        for p, g in zip(other[:2], tensors(100 + step), strict=False):
            p.grad = g
        whole.step()
    running = {
        key: optimizer.defaults[key]
        for key in ("k", "lr_max", "weight_sum", "matrix_steps")
        if key in optimizer.defaults
    }
    whole.param_groups[1].update(running)  # a group that is added later begins to count its own steps later
    assert same(found, walk(whole, other, range(2, 5)))
    assert optimizer.state[params[3]]["step"] == 3


@every_optimizer
def test_memory_formats(name: str) -> None:
    """Parameters and gradients that are transposed, channels-last or strided give the same numbers."""
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=generator) for shape in ((4, 6), (2, 3, 4, 5), (5, 4))]
    grads = [[torch.randn(v.shape, generator=generator) for v in values] for _ in range(3)]
    backing = torch.zeros(5, 8)
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda t: t.t().contiguous().t(),
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: backing[:, ::2].copy_(t),  # not dense
    ]
    odd = [nn.Parameter(form(v.clone())) for form, v in zip(forms, values, strict=True)]
    plain = [nn.Parameter(v.clone()) for v in values]
    assert not any(p.is_contiguous() for p in odd)
    for params, formed in ((odd, True), (plain, False)):
        optimizer = make(name, params)
        for step, made in enumerate(grads):
            for p, g, form in zip(params, made, forms, strict=True):
                # dense gradients in the parameter's format, and once in another
                p.grad = form(g) if formed and step and p is not odd[2] else g.clone()
            optimizer.step()
    # norms are summed in another order
    assert largest_difference([p.detach() for p in odd], [p.detach() for p in plain]) <= (
        1e-6 if name in NORMS else 0.0
    )
    assert not backing[:, 1::2].any()


@every_optimizer
def test_parameters_may_move(name: str) -> None:
    """``p.data = ...`` between steps, as FSDP and ``module.to`` do it, must not leave the optimizer with old memory."""
    params = parameters()
    optimizer = make(name, params)
    walk(optimizer, params, range(3))
    old = [p.data for p in params]
    for p in params:
        p.data = p.data.clone()
    kept = [value.clone() for value in old]
    found = walk(optimizer, params, range(3, 6))
    assert same(found, trajectory(name))
    assert same(old, kept)


def test_names_and_creation() -> None:
    assert {"adam", "adamw", "adan", "lamb", "lion", "sgd", "stableadamw"} <= set(NAMES)
    for name in NAMES:
        optimizer = create(name.upper(), parameters())
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert type(optimizer).__name__.lower() == name
        assert type(optimizer) is getattr(oput, type(optimizer).__name__)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_takes_torchs_state(momentum: float) -> None:
    params, alone = parameters(torch.float64), parameters(torch.float64)
    wanted = walk(torch.optim.SGD(alone, lr=0.05, momentum=momentum), alone, range(6))
    before = torch.optim.SGD(params, lr=0.05, momentum=momentum)
    walk(before, params, range(3))
    after = oput.SGD(params, lr=9.0, momentum=momentum)
    after.load_state_dict(before.state_dict())
    assert largest_difference(walk(after, params, range(3, 6)), wanted) <= 2e-15


@pytest.mark.parametrize("name", ["lion", "lamb", "adafactor", "muon"])
@pytest.mark.parametrize("backend", ["foreach", "compile"])
def test_autograd_knows_that_parameters_changed(name: str, backend: str) -> None:
    """A graph that has used old values must not be gone back through after a step, whatever wrote the new ones."""
    p = nn.Parameter(torch.ones(8, 9))
    p.grad = torch.ones(8, 9)
    loss = (p * p).sum()
    oput.create(name, [p], lr=0.1, backend=backend).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
