"""Every optimizer with every option that changes what runs. New optimizers come in by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

import oput_dist as oput
from oput_dist.backends import Stack
from oput_dist.backends.boxes import view_of
from oput_dist.engine.recipe import Recipe, prologue_of
from oput_dist.kernels.math import square_terms
from oput_dist.kernels.stage import WHOLE, Agreement, Cautious, Joint, Measure, Prologue, Stage, Write, measures
from oput_dist.optimizers import OPTIMIZERS

from .traffic import RULE_TRAFFIC

__all__ = ["Program", "Variant", "programs", "variants"]

LR = 0.05  # a step far larger than the rounding of the parameters, so that an error in it shows
MAX_NORM = 100.0  # about half the norm of the gradients in checks.py: clips, and keeps squares inside fp16's range
COMMON: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.1, "maximize": True, "max_grad_norm": MAX_NORM},
    {"weight_decay": 0.1, "decouple_lr": True, "max_lr": 2 * LR},
]
NEEDED: dict[str, dict[str, Any]] = {
    "ranger21": {"num_iterations": 100},  # has no default
    "soap": {"max_preconditioner_dim": 1},  # bases of few gradients depend on rounding, which is compared here
}
OWN: dict[str, list[dict[str, Any]]] = {
    "adabelief": [
        {"amsgrad": True},
        {"rectify": False, "weight_decouple": False, "weight_decay": 0.1},
        {"rectify": False, "fixed_decay": True, "weight_decay": 0.1},
    ],
    "adabound": [{"amsbound": True, "weight_decay": 0.1}],
    "adamod": [{"beta3": 0.5}],
    "adopt": [{"decouple": True, "weight_decay": 0.1}],
    "adahessian": [{"hessian_power": 0.5}],
    "mars": [{"optimize_1d": True}],
    "nadam": [{"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "radam": [{"decoupled_weight_decay": True, "weight_decay": 0.1, "betas": (0.9, 0.8)}],
    "rmsprop": [{"momentum": 0.9}, {"centered": True}, {"momentum": 0.9, "centered": True, "weight_decay": 0.1}],
    "yogi": [{"initial_momentum": True, "initial_accumulator": 1.0}],
    "ranger": [{"use_gc": False}, {"use_gc": False, "k": 2, "weight_decay": 0.1, "decouple_wd": False}],
    "rangeradabelief": [
        {"use_gc": False},
        {"use_gc": False, "k": 2, "weight_decay": 0.1, "decouple_wd": False, "maximize": True},
    ],
    "sgd": [
        {"weight_decay": 0.1},
        {"momentum": 0.9, "dampening": 0.5, "maximize": True},
        {"momentum": 0.9, "nesterov": True, "decouple_wd": True, "weight_decay": 0.1},
    ],
    "madgrad": [
        {"weight_decay": 0.01},
        {"decouple_decay": True, "weight_decay": 0.1},
        {"momentum": 0.0, "decouple_decay": True, "weight_decay": 0.1},
    ],
    "pid": [{"dampening": 0.5, "bug_compat": True}],
    "qhm": [{"weight_decay": 0.1}, {"weight_decay_type": "direct", "weight_decay": 0.1, "momentum": 0.9}],
    "qhadam": [{"nus": (0.7, 0.5), "decouple_weight_decay": True, "weight_decay": 0.1}],
    "rangerqh": [{"k": 2, "nus": (0.7, 0.5), "decouple_weight_decay": True, "weight_decay": 0.1}],
    "rangerva": [{"k": 2}, {"amsgrad": False, "transformer": None}, {"grad_transformer": "abs", "bug_compat": True}],
    "signum": [{"momentum": 0.0, "weight_decay": 0.1}, {"decouple_wd": False, "weight_decay": 0.1}],
    "adam": [{"amsgrad": True, "weight_decay": 0.1}],
    "adamw": [{"amsgrad": True}, {"cautious": True}],
    "adafactor": [{"cautious": True}],
    "sm3": [{"momentum": 0.0}],
    "adan": [{"no_prox": True, "weight_decay": 0.1}],
    "lamb": [{"always_adapt": True, "clamp": 2.0}, {"weight_decay": 0.1}, {"cautious": True}],
    "lars": [
        {"momentum": 0.0, "always_adapt": True, "trust_coeff": 0.5},
        {"nesterov": True, "weight_decay": 0.1, "trust_clip": True, "trust_coeff": 0.5},
    ],
    "novograd": [{"amsgrad": True, "grad_averaging": True}],
    "apollo": [{"warmup": 0}, {"warmup": 0, "weight_decay_type": "stable", "weight_decay": 0.1}],
    "swats": [
        {"betas": (0.8, 0.9), "tolerance": 0.5, "nesterov": True},
        {"betas": (0.8, 0.9), "tolerance": 0.5, "amsgrad": True, "weight_decay": 0.1},
    ],
    "amos": [{"momentum": 0.9}],
    "momoadam": [{"divide": False, "weight_decay": 0.1}],
    "prodigy": [{"decouple": False, "weight_decay": 0.1}],
    "dadaptadam": [{"decouple": True, "weight_decay": 0.1}],
}


@dataclass(frozen=True)
class Variant:
    """An optimizer by name, with options."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return " ".join([self.optimizer, *(f"{k}={v}" for k, v in self.options.items())])

    @cached_property
    def exchanges(self) -> bool:
        """Whether one of its stages sums over parameters."""
        return any(measures(program.stage) for program in self.programs())

    @cached_property
    def joint(self) -> bool:
        """Whether its step follows from sums over the whole model."""
        return any(isinstance(program.stage.given, Joint) for program in self.programs())

    @cached_property
    def measures(self) -> bool:
        """Whether it sums over parameters, so that the order of summation shows in the last bits."""
        return "max_grad_norm" in self.options or self.exchanges

    def build(self, params: Any, **extra: Any) -> oput.Optimizer:
        """The optimizer for ``params``; a group may override ``lr``."""
        return oput.create(
            self.optimizer, params, **{"lr": LR, **NEEDED.get(self.optimizer, {}), **self.options, **extra}
        )

    def programs(self, *shapes: tuple[int, ...]) -> Iterator[Program]:
        """What its step runs on gradients of one dtype, for vectors and matrices or parameters of given shapes."""
        shapes = shapes or ((1,), (2, 2))
        optimizer = self.build([torch.zeros(1)])
        (group,) = optimizer.param_groups
        recipes = {shape: optimizer.recipe_of(group, shape) for shape in shapes}
        kind, scaled = type(optimizer.scalars(group, 1)), "max_grad_norm" in self.options
        for shape, recipe in recipes.items():
            for number, stage in enumerate(recipe.stages):
                boxed = _boxed(recipe, number, shape) if recipe.boxed(number) else None
                width = 0 if boxed else recipe.width(number)
                states = len(recipe.state) + (recipe.whole is not None)
                yield Program(stage, prologue_of(recipe, group), kind, width, scaled, states, boxed)


def _boxed(recipe: Recipe, number: int, shape: tuple[int, ...]) -> Boxed:
    """How many factors the boxed kernel is given, and how each term leaves a tile."""
    stage, axes = recipe.stages[number], [*recipe.factors(number)]
    axes += [()] * (recipe.width(number) - len(axes))
    wide = tuple(32 * size for size in shape)  # so that no axis is of one element
    factors = tuple(torch.ones(1, *[n if a in kept else 1 for a, n in enumerate(wide)]) for kept in axes)
    view = view_of(stage, Stack(wide, torch.empty(wide).stride(), [], [], factors))
    terms = [(kept, False) for kept in stage.sums] + [(kept, True) for kept in stage.maxima]
    return Boxed(len(factors), tuple(view.mode(kept, maximum) for kept, maximum in terms))


class Boxed(NamedTuple):
    """What more decides how the boxed kernel is compiled."""

    factors: int
    terms: tuple[int, ...]


class Program(NamedTuple):
    """A stage with all that decides how it is compiled, but for dtypes and target."""

    stage: Stage
    prologue: Prologue
    scalars: type
    sums: int
    scaled: bool
    states: int
    boxed: Boxed | None = None

    @property
    def name(self) -> str:
        decay = self.prologue.decay.name.lower()
        flags = (
            [f"decay={decay}"] * (decay != "none") + ["maximize"] * self.prologue.maximize + ["scaled"] * self.scaled
        )
        words = [CAUTION.get(type(self.stage), ""), "boxed" if self.boxed is not None else ""]
        flags += [f"write={self.prologue.write.name.lower()}"] * self.prologue.aside
        return " ".join([self.stage.rule.__name__, *filter(None, words), *flags])

    def written(self, write: Write) -> Program:
        """The same with parameters written in another way."""
        return self._replace(prologue=replace(self.prologue, write=write))

    def dtypes(self, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
        """Of all state, where that of the rule is of one dtype, that of the parameters."""
        aside = {Write.KAHAN: (dtype,), Write.STOCHASTIC: (torch.int16,)}.get(self.prologue.write, ())
        return (*aside, *(dtype,) * self.states)

    def traffic(self) -> tuple[int, int]:
        """How many tensors the stage must read and write for each element: the minimum that memory sees.

        The dictionary is the reckoning by hand that the machine code is compared with: a new rule adds its line.
        """
        rule, caution = self.stage.rule.__name__, CAUTION.get(type(self.stage), "")
        keys = (f"{rule} {caution}", f"{rule} decay={self.prologue.decay.name.lower()}", rule)
        reads, writes = next(RULE_TRAFFIC[key] for key in keys if key in RULE_TRAFFIC)
        kept = self.prologue.write is Write.KAHAN and self.stage.writes_parameter
        return reads + self.prologue.aside, 0 if isinstance(self.stage, Agreement) else writes + kept


CAUTION: dict[type, str] = {Agreement: "agreement", Cautious: "cautious"}
ROOTED = {  # state that comes from square roots
    "rangerqh": ("slow_buffer",),
    "rangerva": ("slow_buffer",),
    "adamod": ("exp_avg_lr",),
    "adamwschedulefree": ("z",),
    "adopt": ("exp_avg",),
    "laprop": ("exp_avg",),
    "rmsprop": ("momentum_buffer",),
}


class _NormScalars(NamedTuple):
    order: float


GRADIENT_NORM = Program(Measure(square_terms, (WHOLE,), writes_state=False), Prologue(), _NormScalars, 0, False, 0)


def variants() -> list[Variant]:
    """All of them."""
    return [Variant(name, options) for name in OPTIMIZERS for options in [*COMMON, *OWN.get(name, [])]]


WRITTEN = [Variant("adamw"), Variant("adan"), Variant("lamb", {"cautious": True}), Variant("adafactor")]
"""What stands for all rules, whose new parameters may be written in several ways."""


def programs() -> list[Program]:
    """All distinct programs of all variants, the gradient norm's, and some that write parameters in other ways."""
    found = dict.fromkeys(program for variant in variants() for program in variant.programs())
    some = dict.fromkeys(program for variant in WRITTEN for program in variant.programs())
    kahan = [p for p in some if p.stage.writes_parameter or p.stage.rule.__name__.startswith("lamb")]
    tossed = [p for p in some if p.stage.writes_parameter]
    ways = {Write.KAHAN: kahan, Write.STOCHASTIC: tossed}
    return [*found, GRADIENT_NORM, *(p.written(write) for write, chosen in ways.items() for p in chosen)]


def bytes_per_element(optimizer: str, itemsize: int = 4) -> int:
    """The least that a step of an optimizer with default options must move."""
    return sum(sum(program.traffic()) for program in Variant(optimizer).programs((2, 2))) * itemsize
