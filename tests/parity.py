"""The same noisy quadratic under one of ours and under its oracle, each on its own trajectory, in fp64.

An oracle is another library's class, or a formula: a function that updates one parameter in place, written in plain
PyTorch from the paper or from OPTIMIZERS.md, never from the code under test (``tests/formulas/``).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

SHAPES = [(6, 5), (5,), (4, 3, 2, 2), (1,)]
STEPS = 13
EXACT = 2e-15  # a few last bits of parameters of size 1
SECOND = {"lr": 0.003, "weight_decay": 0.07}
NOT_GIVEN: Any = object()  # in ``Oracle.more``: an option of ours that the oracle does not take

Formula = Callable[..., None]
"""``formula(p, g, memory, t, **hyperparameters)`` changes ``p`` and its ``memory`` in place; ``t`` counts from 1."""


@dataclass(frozen=True)
class Oracle:
    """One row: settings of ours, and what must give the same.

    Args:
        ours: the class under test.
        options: its settings.
        oracle: another library's class, or a formula.
        more: what the oracle is given besides, or in place of ours.
        limit: the largest difference of any parameter, whose size is about 1.
        second: what the second parameter group overrides.
        dtype: of parameters and arithmetic.
        apart: whether each tensor is a group of its own for the oracle.
    """

    ours: type[torch.optim.Optimizer]
    options: dict[str, Any]
    oracle: Any
    more: dict[str, Any] = field(default_factory=dict)
    limit: float = EXACT
    second: dict[str, Any] = field(default_factory=lambda: SECOND)
    dtype: torch.dtype = torch.float64
    apart: bool = False

    def __str__(self) -> str:
        source = getattr(self.oracle, "__module__", "").rpartition("tests.")[2].split(".")[0]
        return f"{self.ours.__name__}-{source}-{'-'.join(self.options)}"

    def wanted(self) -> list[Tensor]:
        given = {k: v for k, v in {**self.options, **self.more}.items() if v is not NOT_GIVEN}
        renamed = {k: v for k, v in {**self.second, **self.more}.items() if k in self.second and v is not NOT_GIVEN}
        second = {k: v for k, v in self.second.items() if self.more.get(k) is not NOT_GIVEN} | renamed
        written_out = inspect.isfunction(self.oracle) and self.oracle.__module__.startswith("tests.formulas")
        make = by_formula(self.oracle) if written_out else self.oracle
        return train(make, given, second, self.dtype, self.apart)

    def found(self, **extra: Any) -> list[Tensor]:
        return train(self.ours, {**self.options, **extra}, self.second, self.dtype)


def by_formula(update: Formula) -> Callable[..., torch.optim.Optimizer]:
    """A formula in the form of an optimizer."""

    class ByFormula(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                given = {k: v for k, v in group.items() if k not in ("params", "param_names")}
                for p in group["params"]:
                    memory = self.state[p]
                    memory["t"] = memory.get("t", 0) + 1
                    update(p.data, p.grad, memory, memory["t"], **given)

    return lambda groups, **options: ByFormula(groups, options)


def start(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def pull(p: Tensor, i: int, step: int) -> Tensor:
    """The gradient of a quadratic with noise that depends on the tensor and the step alone."""
    generator = torch.Generator().manual_seed(1000 + 10 * step + i)
    return 0.3 * (p - 0.5) + torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def train(
    make: Callable[..., torch.optim.Optimizer],
    options: dict[str, Any],
    second: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    apart: bool = False,
) -> list[Tensor]:
    """Where STEPS steps lead; the third and fourth tensor are in a group of their own."""
    params = [torch.nn.Parameter(value) for value in start(dtype)]
    groups: list[dict[str, Any]] = [{"params": params[:2]}, {"params": params[2:], **second}]
    if apart:
        groups = [{**group, "params": [p]} for group in groups for p in group["params"]]
    optimizer = make(groups, **options)
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad = pull(p.detach(), i, step)
        optimizer.step()
    return [p.detach() for p in params]


def difference(found: Iterable[Tensor], wanted: list[Tensor]) -> float:
    moved = max((w - s).abs().max().item() for w, s in zip(wanted, start(), strict=True))
    assert moved > 1e-2  # or nothing was tested
    return max((f - w).abs().max().item() for f, w in zip(found, wanted, strict=True))


def without_its_package(package: str, modules: list[str]) -> ModuleType:
    """The last of some modules of a package whose own ``__init__`` cannot be imported: timm's wants torchvision."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = spec.submodule_search_locations[0]
    bare = sys.modules.get("bare_" + package)
    if bare is None:
        bare = ModuleType("bare_" + package)
        bare.__path__ = [f"{root}/optim"]
        sys.modules[bare.__name__] = bare
    for name in modules:
        module = importlib.import_module(f"{bare.__name__}.{name}")
    return module


def timm(module: str, name: str) -> Any:
    """A class of timm's optimizers."""
    return getattr(without_its_package("timm", [module]), name)
