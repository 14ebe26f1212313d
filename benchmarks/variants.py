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
    "adabelief": [
        {"amsgrad": True},
        {"rectify": False, "weight_decouple": False, "weight_decay": 0.1},
        {"rectify": False, "fixed_decay": True, "weight_decay": 0.1},
    ],
    "adabound": [{"amsbound": True, "weight_decay": 0.1}],
    "adamod": [{"beta3": 0.5}],
    "adopt": [{"decouple": True, "weight_decay": 0.1}],
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
    "adamw": [{"amsgrad": True}],
    "adan": [{"no_prox": True, "weight_decay": 0.1}],
    "lamb": [{"always_adapt": True, "clamp": 2.0}, {"weight_decay": 0.1}],
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

    @property
    def measures(self) -> bool:
        """Whether it sums over parameters, so that the order of summation shows in the last bits."""
        return "max_grad_norm" in self.options or any(p.stage.sums for p in self.programs())

    def build(self, params: Any, **extra: Any) -> oput.Optimizer:
        """The optimizer for ``params``; a group may override ``lr``."""
        return oput.create(self.optimizer, params, **{"lr": LR, **self.options, **extra})

    def programs(self, *shapes: tuple[int, ...]) -> Iterator[Program]:
        """What its step runs on gradients of one dtype, for vectors and matrices or parameters of given shapes."""
        shapes = shapes or ((1,), (2, 2))
        optimizer = self.build([torch.zeros(1)])
        (group,) = optimizer.param_groups
        recipes = dict.fromkeys(optimizer.recipe_of(group, shape) for shape in shapes)
        kind, scaled = type(optimizer.scalars(group, 1)), "max_grad_norm" in self.options
        for recipe in recipes:
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
        rule = self.stage.rule.__name__
        return RULE_TRAFFIC.get(f"{rule} decay={self.prologue.decay.name.lower()}", RULE_TRAFFIC[rule])


RULE_TRAFFIC = {
    "sgd": (2, 1),  # p, g -> p
    "sgd_momentum": (3, 2),
    "sgd_nesterov": (3, 2),
    "adam": (4, 3),  # p, g, m, v -> p, m, v
    "adam_amsgrad": (5, 4),
    "lion": (3, 2),
    "adan": (6, 5),  # p, g, m, d, n, previous -> p, m, d, n, previous
    "ranger": (5, 4),  # p, g, m, v, slow -> p, m, v, slow
    "ranger_belief": (5, 4),
    "lamb_moments": (4, 2),  # p, g, m, v -> m, v
    "lamb_apply": (3, 1),  # p, m, v -> p
    "stable_moments": (3, 2),  # g, m, v -> m, v
    "stable_apply": (3, 1),
    "rmsprop": (3, 2),  # p, g, v -> p, v
    "rmsprop_momentum": (4, 3),
    "rmsprop_centered": (4, 3),
    "rmsprop_centered_momentum": (5, 4),
    "nadam": (4, 3),
    "adopt": (4, 3),
    "adabelief": (4, 3),
    "adabelief_amsgrad": (5, 4),
    "adabound": (4, 3),
    "adabound_amsbound": (5, 4),
    "adamod": (5, 4),  # p, g, m, v, average -> p, m, v, average
    "diffgrad": (5, 4),
    "yogi": (4, 3),
    "ademamix": (5, 4),
    "laprop": (4, 3),
    "mars_norm": (2, 0),  # g, last ->
    "mars": (5, 4),
    "accsgd": (3, 2),
    "aggmo": (5, 4),  # p, g, three momenta -> p, three momenta
    "madgrad": (5, 4),
    "madgrad_plain": (4, 3),
    "pid": (5, 4),
    "qhm": (3, 2),
    "qhadam": (4, 3),
    "rangerqh": (5, 4),  # p, g, m, v, slow -> p, m, v, slow
    "rangerva": (5, 4),
    "rangerva_amsgrad": (6, 5),
    "signsgd": (2, 1),
    "signum": (3, 2),
    "lars_squares": (2, 0),  # p, g ->
    "lars": (2, 1),
    "lars_momentum": (3, 2),
    "lars_nesterov": (3, 2),
    "novograd": (3, 2),  # p, g, m -> p, m
    "a2grad_mean": (4, 2),  # p, g, x, mean -> x, mean
    "a2grad": (4, 3),
    "apollo_products": (4, 0),  # g, m, b, d ->
    "apollo_products decay=l2": (5, 0),
    "apollo": (5, 4),  # p, g, m, b, d -> p, m, b, d
    "apollo_curvature": (2, 0),  # b, d ->
    "apollo_stable": (5, 4),
    "swats_moments": (3, 2),  # g, m, v -> m, v
    "swats_moments decay=l2": (4, 2),
    "swats_moments_amsgrad": (4, 3),
    "swats_moments_amsgrad decay=l2": (5, 3),
    "swats": (4, 3),  # p, g, m, v -> p, m, v
    "swats_amsgrad": (5, 4),
    "amos": (2, 1),
    "amos_momentum": (3, 2),
    "momo_average": (3, 1),  # p, g, d -> d
    "momo_apply": (2, 1),
    "momo_adam_moments": (4, 2),  # p, g, m, v -> m, v
    "momo_adam_apply": (3, 1),
    "momo_adam_prox": (3, 1),
    "prodigy_moments": (6, 4),  # p, g, m, v, s, p0 -> m, v, s, p0
    "prodigy_apply": (3, 1),
    "dadapt_moments": (4, 3),  # g, m, v, s -> m, v, s
    "dadapt_moments decay=l2": (5, 3),
    "dadapt_apply": (3, 1),
    "square_terms": (1, 0),
}

ROOTED = {  # state that comes from square roots
    "rangerqh": ("slow_buffer",),
    "rangerva": ("slow_buffer",),
    "adamod": ("exp_avg_lr",),
    "adopt": ("exp_avg",),
    "laprop": ("exp_avg",),
    "rmsprop": ("momentum_buffer",),
}


class _NormScalars(NamedTuple):
    order: float


GRADIENT_NORM = Program(Measure(square_terms, (WHOLE,), writes_state=False), Prologue(), _NormScalars, 0, False, 0)


def variants(whole_model: bool = False) -> list[Variant]:
    """All that run through the grouped kernel alone, since they see no axes.

    Args:
        whole_model: also those whose parameter groups keep scalars of the whole model, so that a step does not follow
            from a parameter, its gradient and its state.
    """
    every = [(name, options) for name in OPTIMIZERS for options in [*COMMON, *OWN.get(name, [])]]
    return [Variant(name, options) for name, options in every if _flat(name, options, whole_model)]


def _flat(name: str, options: dict[str, Any], whole_model: bool) -> bool:
    optimizer = oput.create(name, [torch.zeros(1)], lr=LR, **options)
    recipe = optimizer.recipe_of(optimizer.param_groups[0], (2, 2))
    return (whole_model or not recipe.kept) and not any(recipe.boxed(number) for number in range(len(recipe.stages)))


def programs() -> list[Program]:
    """All distinct programs of all variants, and the gradient norm's."""
    found = dict.fromkeys(program for variant in variants(whole_model=True) for program in variant.programs())
    return [*found, GRADIENT_NORM]


def bytes_per_element(optimizer: str, itemsize: int = 4) -> int:
    """The least that a step of an optimizer with default options must move."""
    return sum(sum(program.traffic()) for program in Variant(optimizer).programs((2, 2))) * itemsize
