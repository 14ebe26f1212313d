"""A toy problem for tests of one process: a few tensors, and gradients that depend on the step alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oput_dist as oput
from oput_dist.kernels.stage import JointWithLoss
from oput_dist.optimizers import OPTIMIZERS

EXTRA: dict[str, dict[str, Any]] = {  # what puts all state to use
    "adabelief": {"amsgrad": True, "rectify": False},
    "adabound": {"amsbound": True},
    "adamod": {"beta3": 0.5},
    "mars": {"optimize_1d": True},
    "ranger21": {"num_iterations": 100, "num_warmup_iterations": 2, "lookahead_mergetime": 2},
    "rmsprop": {"momentum": 0.9, "centered": True},
    "ranger": {"k": 2},
    "rangeradabelief": {"k": 2},
    "rangerqh": {"k": 2},
    "rangerva": {"k": 2},
    "sgd": {"momentum": 0.9},
    "sgdw": {"momentum": 0.9},
    "novograd": {"amsgrad": True},
    "apollo": {"warmup": 0},
    "a2gradexp": {"beta": 0.3},
    "a2gradinc": {"beta": 0.3},
    "a2graduni": {"beta": 0.3},
    "amos": {"momentum": 0.9},
    "lars": {"trust_coeff": 0.5},
    "swats": {"amsgrad": True, "betas": (0.8, 0.9), "tolerance": 0.3},
    "sgdp": {"momentum": 0.9, "delta": 10.0},
    "dadaptadam": {"d0": 1.0},  # else the steps would be too small to see
    "prodigy": {"d0": 1.0},
}


def create(name: str, params: Any, **options: Any) -> oput.Optimizer:
    """The optimizer with all its state in use, and its own defaults."""
    return oput.create(name, params, **{**EXTRA.get(name.lower(), {}), **options})


def _recipes(name: str) -> list[Any]:
    optimizer = create(name, [torch.zeros(1)])
    return [optimizer.recipe(optimizer.param_groups[0], shape) for shape in ((3,), (3, 4))]


def _needs_loss(name: str) -> bool:
    return any(isinstance(stage.given, JointWithLoss) for recipe in _recipes(name) for stage in recipe.stages)


NAMES = [name for name in OPTIMIZERS if not _needs_loss(name)]  # for the others see tests/test_momo.py
NORMS = [name for name in NAMES if any(recipe.exchanges for recipe in _recipes(name))]
"""These sum norms, in an order that depends on the backend."""
SHAPES = [(3, 4), (5,), (), (2, 3, 1, 2)]
every_optimizer = pytest.mark.parametrize("name", NAMES)


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(value) for value in tensors(0, dtype)]


def make(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """The optimizer with all its state in use, and both learning rate and decay."""
    return create(name, params, **{"lr": 0.05, "weight_decay": 0.1, **options})


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
