"""AdaGraft against the formula; both optimizers' state; what it counts and refuses."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

import oput_dist as oput
from oput_dist.wrappers.averaging import EMA
from oput_dist.wrappers.graft import AdaGraft
from oput_dist.wrappers.lookahead import Lookahead
from tests.formulas import wrappers
from tests.toy import largest_difference, parameters, same, tensors, walk

DOUBLE = torch.float64
LIMIT = 1e-13  # steps are differences of parameters, rounded as these are
OURS, TORCH = (oput.SGD, oput.AdamW), (torch.optim.SGD, torch.optim.AdamW)
MIXED = (torch.optim.SGD, oput.AdamW)
kinds = pytest.mark.parametrize("kinds", [OURS, TORCH, MIXED], ids=["ours", "torch", "mixed"])
scopes = pytest.mark.parametrize("scope", ["tensor", "global"])


def made(params: Any, kinds: Any = OURS, lr: float = 0.1, more: dict[str, Any] | None = None, **settings: Any) -> Any:
    magnitude = kinds[0](params, lr=lr, momentum=0.9, weight_decay=0.0, **(more or {}))
    return AdaGraft(magnitude, kinds[1](params, lr=0.03, weight_decay=0.0), **settings)


def by_hand(steps: int, scope: str, weight_decay: float = 0.0) -> list[torch.Tensor]:
    params, memory = [p.detach() for p in parameters(DOUBLE)], [({}, {}) for _ in parameters()]
    for t in range(1, steps + 1):
        both = (
            lambda i, g, t=t: wrappers.sgd_step(g, memory[i][0], t, 0.1, 0.9),
            lambda i, g, t=t: wrappers.adam_step(g, memory[i][1], t, 0.03),
        )
        wrappers.adagraft(params, tensors(100 + t - 1, DOUBLE), both, scope, 1 - 0.1 * weight_decay)
    return params


# ------------------------------------------------------------------------------------------------------- the algorithm


@kinds
@scopes
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_equals_the_formula(kinds: Any, scope: str, weight_decay: float) -> None:
    params = parameters(DOUBLE)
    found = walk(made(params, kinds, scope=scope, weight_decay=weight_decay), params, range(13))
    assert largest_difference(found, by_hand(13, scope, weight_decay)) <= LIMIT


@scopes
def test_an_optimizer_grafted_onto_itself_is_itself(scope: str) -> None:
    params, plain = parameters(DOUBLE), parameters(DOUBLE)
    optimizer = AdaGraft(oput.AdamW(params, weight_decay=0.0), oput.AdamW(params, weight_decay=0.0), scope=scope)
    wanted = walk(oput.AdamW(plain, weight_decay=0.0), plain, range(9))
    assert largest_difference(walk(optimizer, params, range(9)), wanted) <= LIMIT


def test_the_rate_of_the_direction_cancels() -> None:
    params, others = parameters(DOUBLE), parameters(DOUBLE)
    first, second = made(params), made(others)
    second.direction.param_groups[0]["lr"] *= 7
    assert largest_difference(walk(first, params, range(9)), walk(second, others, range(9))) <= 1e-13


def test_the_schedule_of_the_magnitude_rules() -> None:
    """At rate 0 nothing moves, also not by decay."""
    params = parameters(DOUBLE)
    optimizer = made(params, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: float(t < 2))
    for step in range(2):
        before = walk(optimizer, params, range(step, step + 1))
        schedule.step()
    assert same(walk(optimizer, params, range(2, 4)), before)
    assert optimizer.direction.param_groups[0]["lr"] == 0.03


@pytest.mark.parametrize("strided", [False, True])
def test_backends_and_strides(strided: bool) -> None:
    results = []
    for backend in ("eager", "foreach"):
        params = parameters(DOUBLE)
        if strided:
            params = [nn.Parameter(torch.stack([p.detach()] * 2, -1)[..., 0]) for p in params]
        optimizer = made(params, more={"backend": backend}, scope="tensor", weight_decay=0.2)
        results.append(walk(optimizer, params, range(13)))
        assert largest_difference(results[-1], by_hand(13, "tensor", 0.2)) <= LIMIT


def test_no_direction_no_step() -> None:
    """A gradient of zero, and none at all: which is not decayed."""
    params = parameters(DOUBLE)
    optimizer = made(params, weight_decay=0.5)
    params[0].grad = torch.zeros_like(params[0])
    params[1].grad = torch.ones_like(params[1])
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert torch.allclose(params[0], 0.95 * before[0], rtol=1e-15)
    assert not torch.equal(params[1], before[1])
    assert same([p.detach() for p in params[2:]], before[2:])


# -------------------------------------------------------------------------------- skipped steps, state made early, loss


@pytest.mark.parametrize("second", [{}, {"skip_nonfinite": True}], ids=["one asks", "both ask"])
def test_skipped_steps_leave_both_as_they_were(second: dict[str, Any]) -> None:
    params, plain = parameters(), parameters()
    magnitude = oput.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.0, skip_nonfinite=True)
    optimizer = AdaGraft(magnitude, oput.AdamW(params, lr=0.03, weight_decay=0.0, **second))
    walk(optimizer, params, range(2))
    before = copy.deepcopy((params, optimizer.state_dict()))
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert same([p.detach() for p in params], [p.detach() for p in before[0]])
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1]["state"], rtol=0, atol=0)
    assert optimizer.skipped == 1
    found = walk(optimizer, params, range(2, 5))
    assert same(found, walk(made(plain), plain, range(5)))


@kinds
def test_grad_scaler(kinds: Any) -> None:
    params, plain = parameters(), parameters()
    optimizer, scaler = made(params, kinds), GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for step in (0, 1, 2):
        scaler.scale(torch.ones(()))
        for p, g in zip(params, tensors(100 + step), strict=True):
            p.grad = 4.0 * g if step != 1 else torch.full_like(g, math.inf)
        scaler.step(optimizer)
        scaler.update(4.0)
    twin = made(plain, kinds)
    walk(twin, plain, range(1))
    wanted = walk(twin, plain, range(2, 3))
    assert largest_difference([p.detach() for p in params], wanted) <= 1e-6
    assert optimizer.state[params[0]]["direction_step"] == 2
    assert not hasattr(optimizer.direction, "grad_scale")


def test_a_step_that_only_creates_state_does_not_count() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    optimizer, plain = made(model), made(other)
    before = [p.detach().clone() for p in model.parameters()]
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert state["weight"].keys() == {
        "step", "momentum_buffer", "direction_step", "direction_exp_avg", "direction_exp_avg_sq"
    }  # fmt: skip
    assert same([p.detach() for p in model.parameters()], before)
    assert float(optimizer.state[model.weight]["direction_step"]) == 0
    assert optimizer.direction.param_groups[0]["lr"] == 0.03
    for _ in range(3):
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        optimizer.step()
        plain.step()
    assert torch.equal(model.weight, other.weight)


@pytest.mark.parametrize("as_direction", [False, True])
def test_the_loss_goes_to_the_one_that_needs_it(as_direction: bool) -> None:
    p, calls = nn.Parameter(torch.ones(3)), []
    both = (oput.Momo([p], lr=0.1), oput.SGD([p], lr=0.1, momentum=0.0))
    optimizer = AdaGraft(*(reversed(both) if as_direction else both))

    def closure() -> torch.Tensor:
        calls.append(1)
        optimizer.zero_grad()
        (loss := (p**2).sum()).backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 3.0
    assert calls == [1]
    optimizer.step(loss=2.0)
    with pytest.raises(TypeError, match=r"AdaGraft: neither optimizer's step\(\) takes 'luck'"):
        optimizer.step(luck=1)


# ---------------------------------------------------------------------------------------------------- saving and copies


@kinds
@pytest.mark.parametrize("how", ["state dict", "deepcopy", "pickle", "torch.distributed.checkpoint"])
def test_resumes_bitwise(kinds: Any, how: str) -> None:
    model = nn.Linear(4, 3)
    params = list(model.parameters())
    optimizer = made(params, kinds, weight_decay=0.1)
    train(optimizer, params, range(4))
    optimizer.direction.param_groups[0]["betas"] = (0.5, 0.6)
    other = copy.deepcopy(model)
    others = list(other.parameters())
    if how in ("deepcopy", "pickle"):
        both = (params, optimizer)
        others, twin = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    else:
        twin = made(others, kinds, lr=9.0)
        if how == "state dict":
            twin.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
        else:
            set_optimizer_state_dict(other, twin, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    assert twin.direction.param_groups[0]["betas"] == (0.5, 0.6)
    train(optimizer, params, range(4, 8))
    train(twin, others, range(4, 8))
    assert same([p.detach() for p in others], [p.detach() for p in params])


def train(optimizer: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def test_whole_state_dicts_have_both() -> None:
    params = parameters()
    optimizer = AdaGraft(oput.SGD(params, lr=0.1, momentum=0.9), oput.Adafactor(params, lr=0.1))
    walk(optimizer, params, range(3))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    twin = AdaGraft(oput.SGD(others, lr=0.1, momentum=0.9), oput.Adafactor(others, lr=0.1))
    twin.load_state_dict(oput.full_state_dict(optimizer))
    assert same(walk(twin, others, range(3, 6)), walk(optimizer, params, range(3, 6)))
    with pytest.raises(TypeError, match=r"takes an optimizer of oput_dist"):
        oput.full_state_dict(AdaGraft(oput.SGD(params, lr=0.1), torch.optim.SGD(params, lr=0.1)))


def test_a_state_dict_that_one_of_both_refuses_changes_neither() -> None:
    params = parameters()
    optimizer = made(params)
    walk(optimizer, params, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    for name, says in (("momentum_buffer", "SGD: .*lacks"), ("direction_exp_avg", "AdamW: .*lacks")):
        bad = copy.deepcopy(saved)
        bad["state"][1].pop(name)
        bad["param_groups"][0]["lr"] = bad["param_groups"][0]["direction_lr"] = 5.0
        bad["state"][0]["direction_exp_avg"].zero_()
        with pytest.raises(ValueError, match=says):
            optimizer.load_state_dict(bad)
        now = optimizer.state_dict()
        torch.testing.assert_close(now["state"], saved["state"], rtol=0, atol=0)
        assert now["param_groups"] == saved["param_groups"]
    with pytest.raises(ValueError, match=r"has no 'graft_weight_decay': it was saved without AdaGraft"):
        optimizer.load_state_dict(oput.SGD(parameters(), lr=0.1).state_dict())


def test_groups_are_added_to_both() -> None:
    params = parameters(DOUBLE)
    optimizer = made(params[:2])
    optimizer.add_param_group({"params": params[2:], "lr": 0.1, "direction_betas": (0.9, 0.999), "graft_eps": 1e-12})
    assert largest_difference(walk(optimizer, params, range(9)), by_hand(9, "tensor")) <= 1e-10
    assert [len(g["params"]) for g in optimizer.direction.param_groups] == [2, 2]
    late = nn.Parameter(torch.ones(2))
    for bad, says in (
        ({"direction_betas": 3.0}, "AdamW: betas=3.0"),
        ({"lr": -1.0}, "SGD: lr=-1.0"),
        ({"graft_eps": -1.0}, "AdaGraft: eps=-1.0"),
        ({"weight_decay": 0.1}, "AdaGraft: weight_decay=0.1 of the magnitude optimizer"),
    ):
        with pytest.raises(ValueError, match=says):
            optimizer.add_param_group({"params": [late], **bad})
        assert len(optimizer.direction.param_groups) == len(optimizer.inner.param_groups) == 2


# ------------------------------------------------------------------------------------------------------------ bad input


def test_what_does_not_go_together() -> None:
    params, others = parameters(), parameters()
    sgd, adam = oput.SGD(params, lr=0.1), oput.AdamW(params, weight_decay=0.0)
    with pytest.raises(ValueError, match=r"mismatched inner parameters: parameter 0 of group 0 .* is another there"):
        AdaGraft(sgd, oput.SGD(others, lr=0.1))
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 .* is another there; both optimizers need the same"):
        AdaGraft(sgd, oput.SGD([params[0], *params[:0:-1]], lr=0.1))
    with pytest.raises(ValueError, match=r"the direction optimizer lacks parameter 3 of group 0"):
        AdaGraft(sgd, oput.SGD(params[:3], lr=0.1))
    with pytest.raises(ValueError, match=r"the magnitude optimizer lacks parameter 0 of group 1"):
        AdaGraft(oput.SGD(params[:3], lr=0.1), oput.SGD([{"params": params[:3]}, {"params": params[3:]}], lr=0.1))
    with pytest.raises(ValueError, match=r"one optimizer is given for both: make two"):
        AdaGraft(sgd, sgd)
    with pytest.raises(TypeError, match=r"the direction optimizer is a list, but must be a torch.optim.Optimizer"):
        AdaGraft(sgd, params)
    with pytest.raises(TypeError, match=r"wrapped by Lookahead, .*: wrap AdaGraft instead: Lookahead\(AdaGraft\("):
        AdaGraft(sgd, Lookahead(adam))
    with pytest.raises(TypeError, match=r"AdaGraft cannot wrap AdamWScheduleFree"):
        AdaGraft(oput.AdamWScheduleFree(params), adam)
    with pytest.raises(
        ValueError, match=r"weight_decay=0.1 of the direction optimizer \(AdamW\).*AdaGraft\(\.\.\., weig"
    ):
        AdaGraft(sgd, torch.optim.AdamW(params, weight_decay=0.1))
    skipping = oput.AdamW(params, weight_decay=0.0, skip_nonfinite=True)
    with pytest.raises(ValueError, match=r"skip_nonfinite=True of the direction optimizer alone would skip only one"):
        AdaGraft(sgd, skipping)
    for settings, says in (
        ({"scope": "layer"}, "scope='layer' is not allowed: must be 'tensor' or 'global'"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 is not allowed"),
        ({"eps": math.nan}, "eps=nan is not allowed"),
    ):
        with pytest.raises(ValueError, match=f"AdaGraft: {says}"):
            AdaGraft(sgd, adam, **settings)
    EMA(Lookahead(AdaGraft(sgd, adam)))


def test_weight_decay_that_is_set_later_is_found_before_a_step() -> None:
    params = parameters()
    optimizer = made(params)
    optimizer.inner.param_groups[0]["weight_decay"] = 0.3
    with pytest.raises(ValueError, match=r"weight_decay=0.3 of the magnitude optimizer"):
        walk(optimizer, params, range(1))
    assert same([p.detach() for p in params], [p.detach() for p in parameters()])
