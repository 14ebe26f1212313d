"""Class R: sums over rows, columns, channels."""

from __future__ import annotations

import pytorch_optimizer
import torch.optim as T

import oput_dist as oput
from tests.conformance import FAST, Case
from tests.formulas import sm3
from tests.parity import Oracle, timm

SM3_BOUNDS = tuple(f"accumulator_{axis}" for axis in range(4))

CASES = [
    Case(
        "adafactor", "oput_dist.Adafactor", {"lr": 0.3}, FAST, exact=False, partly=False, vectors=("row_var", "col_var")
    ),
    Case(
        "adafactor cautious",
        "oput_dist.Adafactor",
        {"lr": 0.3, "cautious": True},
        FAST,
        exact=False,
        partly=False,
        vectors=("row_var", "col_var"),
    ),
    Case("sm3", "oput_dist.SM3", {"lr": 0.1}, FAST, exact=False, partly=False, vectors=SM3_BOUNDS),
    Case(
        "sm3 plain", "oput_dist.SM3", {"lr": 0.1, "momentum": 0.0}, FAST, exact=False, partly=False, vectors=SM3_BOUNDS
    ),
    Case("adamp", "oput_dist.AdamP", {"lr": 0.1, "delta": 10.0}, FAST, exact=False, partly=False),
]

ORACLES = [
    Oracle(oput.SM3, {"lr": 0.05, "momentum": 0.0}, pytorch_optimizer.SM3, second={"lr": 0.02}),
    Oracle(oput.SM3, {"lr": 0.05, "momentum": 0.9}, pytorch_optimizer.SM3, second={"lr": 0.02}),
    Oracle(oput.SM3, {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.1}, sm3.sm3),
    Oracle(oput.Adafactor, {"lr": 0.01}, T.Adafactor),
    Oracle(oput.Adafactor, {"lr": 0.05, "weight_decay": 0.1, "d": 1.5, "eps": (1e-3, 1e-2)}, T.Adafactor),
    Oracle(oput.Adafactor, {"lr": 0.1, "beta2_decay": -0.5, "maximize": True}, T.Adafactor),
    Oracle(oput.AdamP, {"lr": 0.01}, timm("adamp", "AdamP")),
    Oracle(oput.AdamP, {"lr": 0.01, "delta": 1.0, "betas": (0.5, 0.9)}, timm("adamp", "AdamP")),
    Oracle(oput.AdamP, {"lr": 0.01, "weight_decay": 0.1, "delta": 3.0, "nesterov": True}, timm("adamp", "AdamP")),
]
