"""What the documents of other libraries show is taken as it stands there: constructors, and a step after a backward."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oput_dist as oput
from oput_dist.optimizers import OPTIMIZERS
from tests.parity import train
from tests.toy import create

SNIPPETS: list[tuple[str, dict[str, Any]]] = [  # of the README of oput, in its order
    # SophiaG (an estimate of the curvature), SAM and Lookahead (wrappers) and Shampoo (whole matrices): later issues.
    ("Momo", {"lr": 1e-2}),
    ("MomoAdam", {"lr": 1e-2}),
    ("Lion", {"betas": (0.9, 0.99), "weight_decay": 0.0}),
    ("Adan", {"lr": 1e-3, "betas": (0.1, 0.1, 0.001), "weight_decay": 0}),
    ("A2GradExp", {"beta": 10.0, "lips": 10.0, "rho": 0.5}),
    ("A2GradInc", {"beta": 10.0, "lips": 10.0}),
    ("A2GradUni", {"beta": 10.0, "lips": 10.0}),
    ("AccSGD", {"lr": 1e-3, "kappa": 1000.0, "xi": 10.0, "small_const": 0.7, "weight_decay": 0}),
    (
        "AdaBelief",
        {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-3,
            "weight_decay": 0,
            "amsgrad": False,
            "weight_decouple": False,
            "fixed_decay": False,
            "rectify": False,
        },
    ),
    (
        "AdaBound",
        {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "final_lr": 0.1,
            "gamma": 1e-3,
            "eps": 1e-8,
            "weight_decay": 0,
            "amsbound": False,
        },
    ),
    ("AdaMod", {"lr": 1e-3, "betas": (0.9, 0.999), "beta3": 0.999, "eps": 1e-8, "weight_decay": 0}),
    (
        "AdamP",
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "delta": 0.1, "wd_ratio": 0.1},
    ),
    ("AggMo", {"lr": 1e-3, "betas": (0.0, 0.9, 0.99), "weight_decay": 0}),
    ("Apollo", {"lr": 1e-2, "beta": 0.9, "eps": 1e-4, "warmup": 0, "init_lr": 0.01, "weight_decay": 0}),
    ("DiffGrad", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}),
    ("Lamb", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}),
    ("Yogi", {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-3, "initial_accumulator": 1e-6, "weight_decay": 0}),
    ("MADGRAD", {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0, "eps": 1e-6}),
    (
        "NovoGrad",
        {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 0,
            "grad_averaging": False,
            "amsgrad": False,
        },
    ),
    (
        "PID",
        {"lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 1e-2, "integral": 5.0, "derivative": 10.0},
    ),
    (
        "QHAdam",
        {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "nus": (1.0, 1.0),
            "weight_decay": 0,
            "decouple_weight_decay": False,
            "eps": 1e-8,
        },
    ),
    ("QHM", {"lr": 1e-3, "momentum": 0, "nu": 0.7, "weight_decay": 1e-2, "weight_decay_type": "grad"}),
    ("RAdam", {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}),
    (
        "Ranger",
        {
            "lr": 1e-3,
            "alpha": 0.5,
            "k": 6,
            "N_sma_threshhold": 5,
            "betas": (0.95, 0.999),
            "eps": 1e-5,
            "weight_decay": 0,
        },
    ),
    (
        "RangerQH",
        {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "nus": (0.7, 1.0),
            "weight_decay": 0.0,
            "k": 6,
            "alpha": 0.5,
            "decouple_weight_decay": False,
            "eps": 1e-8,
        },
    ),
    (
        "RangerVA",
        {
            "lr": 1e-3,
            "alpha": 0.5,
            "k": 6,
            "n_sma_threshhold": 5,
            "betas": (0.95, 0.999),
            "eps": 1e-5,
            "weight_decay": 0,
            "amsgrad": True,
            "transformer": "softplus",
            "smooth": 50,
            "grad_transformer": "square",
        },
    ),
    (
        "SGDP",
        {
            "lr": 1e-3,
            "momentum": 0,
            "dampening": 0,
            "weight_decay": 1e-2,
            "nesterov": False,
            "delta": 0.1,
            "wd_ratio": 0.1,
        },
    ),
    ("SGDW", {"lr": 1e-3, "momentum": 0, "dampening": 0, "weight_decay": 1e-2, "nesterov": False}),
    (
        "SWATS",
        {"lr": 1e-1, "betas": (0.9, 0.999), "eps": 1e-3, "weight_decay": 0.0, "amsgrad": False, "nesterov": False},
    ),
    ("Adam", {"lr": 0.0001, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}),
    ("SGD", {"lr": 0.0001, "momentum": 0, "dampening": 0, "weight_decay": 0}),
]
WARNINGS = {  # values that mean something else there, or make it another optimizer: what to write instead
    "Momo": r"lr=0\.01 .*write lr=1\.0",
    "Adan": r"write betas=\(0\.9, 0\.9, 0\.999\)",
    "AdaBelief": r"eps=.* write eps=1e-16",
    "Apollo": r"init_lr=0\.01 .*write warmup=500",
    "PID": r"momentum=0 .*give momentum=0\.9",
    "QHAdam": r"nus=\(1, 1\) .*give nus=\(0\.7, 1\.0\)",
    "QHM": r"momentum=0 .*give momentum=0\.999",
}
NEEDS_LOSS = ("Momo", "MomoAdam")

# What optimi's documents say that its optimizers take beside params, in another order and with other defaults.
# ``kahan_sum`` and ``gradient_release`` come with a later issue.
DECOUPLED = {"decouple_lr": True, "max_lr": 1e-2}
EVERY = {"lr": 1e-3, "weight_decay": 1e-5, "foreach": None, "triton": None, **DECOUPLED}
OPTIMI: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {**EVERY, "momentum": 0.9, "dampening": True, "decouple_wd": True, "torch_init": True}),
    ("SGD", {**EVERY, "momentum": 0.9, "dampening": False, "decouple_wd": False, "torch_init": False}),
    ("Adam", {**EVERY, "betas": (0.9, 0.99), "eps": 1e-6}),
    ("AdamW", {**EVERY, "betas": (0.9, 0.99), "eps": 1e-6}),
    ("Adan", {**EVERY, "betas": (0.98, 0.92, 0.99), "eps": 1e-6, "adam_wd": True}),
    ("Lion", {**EVERY, "betas": (0.9, 0.99)}),
    ("RAdam", {**EVERY, "betas": (0.9, 0.99), "eps": 1e-6, "decouple_wd": True}),
    ("StableAdamW", {**EVERY, "betas": (0.9, 0.99), "eps": 1e-6}),
    ("Ranger", {**EVERY, "betas": (0.9, 0.99), "eps": 1e-6, "k": 6, "alpha": 0.5, "decouple_wd": True}),
]


def run(name: str, options: dict[str, Any]) -> tuple[list[Tensor], list[str]]:
    """How far the parameters of a small model get in three steps, and the warnings on the way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    start = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = getattr(oput, name)(model.parameters(), **options)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(torch.randn(5, 4)).square().mean()
            loss.backward()
            optimizer.step(**({"loss": loss} if name in NEEDS_LOSS else {}))
    moved = [p.detach() - before for p, before in zip(model.parameters(), start, strict=True)]
    return moved, [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize(("name", "options"), [*SNIPPETS, *OPTIMI], ids=lambda value: value if value else "")
def test_a_snippet_runs_as_it_stands_there(name: str, options: dict[str, Any]) -> None:
    moved, said = run(name, options)
    assert all(change.isfinite().all() and change.any() for change in moved)
    if (name, options) in SNIPPETS and name in WARNINGS:
        (text,) = said
        assert text.startswith(f"{name}: ")
        with pytest.warns(UserWarning, match=WARNINGS[name]):
            warnings.warn(text, stacklevel=1)
    else:
        assert not said


def test_every_snippet_of_a_class_that_is_here() -> None:
    names = [name for name, _ in SNIPPETS]
    assert len(names) == len(set(names)) == 31
    assert set(WARNINGS) <= set(names)
    for name, options in SNIPPETS:
        assert set(options) <= {*inspect.signature(getattr(oput, name)).parameters, *ALIASES.get(name, ())}


ALIASES = {"Ranger": ("N_sma_threshhold",), "RangerVA": ("n_sma_threshhold",)}


def test_defaults_do_not_warn() -> None:
    for name in OPTIMIZERS:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            create(name, [nn.Parameter(torch.zeros(2))])


def test_optimis_adam_wd_is_no_prox() -> None:
    options = {"lr": 0.01, "weight_decay": 0.1}
    found, wanted, other = (
        train(oput.Adan, {**options, **more}, {"lr": 0.02}) for more in ({"adam_wd": True}, {"no_prox": True}, {})
    )
    assert all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
    assert not torch.equal(found[0], other[0])
    grouped = oput.Adan([{"params": [nn.Parameter(torch.zeros(2))], "adam_wd": True}])
    assert grouped.param_groups[0]["no_prox"] is True
