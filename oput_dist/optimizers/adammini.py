"""Adam-mini: Adam with one second moment for each block of a parameter."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, PositiveInteger, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import WHOLE, Axes, Decay, Measure, Update, Vectors

from .scalars import adam_scalars

__all__ = ["AdamMini"]


@rule
def mini_squares(p, g, state, h):
    return state, (g * g,)


@functools.cache  # so that equal recipes stay equal
def block_moments(length: int, heads: int | None) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The second moments of rows of ``length`` elements, or of heads that have as many rows each."""

    def moments(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
        squares = sums[0] / length
        if heads is not None:
            blocks = squares.unflatten(1, (heads, -1))
            squares = blocks.mean(2, keepdim=True).expand_as(blocks).flatten(1, 2)
        v = torch.lerp(vectors[0], squares, h.weight2)
        return (v,), (v,)

    return moments


@rule
def mini_update(p, g, state, h, c):
    (m,) = state
    (v,) = c
    m = lerp(m, g, h.weight1)
    return p - h.lr * m / (tl.sqrt(v) * h.root + h.eps), (m,)


def check_heads(heads: int | None, shape: Shape) -> None:
    """Raise ValueError for a matrix whose rows cannot be divided."""
    if heads is not None and len(shape) > 1 and shape[0] % heads:
        raise ValueError(f"AdamMini: heads={heads} must divide the number of rows, {shape[0]} of shape {tuple(shape)}")


class AdamMini(Optimizer):
    r"""Adam-mini: AdamW whose second moment is the mean over a block.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_{t} = \beta_2 v_{t-1} + (1 - \beta_2) \operatorname{mean}_\text{block}(g_t^2), \qquad
        p_t = (1 - \eta\lambda) p_{t-1} - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    A block is a row, that is a slice along the first axis: an output of a linear layer, a token of an embedding.
    Vectors and scalars are one block each. In groups with ``heads`` a block is a head: rows are divided into so many
    equal parts. Give it to query and key projections. An element whose gradient is missing counts as zero in the mean.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        heads: how many heads the rows of matrices are divided into, an integer >= 1 that divides their number; mostly
            an option of a group. Default None: each row is a block.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range, or rows that ``heads`` does not divide.

    Sharding class R: one packed all-reduce a step. State: 4 bytes per parameter (fp32), and a value for each row, the
    same on all ranks.

    When: transformers, in place of AdamW where half of its state is to be saved. Start: ``lr=3e-3``,
    ``betas=(0.9, 0.95)``.

    Paper: Zhang et al., https://arxiv.org/abs/2406.16793.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        heads: PositiveInteger | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def check(self, group: Group) -> None:
        given = group.get("params", ()) if group["heads"] is not None else ()
        for entry in [given] if isinstance(given, torch.Tensor) else given:
            tensor = entry[1] if isinstance(entry, tuple) else entry
            if isinstance(tensor, torch.Tensor):
                check_heads(group["heads"], tensor.shape)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        check_heads(group["heads"], shape)
        axes: Axes = (0,) if len(shape) > 1 else WHOLE
        moments = block_moments(math.prod(shape[1:] if axes else shape), group["heads"] if axes else None)
        stages = (Measure(mini_squares, (axes,), writes_state=False), Update(mini_update, Vectors(moments, (axes,))))
        return Recipe(stages, ("exp_avg",), Decay.SHRINK, (("exp_avg_sq", axes),))

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(**adam_scalars(group, step))
