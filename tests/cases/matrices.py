"""Optimizers that work on whole matrices."""

from __future__ import annotations

from typing import Any

import oput_dist as oput
from tests.conformance import SECOND, Case
from tests.formulas.matrices import muon
from tests.parity import Oracle

CASES: list[Case] = [
    Case("muon", "oput_dist.Muon", {"lr": 0.1}, SECOND, exact=False, partly=False),
    Case(
        "muon polar express",
        "oput_dist.Muon",
        {"lr": 0.1, "polar_express": True, "nesterov": False, "adjust_lr": "match_rms_adamw", "adam_factor": 0.5},
        {"lr": 0.2, "ns_steps": 8, "adjust_lr": None},
        exact=False,
        partly=False,
    ),
]
MUON: list[dict[str, Any]] = [
    {"lr": 0.02},
    {"lr": 0.02, "momentum": 0.8, "nesterov": False, "adjust_lr": None, "adam_factor": 0.4, "betas": (0.5, 0.8)},
    {"lr": 0.02, "polar_express": True, "ns_steps": 7, "adjust_lr": "match_rms_adamw", "weight_decay": 0.3},
]
ORACLES = [Oracle(oput.Muon, options, muon, limit=1e-13) for options in MUON]  # norms and products in another order
