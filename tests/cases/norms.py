"""Class N: sums over each parameter, one packed all-reduce."""

from __future__ import annotations

import optimi

import oput_dist as oput
from tests.cases.elementwise import DECAY, DECOUPLED, PLAIN
from tests.conformance import FAST, Case
from tests.formulas import basic
from tests.parity import NOT_GIVEN, Oracle, timm

CASES = [
    Case("stableadamw", "oput_dist.StableAdamW", {"lr": 0.1}, FAST, exact=False),
    Case("lamb", "oput_dist.Lamb", {"lr": 0.1, "weight_decay": 0.1}, FAST, exact=False),
    Case("lamb adapt", "oput_dist.Lamb", {"lr": 0.5, "always_adapt": True, "clamp": 2.0}, FAST, exact=False),
    Case("lamb clipped", "oput_dist.Lamb", {"lr": 0.1, "max_grad_norm": 1.0}, FAST, exact=False),
    Case("adamw cautious", "oput_dist.AdamW", {"lr": 0.1, "cautious": True}, FAST, exact=False),
    Case("lamb cautious", "oput_dist.Lamb", {"lr": 0.1, "cautious": True}, FAST, exact=False),
    Case("adamw clipped", "oput_dist.AdamW", {"lr": 0.1, "max_grad_norm": 1.0}, FAST, exact=False),
]

CAUTION = {"cautious": NOT_GIVEN, "caution": True}
TIMM_LAMB = {"max_grad_norm": None, "foreach": False}

ORACLES = [
    Oracle(oput.AdamW, {**DECAY, "cautious": True}, timm("adamw", "AdamWLegacy"), CAUTION),
    Oracle(oput.AdamW, {**DECAY, "cautious": True, "amsgrad": True}, timm("adamw", "AdamWLegacy"), CAUTION),
    Oracle(oput.Lion, {**DECAY, "cautious": True}, timm("lion", "Lion"), CAUTION),
    Oracle(oput.StableAdamW, {"lr": 0.01}, optimi.StableAdamW, {"triton": False}),
    Oracle(
        oput.StableAdamW, {"lr": 0.01, "weight_decay": 0.2, "betas": (0.8, 0.9)}, optimi.StableAdamW, {"triton": False}
    ),
    Oracle(
        oput.StableAdamW,
        {"lr": 0.01, "weight_decay": 1e-3, "decouple_lr": True, "max_lr": 0.02},
        optimi.StableAdamW,
        {"triton": False},
        second={"lr": 0.003, "weight_decay": 2e-3},
    ),
    Oracle(oput.Lamb, {"lr": 0.01, "weight_decay": 0.1}, timm("lamb", "Lamb"), TIMM_LAMB),
    Oracle(
        oput.Lamb,
        {"lr": 0.01, "weight_decay": 0.0, "always_adapt": True, "betas": (0.8, 0.95), "eps": 1e-3},
        timm("lamb", "Lamb"),
        TIMM_LAMB,
    ),
    Oracle(oput.Lamb, {"lr": 0.01, "weight_decay": 0.0}, timm("lamb", "Lamb"), TIMM_LAMB),
    Oracle(oput.Lamb, {**DECAY, "clamp": 1.5}, basic.lamb, second=PLAIN),
    Oracle(oput.Lamb, {**DECAY, "always_adapt": True}, basic.lamb, second=PLAIN),
    Oracle(oput.Lamb, {**DECAY, **DECOUPLED}, basic.lamb, second=PLAIN),
]
