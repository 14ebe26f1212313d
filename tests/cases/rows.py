"""Class R: sums over rows, columns, channels."""

from __future__ import annotations

import torch.optim as T

import oput_dist as oput
from tests.conformance import FAST, Case
from tests.parity import Oracle, timm

CASES = [
    Case(
        "adafactor", "oput_dist.Adafactor", {"lr": 0.3}, FAST, exact=False, partly=False, vectors=("row_var", "col_var")
    ),
    Case("adamp", "oput_dist.AdamP", {"lr": 0.1, "delta": 10.0}, FAST, exact=False, partly=False),
]

ORACLES = [
    Oracle(oput.Adafactor, {"lr": 0.01}, T.Adafactor),
    Oracle(oput.Adafactor, {"lr": 0.05, "weight_decay": 0.1, "d": 1.5, "eps": (1e-3, 1e-2)}, T.Adafactor),
    Oracle(oput.Adafactor, {"lr": 0.1, "beta2_decay": -0.5, "maximize": True}, T.Adafactor),
    Oracle(oput.AdamP, {"lr": 0.01}, timm("adamp", "AdamP")),
    Oracle(oput.AdamP, {"lr": 0.01, "delta": 1.0, "betas": (0.5, 0.9)}, timm("adamp", "AdamP")),
    Oracle(oput.AdamP, {"lr": 0.01, "weight_decay": 0.1, "delta": 3.0, "nesterov": True}, timm("adamp", "AdamP")),
]
