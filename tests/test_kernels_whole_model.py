"""The Triton kernels of optimizers of the whole model, interpreted: they must lead where the eager backend does."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oput_dist as oput
from tests.parity import SECOND, difference, pull, start

SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("Momo", {"weight_decay": 0.1}),
    ("MomoAdam", {"lr": 0.3, "weight_decay": 0.1}),
    ("MomoAdam", {"lr": 0.3, "divide": False, "use_fstar": True}),
    ("Prodigy", {"d0": 0.05, "weight_decay": 0.1, "safeguard_warmup": True}),
    ("Prodigy", {"d0": 0.05, "weight_decay": 0.1, "decouple": False, "max_grad_norm": 1.0}),
    ("DAdaptAdam", {"d0": 0.05, "weight_decay": 0.1}),
    ("DAdaptAdam", {"d0": 0.05, "weight_decay": 0.1, "decouple": True, "maximize": True}),
]


def trained(name: str, settings: dict[str, Any], dtype: torch.dtype, backend: str) -> list[Tensor]:
    params = [nn.Parameter(p) for p in start(dtype)]
    groups = [{"params": params[:2]}, {"params": params[2:], **SECOND}]
    optimizer = getattr(oput, name)(groups, backend=backend, **settings)
    for step in range(6):
        for i, p in enumerate(params):
            p.grad = pull(p.detach(), i, step)
        optimizer.step(**({"loss": 6.0 - step} if name.startswith("Momo") else {}))
    return [p.detach() for p in params]


def off(name: str, settings: dict[str, Any], dtype: torch.dtype) -> float:
    return difference(*(trained(name, settings, dtype, backend) for backend in ("triton", "eager")))


@pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 2e-14)])
def test_as_eager(interpreter: Executor, name: str, settings: dict[str, Any], dtype: torch.dtype, limit: float) -> None:
    assert interpreter.submit(off, name, settings, dtype).result() <= limit
