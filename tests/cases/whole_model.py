"""Class G: sums over all parameters of the model. Those that need the loss have test files of their own."""

from __future__ import annotations

from tests.conformance import FAST, Case
from tests.parity import Oracle

CASES = [
    Case("momo cautious", "oput_dist.Momo", {"lr": 1.0, "cautious": True}, FAST, exact=False, partly=False, loss=True),
    Case("momo", "oput_dist.Momo", {"lr": 1.0}, FAST, exact=False, partly=False, loss=True),
]

ORACLES: list[Oracle] = []
