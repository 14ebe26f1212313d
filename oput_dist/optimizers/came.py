"""CAME: Adafactor's second moment, and a momentum whose steps are as long as it is to be trusted."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Allowed, Betas3, Nonnegative, Positive, each, hyperparameters, positive
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import at_least, lerp
from oput_dist.kernels.stage import WHOLE, Apply, Decay, Factors, Measure, Update, Vectors

__all__ = ["CAME"]

Floors = Annotated[tuple[float, float], Allowed(each(positive, "(eps1, eps2), each a finite number > 0", 2))]

# Vectors and scalars: the whole second moment is kept, and there is no confidence.


@rule
def came_plain_moment(p, g, state, h):
    m, v = state
    v = lerp(v, g * g + h.eps1, h.weight2)
    u = g / tl.sqrt(v)
    return (m, v), (u * u,)


@rule
def came_plain_clip(sums, h):
    u_squares, numel = sums
    return (1.0 / at_least(tl.sqrt(u_squares / numel) / h.clip_threshold, 1.0),)


@rule
def came_plain_update(p, g, state, h, c):
    m, v = state
    (clip,) = c
    m = lerp(m, clip * (g / tl.sqrt(v)), h.weight1)
    return p - h.lr * m, (m, v)


# Matrices: second moment and instability are each the product of row and column means.


@rule
def came_squares(p, g, state, h):
    return state, (g * g, g * g)


def new_means(sums: Any, means: Any, weight: Any, eps: Any) -> tuple[Any, Any]:
    """New averages of row and column means, and the factors of one over the root of their product."""
    rows, columns = sums
    row = torch.lerp(means[0], rows / columns.shape[-1] + eps, weight)
    column = torch.lerp(means[1], columns / rows.shape[-2] + eps, weight)
    return (row, column), ((row / row.mean(-2, keepdim=True)).rsqrt(), column.rsqrt())


def came_moments(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """The factors of the direction."""
    means, factors = new_means(sums[:2], vectors[:2], h.weight2, h.eps1)
    return (*means, *vectors[2:]), factors


@rule
def came_measure(p, g, state, h, c):
    row, column = c
    u = g * row * column
    return state, (u * u,)


def came_clip(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """What the direction is multiplied by, so that its RMS is at most the threshold."""
    u_squares, count, _step = sums
    rms = (u_squares / count.clamp(min=1.0)).sqrt()
    return vectors, (1.0 / (rms / h.clip_threshold).clamp(min=1.0),)


@rule
def came_momentum(p, g, state, h, c):
    (m,) = state
    row, column, clip = c
    u = g * row * column * clip
    m = lerp(m, u, h.weight1)
    return (m,), ((u - m) * (u - m), (u - m) * (u - m))


def came_confidence(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """The factors of what the momentum is multiplied by: one over the root of the instability."""
    means, factors = new_means(sums[:2], vectors[2:], h.weight3, h.eps2)
    return (*vectors[:2], *means), factors


@rule
def came_apply(p, g, state, h, c):
    (m,) = state
    _row, _column, _clip, row, column = c
    return p - h.lr * (m * row * column)


class CAME(Optimizer):
    r"""CAME: Adafactor with momentum, divided by the root of how far updates are from it.

    .. math::
        R_t &= \beta_2 R_{t-1} + (1 - \beta_2) \bigl(\operatorname{mean}_\text{columns}(g_t^2) + \epsilon_1\bigr) \\
        C_t &= \beta_2 C_{t-1} + (1 - \beta_2) \bigl(\operatorname{mean}_\text{rows}(g_t^2) + \epsilon_1\bigr) \\
        u_t &= \frac{g_t}{\sqrt{R_t C_t / \operatorname{mean}(R_t)}}, \qquad
        \hat u_t = \frac{u_t}{\max(1, \mathrm{RMS}(u_t) / d)}, \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \hat u_t \\
        \bar R_t, \bar C_t &: \text{ the same averages of } (\hat u_t - m_t)^2, \text{ with } \beta_3
            \text{ and } \epsilon_2 \\
        p_t &= (1 - \eta\lambda) p_{t-1} - \eta \frac{m_t}{\sqrt{\bar R_t \bar C_t / \operatorname{mean}(\bar R_t)}}

    Matrices are taken along the last two axes. Of vectors and scalars the second moment is kept whole, and
    :math:`p_t = (1 - \eta\lambda) p_{t-1} - \eta m_t`. All means run over the whole parameter, whatever its sharding;
    an element whose gradient is missing counts as zero in those of rows and columns.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 2e-4.
        eps: :math:`(\epsilon_1, \epsilon_2)`, each > 0. Default (1e-30, 1e-16).
        clip_threshold: the largest RMS of an update :math:`d > 0`. Default 1.
        betas: :math:`(\beta_1, \beta_2, \beta_3)`, each in [0, 1). Default (0.9, 0.999, 0.9999).
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class R: three packed all-reduces a step. State of an R x C matrix: 4 bytes per parameter, and
    2 (R + C) values, the same on all ranks; of a vector 8 bytes per parameter.

    When: large language models whose optimizer state must be small, with momentum. Start: ``lr=5e-4``,
    ``betas=(0.9, 0.99, 0.999)``.

    Paper: Luo et al., https://arxiv.org/abs/2307.02047.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 2e-4,
        eps: Floors = (1e-30, 1e-16),
        clip_threshold: Positive = 1.0,
        betas: Betas3 = (0.9, 0.999, 0.9999),
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        n = len(shape)
        if n < 2:
            first = Measure(came_plain_moment, (WHOLE,))
            return Recipe(
                (first, Update(came_plain_update, Factors(came_plain_clip))), ("exp_avg", "exp_avg_sq"), Decay.SHRINK
            )
        rows, columns = tuple(range(n - 1)), (*range(n - 2), n - 1)
        stages = (
            Measure(came_squares, (rows, columns), writes_state=False),
            Measure(came_measure, (WHOLE,), writes_state=False, given=Vectors(came_moments, (rows, columns))),
            Measure(came_momentum, (rows, columns), given=Vectors(came_clip, (WHOLE,))),
            Apply(came_apply, Vectors(came_confidence, (rows, columns))),
        )
        names = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")
        vectors = tuple(zip(names, (rows, columns, rows, columns), strict=True))
        return Recipe(stages, ("exp_avg",), Decay.SHRINK, vectors)

    def scalars(self, group: Group, step: int) -> Any:
        (beta1, beta2, beta3), (eps1, eps2) = group["betas"], group["eps"]
        return row_of(
            lr=group["lr"],
            weight1=1 - beta1,
            weight2=1 - beta2,
            weight3=1 - beta3,
            eps1=eps1,
            eps2=eps2,
            clip_threshold=group["clip_threshold"],
        )
