"""Every optimizer under every layout gives what one process gives. Adding an optimizer is one row of CASES."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oput_dist as oput
from tests.conformance import Case, faults
from tests.layouts import WORLDS, Distributed
from tests.pool import Pool

SECOND = {"lr": 0.05, "weight_decay": 0.2}
CASES = [
    Case("sgd", "oput_dist.SGD", {"lr": 0.1}, SECOND),
    Case("sgd momentum", "oput_dist.SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True}, SECOND),
    Case("sgd nesterov", "oput_dist.SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "decouple_wd": True}, SECOND),
    Case("adam", "oput_dist.Adam", {"lr": 0.1}, SECOND),
    Case("adam amsgrad", "oput_dist.Adam", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}, SECOND),
    Case("adamw", "oput_dist.AdamW", {"lr": 0.1}, SECOND),
    Case("adamw decoupled", "oput_dist.AdamW", {"lr": 0.1, "decouple_lr": True, "max_lr": 0.2}, SECOND),
    Case("lion", "oput_dist.Lion", {"lr": 0.1}, SECOND),
    Case("adan", "oput_dist.Adan", {"lr": 0.1}, SECOND),
    Case("adan no_prox", "oput_dist.Adan", {"lr": 0.1, "no_prox": True}, SECOND),
    Case("stableadamw", "oput_dist.StableAdamW", {"lr": 0.1}, SECOND, exact=False),
    Case("lamb", "oput_dist.Lamb", {"lr": 0.1, "weight_decay": 0.1}, SECOND, exact=False),
    Case("lamb adapt", "oput_dist.Lamb", {"lr": 0.1, "always_adapt": True, "clamp": 2.0}, SECOND, exact=False),
    Case("lamb clipped", "oput_dist.Lamb", {"lr": 0.1, "max_grad_norm": 1.0}, SECOND, exact=False),
    Case("adamw clipped", "oput_dist.AdamW", {"lr": 0.1, "max_grad_norm": 1.0}, SECOND, exact=False),
]
TORCH = [
    Case("torch adamw", "torch.optim.AdamW", {"lr": 0.1}, SECOND),
    Case("torch sgd", "torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}, SECOND),
]


@pytest.mark.parametrize(("layout", "n"), WORLDS)
def test_sharding_changes_nothing(pool: Pool, layout: str, n: int) -> None:
    found = faults(pool, layout, n, CASES, [torch.float32, torch.float64], ["eager", "foreach"])
    assert not found, "\n".join(found)

@pytest.mark.parametrize(("layout", "n"), [("rows", 3), ("zero1", 2)])
def test_bf16(pool: Pool, layout: str, n: int) -> None:
    found = faults(pool, layout, n, CASES, [torch.bfloat16], ["eager", "foreach"])
    assert not found, "\n".join(found)
