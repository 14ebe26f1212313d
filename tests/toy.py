"""A toy problem for tests of one process: a few tensors, and gradients that depend on the step alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oput_dist as oput

NAMES = [name for name in oput.available() if name != "momo"]  # whose step needs the loss: tests/test_momo.py
NORMS = ("adafactor", "adamp", "lamb", "stableadamw")  # these sum norms, in an order that depends on the backend
SHAPES = [(3, 4), (5,), (), (2, 3, 1, 2)]
every_optimizer = pytest.mark.parametrize("name", NAMES)


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in tensors(0, dtype)]


def make(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """The optimizer with all its state in use."""
    extra = {"momentum": 0.9} if name == "sgd" else {}
    return oput.create(name, params, **{"lr": 0.05, "weight_decay": 0.1, **extra, **options})


def walk(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> list[Tensor]:
    """Steps with gradients that depend on the step alone; returns what the parameters are then."""
    for step in steps:
        for p, g in zip(params, tensors(100 + step, params[0].dtype), strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach().clone() for p in params]


def trajectory(name: str, steps: int = 6, **options: Any) -> list[Tensor]:
    params = parameters()
    return walk(make(name, params, **options), params, range(steps))


def largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max((f - w).abs().max().item() for f, w in zip(found, wanted, strict=True))


def same(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(f, w) for f, w in zip(found, wanted, strict=True))
