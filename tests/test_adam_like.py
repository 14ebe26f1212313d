"""Relatives of Adam: what parity, conformance and the contract do not ask of them."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR

import oput_dist as oput
from oput_dist.optimizers.ademamix import warmed
from oput_dist.optimizers.nadam import momentum_at, momentum_product
from tests.toy import largest_difference, parameters, same, walk

SIGNATURES: list[tuple[str, dict[str, Any]]] = [
    (
        "RAdam",  # optimi's
        {"betas": (0.9, 0.99), "weight_decay": 0, "eps": 1e-6, "decouple_wd": True, "decouple_lr": True, "max_lr": 0.1},
    ),
    ("RAdam", {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "decoupled_weight_decay": True}),  # torch's
    ("NAdam", {"weight_decay": 0, "momentum_decay": 4e-3, "decoupled_weight_decay": True}),
    ("RMSprop", {"alpha": 0.99, "eps": 1e-8, "weight_decay": 0, "momentum": 0, "centered": False}),
]
BELIEF: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-3,
    "weight_decay": 0,
    "amsgrad": False,
    "weight_decouple": False,
    "fixed_decay": False,
    "rectify": False,
}


@pytest.mark.parametrize(("name", "options"), SIGNATURES, ids=lambda value: value if isinstance(value, str) else "")
def test_signatures_of_others_run_without_a_warning(name: str, options: dict[str, Any]) -> None:
    params = parameters()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(getattr(oput, name)(params, lr=1e-3, **options), params, range(2))


def test_adabelief_warns_once_of_an_eps_that_makes_it_sgd() -> None:
    params = parameters()
    with pytest.warns(UserWarning, match="AdaBelief: .*write eps=1e-16") as caught:
        optimizer = oput.AdaBelief([{"params": params[:1]}, {"params": params[1:2]}], **BELIEF)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group({"params": params[2:3], "eps": 0.1})
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = oput.AdaBelief(params[:2], **{**BELIEF, "eps": 1e-8})
    with pytest.warns(UserWarning, match="write eps=1e-16"):
        optimizer.add_param_group({"params": params[2:], "eps": 1e-4})


WITH_PAIRS = ("RAdam", "NAdam", "ADOPT", "AdaBelief", "AdaBound", "AdaMod", "DiffGrad", "Yogi", "LaProp", "MARS")
BAD: list[tuple[str, dict[str, Any], str]] = [
    *[
        (name, {"betas": betas}, r"betas=.*2 numbers in \[0, 1\)")
        for name in WITH_PAIRS
        for betas in ((0.9, 1.0), (0.9, math.nan), (0.9, 0.9, 0.9), 0.9)
    ],
    *[
        (name, {"eps": eps}, rf"eps={eps} .*a finite number >=? 0")
        for name in (*WITH_PAIRS, "RMSprop", "AdEMAMix")
        for eps in (-1e-8, math.nan, math.inf)
    ],
    ("RMSprop", {"alpha": 1.0}, r"alpha=1.0 .*\[0, 1\)"),
    ("RMSprop", {"momentum": -0.1}, r"momentum=-0.1 .*\[0, 1\)"),
    ("RMSprop", {"decouple_wd": 1}, r"decouple_wd=1 .*True or False"),
    ("RMSprop", {"centered": 1}, r"centered=1 .*True or False"),
    ("RAdam", {"decoupled_weight_decay": 1}, r"decoupled_weight_decay=1 .*True or False"),
    ("RAdam", {"decouple_wd": "yes"}, r"decoupled_weight_decay='yes' .*True or False"),
    ("NAdam", {"momentum_decay": -1.0}, r"momentum_decay=-1.0 .*>= 0"),
    ("NAdam", {"decoupled_weight_decay": None}, r"decoupled_weight_decay=None .*True or False"),
    ("ADOPT", {"eps": 0.0}, r"eps=0.0 .*> 0"),
    ("ADOPT", {"clip_exp": -0.1}, r"clip_exp=-0.1 .*None or .*>= 0"),
    ("ADOPT", {"decouple": 0}, r"decouple=0 .*True or False"),
    *[
        ("AdaBelief", {flag: 1}, rf"{flag}=1 .*True or False")
        for flag in ("amsgrad", "weight_decouple", "fixed_decay", "rectify", "degenerated_to_sgd")
    ],
    ("AdaBelief", {"fixed_decay": True, "weight_decouple": False}, r"fixed_decay=True .*needs weight_decouple=True"),
    ("AdaBelief", {"fixed_decay": True, "decouple_lr": True}, r"fixed_decay=True .*decouple_lr=False"),
    ("AdaBound", {"final_lr": -0.1}, r"final_lr=-0.1 .*>= 0"),
    ("AdaBound", {"gamma": 0.0}, r"gamma=0.0 .*> 0"),
    ("AdaBound", {"amsbound": None}, r"amsbound=None .*True or False"),
    ("AdaBound", {"base_lr": 0.0}, r"base_lr=0.0 .*None or .*> 0"),
    ("AdaBound", {"lr": 0.0}, r"lr=0 .*give base_lr"),
    ("AdaMod", {"beta3": 1.0}, r"beta3=1.0 .*\[0, 1\)"),
    ("Yogi", {"initial_accumulator": -1e-6}, r"initial_accumulator=-1e-06 .*>= 0"),
    ("Yogi", {"initial_momentum": 1}, r"initial_momentum=1 .*True or False"),
    ("AdEMAMix", {"betas": (0.9, 0.999)}, r"betas=.*3 numbers in \[0, 1\)"),
    ("AdEMAMix", {"alpha": -1.0}, r"alpha=-1.0 .*>= 0"),
    *[
        ("AdEMAMix", {"T_alpha_beta3": steps}, rf"T_alpha_beta3={steps} .*None or .*>= 1")
        for steps in (0, -3, 2.5, True)
    ],
    ("MARS", {"gamma": -0.1}, r"gamma=-0.1 .*>= 0"),
    ("MARS", {"optimize_1d": 1}, r"optimize_1d=1 .*True or False"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_hyperparameters(name: str, options: dict[str, Any], message: str) -> None:
    make, own = getattr(oput, name), {k: v for k, v in options.items() if (name, k) != ("RAdam", "decouple_wd")}
    with pytest.raises(ValueError, match=message):
        make(parameters(), **options)
    if own:
        optimizer = make(parameters())
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": parameters(), **own})


TORCH: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.RAdam, {"betas": (0.9, 0.9)}),
    (torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    (torch.optim.RMSprop, {}),
]


@pytest.mark.parametrize(("theirs", "options"), TORCH)
@pytest.mark.parametrize("direction", ["from torch", "to torch"])
def test_state_dicts_are_torchs(theirs: Any, options: dict[str, Any], direction: str) -> None:
    settings = {"lr": 0.05, "weight_decay": 0.1, **options}
    params, alone = parameters(torch.float64), parameters(torch.float64)
    wanted = walk(theirs(alone, **settings), alone, range(10))
    first, second = (theirs, getattr(oput, theirs.__name__))[:: 1 if direction == "from torch" else -1]
    before = first(params, **settings)
    walk(before, params, range(3))
    after = second(params, **{**settings, "lr": 9.0})
    after.load_state_dict(before.state_dict())
    assert largest_difference(walk(after, params, range(3, 10)), wanted) <= 2e-15


def test_centered_rmsprop_of_a_constant_gradient_is_finite() -> None:
    """Rounding makes the variance negative now and then: torch's parameters are NaN from there on."""
    p = nn.Parameter(torch.zeros(1000))
    optimizer = oput.RMSprop([p], lr=1e-3, alpha=0.5, centered=True, eps=1.0)
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    seen = False
    for _ in range(60):
        p.grad = gradient.clone()
        optimizer.step()
        state = optimizer.state[p]
        seen = seen or bool((state["square_avg"] < state["grad_avg"] ** 2).any())
    assert seen
    assert torch.isfinite(p).all()


@pytest.mark.parametrize(("beta1", "decay"), [(0.9, 4e-3), (0.999, 1.0), (0.5, 0.0), (0.0, 4e-3)])
def test_momentum_products(beta1: float, decay: float) -> None:
    """In any order of steps, and without end where they no longer show."""
    steps = [7, 3, 40, 1, 41]
    for step in steps:
        exact = math.prod(momentum_at(beta1, decay, i) for i in range(1, step + 1))
        assert momentum_product(beta1, decay, step) == pytest.approx(exact, rel=1e-14, abs=1e-19)
    assert momentum_product(beta1, decay, 10**9) == 0.0


def test_adopts_first_step_only_looks() -> None:
    for options in ({}, {"decouple": True}, {"decouple_lr": True}, {"clip_exp": None}):
        params = parameters()
        start = [p.detach().clone() for p in params]
        optimizer = oput.ADOPT(params, lr=0.1, weight_decay=0.5, **options)
        walk(optimizer, params, range(1))
        assert same([p.detach() for p in params], start)
        assert not any(optimizer.state[p]["exp_avg"].any() for p in params)
        assert all(optimizer.state[p]["exp_avg_sq"].all() for p in params)
        walk(optimizer, params, range(1, 2))
        assert not any(torch.equal(p, s) for p, s in zip(params, start, strict=True))


def test_adabounds_bounds_follow_the_schedule() -> None:
    """``final_lr`` belongs to a group's initial learning rate, in groups that are added later and after loading too."""
    params = parameters(torch.float64)
    optimizer = oput.AdaBound(params[:2], lr=0.1, final_lr=1.0, gamma=1e9)
    optimizer.add_param_group({"params": params[2:], "lr": 0.2})
    assert [group["base_lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    LinearLR(optimizer, start_factor=0.5, total_iters=10)
    loaded = oput.AdaBound([{"params": params[:2]}, {"params": params[2:]}], lr=9.0)
    loaded.load_state_dict(optimizer.state_dict())
    assert [group["base_lr"] for group in loaded.param_groups] == [0.1, 0.2]
    start = [p.detach().clone() for p in params]
    found = walk(loaded, params, range(1))
    for p, before in zip(params, start, strict=True):
        before -= 0.5 * 1.0 * 0.1 * p.grad  # bounds so tight that it is SGD: half of final_lr, times 1 - beta1
    assert largest_difference(found, start) <= 1e-8


def test_yogi_without_a_gradient_stays() -> None:
    for initial_momentum in (False, True):
        p = nn.Parameter(torch.ones(3))
        optimizer = oput.Yogi([p], initial_momentum=initial_momentum)
        for _ in range(3):
            p.grad = torch.zeros(3)
            optimizer.step()
        assert torch.equal(p, torch.ones(3)) is not initial_momentum


def test_the_slow_momentum_of_ademamix_warms_up() -> None:
    betas = [warmed(0.9, 0.9999, t / 100) for t in range(101)]
    assert betas[0] == pytest.approx(0.9)
    assert betas[-1] == 0.9999
    assert all(x < y for x, y in itertools.pairwise(betas))
    lengths = [1 / math.log(beta) for beta in betas]
    assert lengths[50] == pytest.approx((lengths[0] + lengths[100]) / 2)
    assert warmed(0.9, 0.5, 0.5) == 0.5  # never above beta3
    assert warmed(0.0, 0.0, 0.5) == 0.0


def test_mars_is_adamw_for_vectors() -> None:
    params, other = parameters(), parameters()
    settings = {"lr": 0.05, "weight_decay": 0.1, "betas": (0.9, 0.99), "backend": "eager"}
    found = walk(oput.MARS(params, **settings), params, range(4))
    wanted = walk(oput.AdamW(other, **settings), other, range(4))
    assert [torch.equal(f, w) for f, w in zip(found, wanted, strict=True)] == [p.dim() < 2 for p in params]
