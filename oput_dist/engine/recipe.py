"""What an optimizer tells the engine about one parameter group."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from oput_dist.kernels.stage import (
    Agreement,
    Apply,
    Axes,
    Cautious,
    Decay,
    Factors,
    Joint,
    Prologue,
    Stage,
    Stored,
    Update,
    Vectors,
    Write,
    measures,
)
from oput_dist.matrix.work import Work

__all__ = ["Group", "Recipe", "Shape", "decay_rate", "decay_scalar", "prologue_of", "row_of", "vector_shape"]

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
        whole: what is done between the first stage and the second with the whole of what the first one made. Both then
            have one more state, the last: the first stage writes there what is to be worked on, the second finds what
            came of it. It is not kept.
    """

    stages: tuple[Stage, ...]
    state: tuple[str, ...] = ()
    decay: Decay = Decay.NONE
    vectors: tuple[tuple[str, Axes], ...] = ()
    kept: tuple[str, ...] = ()
    whole: Work | None = None

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        """Worked out once: a step looks up by recipes many times, and this looks at every rule."""
        return hash((self.stages, self.state, self.decay, self.vectors, self.kept, self.whole))

    def sums(self, number: int) -> tuple[Axes, ...]:
        """What a stage sums: for each sum the axes that it keeps."""
        return self.stages[number].sums if number < len(self.stages) else ()

    def maxima(self, number: int) -> tuple[Axes, ...]:
        """What a stage takes the maximum of, likewise."""
        return self.stages[number].maxima if number < len(self.stages) else ()

    def measures(self, number: int) -> bool:
        """Whether an exchange between ranks follows a stage."""
        return number < len(self.stages) and measures(self.stages[number])

    def factors(self, number: int) -> tuple[Axes, ...]:
        """The factors of rows and columns that a stage is given, by it and earlier ones: the axes that each keeps."""
        given = [stage.given for stage in self.stages[: number + 1] if not isinstance(stage, Cautious)]
        return tuple(axes for g in given if isinstance(g, (Vectors, Stored)) for axes in g.axes)

    def width(self, number: int) -> int:
        """How many scalars of each parameter a stage is given, if it is given scalars only."""
        stage = self.stages[number]
        if isinstance(stage, Cautious):
            return self.width(number - 1) + 1
        if isinstance(stage.given, Factors):
            return len(self.sums(number - 1)) + 1
        return len(self.factors(number)) + (stage.given.n if isinstance(stage.given, Joint) else 0)

    def boxed(self, number: int) -> bool:
        """Whether a stage must see a parameter's axes, since it sums over some of them or is given vectors."""
        return any(self.sums(number)) or bool(self.maxima(number)) or any(self.factors(number))

    @property
    def exchanges(self) -> int:
        """How often ranks exchange sums in a step."""
        return sum(measures(stage) for stage in self.stages)

    def cautious(self) -> Recipe:
        """The recipe that moves only what its last stage would move against the gradient."""
        last = self.stages[-1]
        assert isinstance(last, (Update, Apply))
        return replace(self, stages=(*self.stages[:-1], Agreement(last), Cautious(last)))


@functools.cache  # so that rules are compiled once; the name is part of what compilers know a class by
def _row(names: tuple[str, ...]) -> Any:
    return namedtuple(f"row_{'_'.join(names)}", names)


def row_of(**values: Any) -> Any:
    """``h``, the row of scalars that rules see, as a named tuple: the same type for the same names in any order."""
    return _row(tuple(sorted(values)))(**values)


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


def prologue_of(recipe: Recipe, group: Group, write: Write = Write.NEAREST) -> Prologue:
    """The static part of what surrounds the rules. ``decouple_lr`` turns L2 decay into a fully decoupled one."""
    decay = recipe.decay
    if decay is Decay.L2 and group["decouple_lr"]:
        decay = Decay.SHRINK
    if decay is Decay.L2 and isinstance(group["weight_decay"], (int, float)) and group["weight_decay"] == 0:
        decay = Decay.NONE
    return Prologue(decay, group["maximize"], write)


def decay_scalar(prologue: Prologue, group: Group) -> Any:
    """The scalar that goes with :func:`prologue_of`."""
    if prologue.decay is Decay.L2:
        return group["weight_decay"]
    return 1.0 - decay_rate(group) if prologue.decay is Decay.SHRINK else 0.0
