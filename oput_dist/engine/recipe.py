"""What an optimizer tells the engine about one parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from oput_dist.kernels.stage import Decay, Measure, Prologue, Stage

__all__ = ["Group", "Recipe", "decay_rate", "decay_scalar", "prologue_of"]

Group = Mapping[str, Any]
"""A parameter group, lr and all."""


@dataclass(frozen=True)
class Recipe:
    """How a group is updated.

    Args:
        stages: an Update, or a Measure and an Apply in turn.
        state: names of the state tensors, in the order in which the rules take them.
        decay: where weight decay enters: outside the rule, or ``Decay.NONE`` if the rule has an order of its own.
    """

    stages: tuple[Stage, ...]
    state: tuple[str, ...] = ()
    decay: Decay = Decay.NONE

    @property
    def terms(self) -> tuple[int, ...]:
        """For each stage, how many sums of it must be known before the next one."""
        return tuple(stage.terms if isinstance(stage, Measure) else 0 for stage in self.stages)


def as_scalar(value: Any) -> Any:
    """A hyperparameter as a float; as a 0-d float64 tensor where it lives on a GPU, since reading it would wait."""
    if not isinstance(value, torch.Tensor):
        return value
    return float(value) if value.device.type == "cpu" else value.detach().double().reshape(())


def decay_rate(group: Group) -> Any:
    """The share of a parameter that decoupled decay removes in one step.

    ``lr * weight_decay``, or fully decoupled from the learning rate, so that only its schedule matters:
    ``lr / max_lr * weight_decay``.
    """
    if group["decouple_lr"] and group["max_lr"] is None:
        raise ValueError("decouple_lr=True was set on a group without max_lr: set it too, to the schedule's largest lr")
    lr = group["lr"] / group["max_lr"] if group["decouple_lr"] else group["lr"]
    return lr * group["weight_decay"]


def prologue_of(recipe: Recipe, group: Group) -> Prologue:
    """The static part of what precedes the rules. ``decouple_lr`` turns L2 decay into a fully decoupled one."""
    decay = recipe.decay
    if decay is Decay.L2 and group["decouple_lr"]:
        decay = Decay.SHRINK
    if decay is Decay.L2 and isinstance(group["weight_decay"], (int, float)) and group["weight_decay"] == 0:
        decay = Decay.NONE
    return Prologue(decay, group["maximize"])


def decay_scalar(prologue: Prologue, group: Group) -> Any:
    """The scalar that goes with :func:`prologue_of`."""
    if prologue.decay is Decay.L2:
        return group["weight_decay"]
    return 1.0 - decay_rate(group) if prologue.decay is Decay.SHRINK else 0.0
