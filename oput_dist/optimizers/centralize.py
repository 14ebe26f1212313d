"""Gradient centralisation: the mean of each row, a slice along the first axis, is taken out of the gradient."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from oput_dist.engine import Group, Shape
from oput_dist.kernels.language import Rule, rule
from oput_dist.kernels.stage import Measure, Stage, Update, Vectors

__all__: list[str] = []


@rule
def gradient_rows(p, g, state, h):
    return state, (g,)


@functools.cache  # so that equal recipes stay equal
def row_means(length: int) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The mean of the gradient in each row, for parameters whose rows have ``length`` elements."""

    def means(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
        return vectors, (sums[0] / length,)

    return means


def is_centralized(group: Group, shape: Shape) -> bool:
    """Whether the gradients of a shape are: matrices and all above, or convolutions (more than three axes) alone."""
    return bool(group["use_gc"]) and len(shape) > (3 if group["gc_conv_only"] else 1)


def centralized(group: Group, shape: Shape, plain: Rule, centred: Rule) -> tuple[Stage, ...]:
    """The stages of an update by ``plain``; where gradients are centralised, by ``centred`` with the means as ``c``."""
    if not is_centralized(group, shape):
        return (Update(plain),)
    means = Vectors(row_means(math.prod(shape[1:])), ((0,),))
    return Measure(gradient_rows, ((0,),), writes_state=False), Update(centred, means)
