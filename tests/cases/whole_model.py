"""Class G: sums over all parameters of the model. Those that need the loss have test files of their own."""

from __future__ import annotations

import dadaptation
import prodigyopt

import oput_dist as oput
from tests.conformance import FAST, Case
from tests.formulas import whole_model
from tests.parity import Oracle

CASES = [
    Case("momo cautious", "oput_dist.Momo", {"lr": 1.0, "cautious": True}, FAST, exact=False, partly=False, loss=True),
    Case("momo", "oput_dist.Momo", {"lr": 1.0}, FAST, exact=False, partly=False, loss=True),
    Case("momoadam", "oput_dist.MomoAdam", {"lr": 0.5}, FAST, exact=False, partly=False, loss=True),
    Case(
        "momoadam before",
        "oput_dist.MomoAdam",
        {"lr": 0.5, "divide": False, "lb": -1.0},
        FAST,
        exact=False,
        partly=False,
        loss=True,
    ),
    Case("prodigy", "oput_dist.Prodigy", {"lr": 1.0, "d0": 0.05}, FAST, exact=False, partly=False),
    Case(
        "prodigy corrected",
        "oput_dist.Prodigy",
        {"lr": 1.0, "d0": 0.05, "decouple": False, "use_bias_correction": True, "safeguard_warmup": True},
        FAST,
        exact=False,
        partly=False,
    ),
    Case("dadaptadam", "oput_dist.DAdaptAdam", {"lr": 1.0, "d0": 0.05}, FAST, exact=False, partly=False),
]

# The second group has another decay only: the references take no other learning rate than the first group's or 0.
DECAYS = {"weight_decay": 0.07}
APART = {"lr": 0.3, "weight_decay": 0.07}
STILL = {"lr": 0.0}
START = {"lr": 1.0, "weight_decay": 0.1, "d0": 0.02}
CORRECTED = {**START, "use_bias_correction": True}
FULLY = {"decouple_lr": True, "max_lr": 2.0}
ESTIMATED = 2e-14  # sums in another order change the estimate's last bits, and it multiplies every step

ORACLES = [
    *(
        Oracle(oput.Prodigy, options, prodigyopt.Prodigy, limit=ESTIMATED, second=DECAYS)
        for options in (
            {"d0": 0.01},
            START,
            {**CORRECTED, "decouple": False},
            {**START, "lr": 0.3, "safeguard_warmup": True, "d_coef": 2.0},
            {**START, "growth_rate": 1.02},
            {**START, "betas": (0.5, 0.9), "beta3": 0.5, "eps": 1e-3},
        )
    ),
    *(
        Oracle(oput.Prodigy, options, whole_model.Prodigy, limit=ESTIMATED, second=second)
        for options, second in (
            (CORRECTED, APART),
            ({**START, "safeguard_warmup": True}, APART),
            ({**START, "safeguard_warmup": True}, STILL),
            ({**START, **FULLY}, APART),
            ({**START, **FULLY, "decouple": False}, APART),
            # without a first moment, prodigyopt takes the new estimate in place of the old one
            ({**START, "betas": (0.0, 0.9), "beta3": 0.5}, APART),
        )
    ),
    *(
        Oracle(oput.DAdaptAdam, options, dadaptation.DAdaptAdam, limit=ESTIMATED, second=second)
        for options, second in (
            ({"d0": 0.02}, DECAYS),
            (START, DECAYS),
            ({**CORRECTED, "decouple": True}, DECAYS),
            ({**START, "lr": 0.5, "growth_rate": 1.02}, DECAYS),
            ({**START, "betas": (0.0, 0.9), "eps": 1e-3}, DECAYS),
            (START, {**DECAYS, "layer_scale": 0.3}),
        )
    ),
    *(
        Oracle(oput.DAdaptAdam, options, whole_model.DAdaptAdam, limit=ESTIMATED, second=second)
        for options, second in (
            (CORRECTED, APART),
            (START, STILL),
            ({**START, **FULLY}, {**APART, "layer_scale": 2.0}),
        )
    ),
]
