from __future__ import annotations

import pytest
import torch

from tests.conformance import Case, faults
from tests.layouts import WORLDS
from tests.pool import Pool

CASES = [
    Case("adamw", "torch.optim.AdamW", {"lr": 0.1}, {"lr": 0.03, "weight_decay": 0.2}),
    Case("sgd", "torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}, {"lr": 0.03, "weight_decay": 0.2}),
]


@pytest.mark.parametrize(("layout", "n"), [w for w in WORLDS if w[0] != "zero1"])
def test_sharding_changes_nothing(pool: Pool, layout: str, n: int) -> None:
    dtypes, backends = [torch.float32, torch.float64], ["eager"]
    found = faults(pool, layout, n, CASES, dtypes, backends)
    assert not found, "\n".join(found)
