"""Optimizers that work on whole matrices."""

from __future__ import annotations

from typing import Any

import oput_dist as oput
from tests.conformance import SECOND, Case
from tests.formulas.kronecker import shampoo, soap
from tests.formulas.matrices import muon
from tests.parity import Oracle

SHAMPOO_KEEPS = (
    *(f"{kind}_{axis}" for kind in ("factor", "root", "waiting") for axis in range(4)),
    *("exp_avg", "graft_sq", "matrix_counts"),
)
SOAP_KEEPS = (
    *(f"{kind}_{axis}" for kind in ("factor", "basis", "waiting") for axis in range(4)),
    *("exp_avg", "exp_avg_sq", "matrix_counts"),
)
OFTEN = {"precondition_frequency": 2}
WHOLE: dict[str, Any] = {"exact": False, "partly": False}

CASES: list[Case] = [
    Case("shampoo", "oput_dist.Shampoo", {"lr": 0.1, "block_size": 4, **OFTEN}, SECOND, owned=SHAMPOO_KEEPS, **WHOLE),
    Case(
        "shampoo paper",
        "oput_dist.Shampoo",
        {"lr": 0.1, "betas": (0.0, 1.0), "eps": 0.01, "graft": None, "precondition_frequency": 1, "block_size": None},
        SECOND,
        owned=SHAMPOO_KEEPS,
        **WHOLE,
    ),
    Case(
        "shampoo sgd graft",
        "oput_dist.Shampoo",
        {"lr": 0.1, "graft": "sgd", "start_step": 2, "stagger": False, "refresh_delay": 1, **OFTEN},
        SECOND,
        owned=SHAMPOO_KEEPS,
        **WHOLE,
    ),
    Case("soap", "oput_dist.SOAP", {"lr": 0.1, **OFTEN}, SECOND, owned=SOAP_KEEPS, **WHOLE),
    Case(
        "soap blocks",
        "oput_dist.SOAP",
        {"lr": 0.1, "block_size": 3, "max_preconditioner_dim": 2, "stagger": False, "refresh_delay": 1, **OFTEN},
        SECOND,
        owned=SOAP_KEEPS,
        **WHOLE,
    ),
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
SHAMPOO: list[dict[str, Any]] = [
    {"lr": 0.02, "precondition_frequency": 3, "block_size": 3, "start_step": 2},
    {"lr": 0.02, "betas": (0.0, 1.0), "eps": 1e-3, "graft": None, "precondition_frequency": 1, "block_size": None},
    {"lr": 0.02, "betas": (0.8, 0.9), "beta3": 0.5, "graft": "adagrad", "precondition_frequency": 2, "eps": 1e-6},
    {"lr": 0.02, "graft": "rmsprop", "graft_beta": 0.9, "start_step": 5, "precondition_frequency": 4, "eps": 1e-6},
    {"lr": 0.02, "graft": "sgd", "exponents": (1.0, 0.5, 0.3, 0.2), "precondition_frequency": 1, "eps": 1e-4},
    {"lr": 0.02, "root_method": "newton", "precondition_frequency": 2, "eps": 1e-3, "graft_eps": 1e-4},
    {"lr": 0.02, "root_method": "newton_schulz", "precondition_frequency": 2, "eps": 1e-3, "betas": (0.9, 1.0)},
]
SOAPS: list[dict[str, Any]] = [
    {"lr": 0.02, "precondition_frequency": 3},
    {"lr": 0.02, "betas": (0.8, 0.9), "shampoo_beta": 0.7, "eps": 1e-5, "precondition_frequency": 1},
    {"lr": 0.02, "max_preconditioner_dim": 4, "precondition_frequency": 2},
]
ORACLES = [
    *[Oracle(oput.Shampoo, {"stagger": False, **options}, shampoo, limit=1e-13) for options in SHAMPOO],
    *[Oracle(oput.SOAP, {"stagger": False, **options}, soap, limit=1e-13) for options in SOAPS],
    *[Oracle(oput.Muon, options, muon, limit=1e-13) for options in MUON],  # norms and products in another order
]
