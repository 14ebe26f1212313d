"""Optimizers with a schedule of their own: Ranger21 and the schedule-free ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import schedulefree
import torch

import oput_dist as oput
from tests.conformance import FAST, SECOND, Case
from tests.formulas.ranger21 import Ranger21
from tests.parity import NOT_GIVEN, Oracle

RUN = {"num_iterations": 13, "num_warmup_iterations": 3, "warmdown_start_pct": 0.54}
FREE = {"lr": 0.1, "warmup_steps": 3}
CASES = [
    Case("schedule-free sgd", "oput_dist.SGDScheduleFree", FREE, SECOND, partly=False),
    Case("schedule-free adamw", "oput_dist.AdamWScheduleFree", {**FREE, "r": 1.0}, SECOND, partly=False),
    Case("ranger21", "oput_dist.Ranger21", {"lr": 0.3, **RUN}, FAST, exact=False, partly=False),
    Case(
        "ranger21 plain",
        "oput_dist.Ranger21",
        {"lr": 0.3, "use_gc": False, "beta_softplus": 0.0, "use_warmup": False, "warmdown_active": False},
        FAST,
        exact=False,
        partly=False,
    ),
]


def ranger21_of_the_authors(*args: Any, **options: Any) -> torch.optim.Optimizer:
    """Imported where it is used: it imports matplotlib, which would cost each process of all tests a second."""
    from ranger21 import Ranger21 as Original

    made: torch.optim.Optimizer = Original(*args, **options)
    return made


def in_train_mode(make: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The reference begins in eval mode."""

    def made(*args: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer: Any = make(*args, **options)
        optimizer.train()
        return optimizer

    return made


NO_RUN = dict.fromkeys(RUN, NOT_GIVEN)
PLAIN = {"use_warmup": False, "warmdown_active": False, "weight_decay": 0.0}
# The reference scales the noise by the second beta, has 1 as the factor of negative momentum, and decays one parameter.
NOISE = math.hypot(2, 1) / math.hypot(1.999, 0.999)
REFERENCE = {"num_epochs": 1, "num_batches_per_epoch": 1000, "normloss_active": False, "logging_active": False}

ORACLES = [
    *(
        Oracle(ours, {"lr": 0.02, **options}, in_train_mode(theirs), {"foreach": False})
        for ours, theirs in (
            (oput.SGDScheduleFree, schedulefree.SGDScheduleFree),
            (oput.AdamWScheduleFree, schedulefree.AdamWScheduleFree),
        )
        for options in (
            {},
            {"weight_decay": 0.1, "warmup_steps": 5},
            {"r": 1.0, "weight_lr_power": 1.0},
        )
    ),
    Oracle(
        oput.AdamWScheduleFree,
        {"lr": 0.02, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},
        in_train_mode(schedulefree.AdamWScheduleFree),
        {"foreach": False},
    ),
    Oracle(
        oput.Ranger21,
        {"lr": 0.03, "weight_decay": 0.1, "warmdown_min_lr": 1e-3, "beta0": 0.7, **RUN},
        Ranger21,
        {"warmdown_min_lr": NOT_GIVEN, "least": 1e-3, **NO_RUN},
        limit=1e-13,  # standard deviations from sums of squares
    ),
    Oracle(
        oput.Ranger21,
        {"lr": 0.02 * NOISE, "normloss_factor": 0.0, **PLAIN},
        ranger21_of_the_authors,
        {"lr": 0.02, "normloss_factor": NOT_GIVEN, **REFERENCE},
        second={},
        limit=1e-11,  # torch takes the softplus of more than 20 for the value itself
    ),
]
