"""Momenta: ranges of their options, values that make them another optimizer, and what only one of them has."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import oput_dist as oput
from tests.parity import difference, train
from tests.test_bad_input import message_of
from tests.toy import parameters, same, walk


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.zeros(2))


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("SGD", {"dampening": 1.0}, r"dampening=1.0 .*True, False or a number in \[0, 1\)"),
    ("SGD", {"dampening": True, "momentum": 0.9, "nesterov": True}, r"SGD: .*dampening=True.*dampening = 0"),
    ("SGD", {"torch_init": 1}, "torch_init=1 .*True or False"),
    ("SGDW", {"nesterov": True}, r"SGDW: nesterov=True .*momentum > 0"),
    ("AccSGD", {"kappa": 0.0}, "kappa=0.0 .*finite number > 0"),
    ("AccSGD", {"xi": -1.0}, "xi=-1.0 .*finite number > 0"),
    ("AccSGD", {"small_const": 1.0}, r"small_const=1.0 .*\(0, 1\)"),
    ("AccSGD", {"small_const": 0.0}, "small_const=0.0 .*> 0"),
    ("AccSGD", {"kappa": 4.0, "xi": 10.0}, r"kappa=4.0 and xi=10.0 .*small_const\*\*2 \* xi <= kappa"),
    ("AggMo", {"betas": ()}, r"betas=\(\) .*one or more numbers in \[0, 1\)"),
    ("AggMo", {"betas": 0.9}, r"betas=0.9 .*one or more numbers in \[0, 1\)"),
    ("AggMo", {"betas": (0.0, 1.0)}, r"betas=\(0.0, 1.0\) .*\[0, 1\)"),
    ("MADGRAD", {"momentum": 1.0}, r"momentum=1.0 .*\[0, 1\)"),
    ("MADGRAD", {"eps": -1.0}, "eps=-1.0 .*>= 0"),
    ("MADGRAD", {"decouple_decay": 0}, "decouple_decay=0 .*True or False"),
    ("PID", {"momentum": 1.0}, r"momentum=1.0 .*\[0, 1\)"),
    ("PID", {"dampening": 1.5}, r"dampening=1.5 .*\[0, 1\)"),
    ("PID", {"integral": -1.0}, "integral=-1.0 .*>= 0"),
    ("PID", {"derivative": -1.0}, "derivative=-1.0 .*>= 0"),
    ("PID", {"bug_compat": None}, "bug_compat=None .*True or False"),
    ("QHM", {"momentum": 1.0}, r"momentum=1.0 .*\[0, 1\)"),
    ("QHM", {"nu": 1.1}, r"nu=1.1 .*\[0, 1\]"),
    ("QHM", {"weight_decay_type": "l2"}, "weight_decay_type='l2' .*'grad' or 'direct'"),
    ("QHAdam", {"betas": (0.9, 1.0)}, r"betas=.*\[0, 1\)"),
    ("QHAdam", {"nus": (0.7, 1.1)}, r"nus=\(0.7, 1.1\) .*2 numbers in \[0, 1\]"),
    ("QHAdam", {"nus": 0.7}, r"nus=0.7 .*2 numbers in \[0, 1\]"),
    ("QHAdam", {"eps": -1.0}, "eps=-1.0 .*>= 0"),
    ("QHAdam", {"decouple_weight_decay": "no"}, "decouple_weight_decay='no' .*True or False"),
    *[
        (name, options, message)
        for name in ("RangerQH", "RangerVA")
        for options, message in [
            ({"k": 0}, "k=0 .*integer >= 1"),
            ({"k": 2.0}, "k=2.0 .*integer >= 1"),
            ({"k": True}, "k=True .*integer >= 1"),
            ({"alpha": 0.0}, r"alpha=0.0 .*\(0, 1\]"),
            ({"alpha": 1.1}, r"alpha=1.1 .*\(0, 1\]"),
            ({"betas": (0.9,)}, "betas=.*2 numbers"),
        ]
    ],
    ("RangerVA", {"n_sma_threshold": 0}, "n_sma_threshold=0 .*> 0"),
    ("RangerVA", {"n_sma_threshhold": -1}, "n_sma_threshold=-1 .*> 0"),
    ("RangerVA", {"eps": 0.0}, "eps=0.0 .*> 0"),
    ("RangerVA", {"smooth": 0.0}, "smooth=0.0 .*> 0"),
    ("RangerVA", {"amsgrad": 1}, "amsgrad=1 .*True or False"),
    ("RangerVA", {"transformer": "relu"}, "transformer='relu' .*'softplus' or '' or None"),
    ("RangerVA", {"grad_transformer": None}, "grad_transformer=None .*'square' or 'abs'"),
    ("RangerVA", {"bug_compat": 1}, "bug_compat=1 .*True or False"),
    ("Signum", {"momentum": 1.0}, r"momentum=1.0 .*\[0, 1\)"),
    ("Signum", {"decouple_wd": 1}, "decouple_wd=1 .*True or False"),
    ("Tiger", {"beta": 1.0}, r"beta=1.0 .*\[0, 1\)"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_ranges(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        getattr(oput, name)([parameter()], **options)
    assert message_of(error.value).startswith(name)
    optimizer = getattr(oput, name)([parameter()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [parameter()], **options})


@pytest.mark.parametrize(
    ("name", "unmeant", "meant"),
    [
        ("PID", {"momentum": 0.0}, {"momentum": 0.9}),
        ("QHM", {"momentum": 0.0}, {"momentum": 0.9}),
        ("QHAdam", {"nus": (1.0, 1.0)}, {"nus": (0.7, 1.0)}),
        ("RangerQH", {"nus": (1, 1)}, {"nus": (0.7, 1.0)}),
    ],
)
def test_values_that_make_it_another_optimizer_are_said_once(
    name: str, unmeant: dict[str, Any], meant: dict[str, Any]
) -> None:
    make = getattr(oput, name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = make([{"params": [parameter()]}, {"params": [parameter()]}], **unmeant)
        optimizer.add_param_group({"params": [parameter()]})
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        optimizer.step()
    (said,) = caught
    assert str(said.message).startswith(f"{name}: ")
    assert said.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        later = make([{"params": [parameter()], **meant}], **unmeant)
    with pytest.warns(UserWarning, match=name):
        later.add_param_group({"params": [parameter()]})


@pytest.mark.filterwarnings("ignore:PID:UserWarning", "ignore:QH:UserWarning")
def test_what_the_warnings_say_is_so() -> None:
    options, second = {"lr": 0.01, "weight_decay": 0.1}, {"lr": 0.02}
    sgd = train(torch.optim.SGD, options, second)
    adam = train(torch.optim.Adam, options, second)
    for ours, more, wanted in (
        (oput.PID, {"momentum": 0.0}, sgd),
        (oput.QHM, {"momentum": 0.0, "nu": 0.3}, sgd),
        (oput.QHAdam, {"nus": (1.0, 1.0), "betas": (0.9, 0.999)}, adam),
    ):
        assert difference(train(ours, {**options, **more}, second), wanted) <= 2e-15


def test_aggmo_in_exponential_form() -> None:
    optimizer = oput.AggMo.from_exp_form([parameter()], lr=0.2, a=0.1, k=4, weight_decay=0.3, maximize=True)
    (group,) = optimizer.param_groups
    assert group["betas"] == pytest.approx((0.0, 0.9, 0.99, 0.999))
    assert (group["lr"], group["weight_decay"], group["maximize"]) == (0.2, 0.3, True)
    for options, message in (
        ({"a": 0.0}, r"a=0.0 .*\(0, 1\]"),
        ({"a": 1.5}, r"a=1.5 .*\(0, 1\]"),
        ({"k": 0}, "k=0 .*integer >= 1"),
        ({"k": 2.0}, "k=2.0 .*integer >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            oput.AggMo.from_exp_form([parameter()], **options)


@pytest.mark.parametrize("betas", [(0.9,), (0.0, 0.5, 0.75, 0.9, 0.99)])
def test_aggmo_has_a_state_for_every_beta(betas: tuple[float, ...]) -> None:
    params = parameters()
    optimizer = oput.AggMo(params, lr=0.1, betas=betas)
    walk(optimizer, params, range(2))
    names = {f"momentum_buffer_{i}" for i in range(len(betas))}
    assert all(set(optimizer.state[p]) == {*names, "step"} for p in params)


def test_madgrad_without_momentum_has_no_start_and_at_lr_0_stays() -> None:
    params = parameters()
    optimizer = oput.MADGRAD(params, momentum=0.0)
    walk(optimizer, params, range(2))
    assert all(set(optimizer.state[p]) == {"grad_sum_sq", "s", "step"} for p in params)
    for lr in (0.0, torch.tensor(0.0)):
        params = parameters()
        optimizer = oput.MADGRAD(params, lr=lr, momentum=0.0, weight_decay=0.1, decouple_decay=True)
        assert same(walk(optimizer, params, range(2)), [p.detach() for p in parameters()])
        assert not any(optimizer.state[p]["s"].any() for p in params)


@pytest.mark.parametrize("name", ["n_sma_threshold", "n_sma_threshhold", "N_sma_threshhold"])
def test_rangerva_takes_every_spelling_of_the_threshold(name: str) -> None:
    optimizer = oput.RangerVA([parameter()], **{name: 4.5})
    optimizer.add_param_group({"params": [parameter()], name: 6})
    assert [group["n_sma_threshold"] for group in optimizer.param_groups] == [4.5, 6]
    assert not any("threshhold" in key for group in optimizer.param_groups for key in group)


def test_rangerva_steps_alike_far_beyond_what_exp_can_take() -> None:
    """The softplus of a large moment is the moment: without overflow."""
    found, wanted = [
        train(oput.RangerVA, {"lr": 0.01, "smooth": 1e6, **more}, {"lr": 0.02})
        for more in ({}, {"transformer": None, "eps": 1e-30})
    ]
    assert difference(found, wanted) <= 1e-5


def test_madgrad_made_without_momentum_cannot_begin_with_it() -> None:
    p = nn.Parameter(torch.full((3,), 5.0))
    optimizer = oput.MADGRAD([p], lr=1e-3, momentum=0.0)
    p.grad = torch.full((3,), 0.01)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match=r"momentum=0.9 in a group that was made with momentum=0"):
        optimizer.step()
