"""What an optimizer tells the engine about one parameter group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from oput_dist.kernels.stage import Axes, Decay, Factors, Joint, Measure, Prologue, Stage, Vectors

__all__ = ["Group", "Recipe", "Shape", "decay_rate", "decay_scalar", "prologue_of", "vector_shape"]

Group = Mapping[str, Any]
"""A parameter group, lr and all."""

Shape: TypeAlias = Sequence[int]
"""The global shape of a parameter."""


@dataclass(frozen=True)
class Recipe:
    """How the parameters of one shape in a group are updated.

    Args:
        stages: an Update; or a Measure, and what follows from it; or several in turn.
        state: names of the state tensors, in the order in which the rules take them.
        decay: where weight decay enters: outside the rule, or ``Decay.NONE`` if the rule has an order of its own.
        vectors: state that is not parameter-shaped: names, and the axes that each keeps (it has size one along the
            others, and no axis at all if it keeps none).
        kept: names of the scalars that a :class:`Joint` keeps in the parameter group.
    """

    stages: tuple[Stage, ...]
    state: tuple[str, ...] = ()
    decay: Decay = Decay.NONE
    vectors: tuple[tuple[str, Axes], ...] = ()
    kept: tuple[str, ...] = ()

    def sums(self, number: int) -> tuple[Axes, ...]:
        """What a stage measures: for each sum the axes that it keeps."""
        stage = self.stages[number] if number < len(self.stages) else None
        return stage.sums if isinstance(stage, Measure) else ()

    def factors(self, number: int) -> tuple[Axes, ...]:
        """The factors that a stage is given by :class:`Vectors` before it: the axes that each keeps."""
        given = [stage.given for stage in self.stages[: number + 1]]
        return tuple(axes for g in given if isinstance(g, Vectors) for axes in g.axes)

    def width(self, number: int) -> int:
        """How many scalars of each parameter a stage is given, if it is given scalars only."""
        given = self.stages[number].given
        if isinstance(given, Factors):
            return len(self.sums(number - 1)) + 1
        return given.n if isinstance(given, Joint) else len(self.factors(number))

    def boxed(self, number: int) -> bool:
        """Whether a stage must see a parameter's axes, since it sums over some of them or is given vectors."""
        return any(self.sums(number)) or any(self.factors(number))

    @property
    def measures(self) -> bool:
        """Whether anything is summed."""
        return any(isinstance(stage, Measure) for stage in self.stages)


def vector_shape(shape: Shape, axes: Axes) -> tuple[int, ...]:
    """The shape of what keeps some axes of a parameter: size one along the others; ``()`` if it keeps none."""
    return tuple(size if axis in axes else 1 for axis, size in enumerate(shape)) if axes else ()


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
