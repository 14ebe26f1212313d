"""Every optimizer with every option that changes what runs. New optimizers come in by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import oput_dist as oput
from oput_dist.engine.recipe import prologue_of
from oput_dist.kernels.math import square_terms
from oput_dist.kernels.stage import WHOLE, Measure, Prologue, Stage
from oput_dist.optimizers import OPTIMIZERS

__all__ = ["Program", "Variant", "programs", "variants"]

LR = 0.05  # a step far larger than the rounding of the parameters, so that an error in it shows
MAX_NORM = 100.0  # about half the norm of the gradients in checks.py: clips, and keeps squares inside fp16's range
COMMON: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True, "max_grad_norm": MAX_NORM},
    {"weight_decay": 0.1, "decouple_lr": True, "max_lr": 2 * LR},
]
OWN: dict[str, list[dict[str, Any]]] = {
    "sgd": [
        {"weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.5, "maximize": True},
        {"momentum": 0.9, "nesterov": True, "decouple_wd": True, "weight_decay": 0.1},
    ],
    "adam": [{"amsgrad": True, "weight_decay": 0.1}],
    "adamw": [{"amsgrad": True}],
    "adan": [{"no_prox": True, "weight_decay": 0.1}],
    "lamb": [{"always_adapt": True, "clamp": 2.0}, {"weight_decay": 0.1}],
}


@dataclass(frozen=True)
class Variant:
    """An optimizer by name, with options."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.optimizer, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def measures(self) -> bool:
        """Whether it sums over parameters, so that the order of summation shows in the last bits."""
        return "max_grad_norm" in self.options or any(p.stage.sums for p in self.programs())

    def build(self, params: Any, **extra: Any) -> oput.Optimizer:
        """The optimizer for ``params``; a group may override ``lr``."""
        return oput.create(self.optimizer, params, **{"lr": LR, **self.options, **extra})

    def programs(self) -> Iterator[Program]:
        """What its step runs on gradients of one dtype."""
        optimizer = self.build([torch.zeros(1)])
        (group,) = optimizer.param_groups
        recipe = optimizer.recipe_of(group, (1,))
        kind, scaled = type(optimizer.scalars(group, 1)), "max_grad_norm" in self.options
        for number, stage in enumerate(recipe.stages):
            yield Program(stage, prologue_of(recipe, group), kind, recipe.width(number), scaled, len(recipe.state))


class Program(NamedTuple):
    """A stage with all that decides how it is compiled, but for dtypes and target."""

    stage: Stage
    prologue: Prologue
    scalars: type
    sums: int
    scaled: bool
    states: int

    @property
    def name(self) -> str:
        decay = self.prologue.decay.name.lower()
        flags = (
            [f"decay={decay}"] * (decay != "none") + ["maximize"] * self.prologue.maximize + ["scaled"] * self.scaled
        )
        return " ".join([self.stage.rule.__name__, *flags])

    def traffic(self) -> tuple[int, int]:
        """How many tensors the stage must read and write for each element: the minimum that memory sees.

        The dictionary is the reckoning by hand that the machine code is compared with: a new rule adds its line.
        """
        return RULE_TRAFFIC[self.stage.rule.__name__]


RULE_TRAFFIC = {
    "sgd": (2, 1),  # p, g -> p
    "sgd_momentum": (3, 2),
    "sgd_nesterov": (3, 2),
    "adam": (4, 3),  # p, g, m, v -> p, m, v
    "adam_amsgrad": (5, 4),
    "lion": (3, 2),
    "adan": (6, 5),  # p, g, m, d, n, previous -> p, m, d, n, previous
    "lamb_moments": (4, 2),  # p, g, m, v -> m, v
    "lamb_apply": (3, 1),  # p, m, v -> p
    "stable_moments": (3, 2),  # g, m, v -> m, v
    "stable_apply": (3, 1),
    "square_terms": (1, 0),
}


class _NormScalars(NamedTuple):
    order: float


GRADIENT_NORM = Program(Measure(square_terms, (WHOLE,), writes_state=False), Prologue(), _NormScalars, 0, False, 0)


def variants() -> list[Variant]:
    """All of them."""
    return [Variant(name, options) for name in OPTIMIZERS if _flat(name) for options in [*COMMON, *OWN.get(name, [])]]


def _flat(name: str) -> bool:
    """Whether an optimizer runs through the grouped kernel alone: it sees no axes, and needs no loss."""
    optimizer = oput.create(name, [torch.zeros(1)])
    recipe = optimizer.recipe_of(optimizer.param_groups[0], (2, 2))
    return not recipe.kept and not any(recipe.boxed(number) for number in range(len(recipe.stages)))


def programs() -> list[Program]:
    """All distinct programs of all variants, and the gradient norm's."""
    found = dict.fromkeys(program for variant in variants() for program in variant.programs())
    return [*found, GRADIENT_NORM]


def bytes_per_element(optimizer: str, itemsize: int = 4) -> int:
    """The least that a step of an optimizer with default options must move."""
    return sum(sum(program.traffic()) for program in Variant(optimizer).programs()) * itemsize
