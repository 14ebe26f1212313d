"""AdamP: AdamW without the part of the step that only makes scale-invariant weights grow."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Betas, Fraction, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, lerp
from oput_dist.kernels.stage import WHOLE, Apply, Measure, Update, Vectors

__all__ = ["AdamP"]


@rule
def adamp_direction(g, m, v, h):
    return lerp(m, g, h.ahead) / (tl.sqrt(v) * h.root + h.eps)


@rule
def adamp_plain(p, g, state, h):
    m, v = state
    m, v = adam_moments(g, m, v, h)
    return p * (1.0 - h.decay) - h.lr * adamp_direction(g, m, v, h), (m, v)


@rule
def adamp_moments(p, g, state, h):
    m, v = state
    m, v = adam_moments(g, m, v, h)
    u = adamp_direction(g, m, v, h)
    return (m, v), (g * p, g * g, p * p, p * u)


@rule
def adamp_apply(p, g, state, h, c):
    m, v = state
    along, ratio = c
    return p * (1.0 - h.decay * ratio) - h.lr * (adamp_direction(g, m, v, h) - along * p)


@functools.cache  # so that equal recipes stay equal
def projection(length: int) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The factors of the projection for parameters whose rows have ``length`` elements.

    For each row how much of the parameter the step contains that is to be removed, and the ratio of weight decay.
    """

    def factors(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
        by_row = sums[:4]
        whole = [term.sum(1, keepdim=True) for term in by_row]
        row_cosine, row_along = _cosine_and_part(by_row, h.eps)
        all_cosine, all_along = _cosine_and_part(whole, h.eps)
        rows = by_row[0].shape[1]
        if rows * length == 0:
            return vectors, (row_along, torch.ones_like(all_along))
        by_rows = row_cosine.amax(1, keepdim=True) < h.delta / math.sqrt(length)
        by_whole = all_cosine < h.delta / math.sqrt(rows * length)
        along = torch.where(by_rows, row_along, torch.where(by_whole, all_along, 0.0))
        ratio = torch.where(by_rows | by_whole, h.wd_ratio, 1.0)
        return vectors, (along, ratio)

    return factors


def _cosine_and_part(products: Any, eps: Any) -> tuple[Any, Any]:
    """The cosine between gradient and parameter, and how much of the parameter the step contains."""
    gp, gg, pp, pu = products
    norms = torch.maximum(gg.sqrt(), eps) * torch.maximum(pp.sqrt(), eps)
    return gp.abs() / norms, pu / (pp.sqrt() + eps) ** 2


class AdamP(Optimizer):
    r"""AdamP: where gradient and weights are nearly orthogonal, as weights before a normalisation layer are, the step
    is projected onto the tangent of the sphere.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        u_t = \frac{m_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
        \bar u_t &= u_t - \hat p\,(\hat p \cdot u_t), \quad \hat p = p_{t-1} / (\lVert p_{t-1} \rVert + \epsilon)
            \quad\text{if } \max \lvert\cos(p_{t-1}, g_t)\rvert < \delta / \sqrt{\dim p}, \text{ else } u_t \\
        p_t &= (1 - \eta\lambda r) p_{t-1} - \frac{\eta}{1 - \beta_1^t} \bar u_t

    The test and the projection are made for each slice along the first axis, and failing that for the whole parameter;
    :math:`r` is ``wd_ratio`` where the step was projected, else 1. Parameters with less than two axes are never
    projected.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon > 0`. Default 1e-8.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        delta: the threshold :math:`\delta \ge 0`. Default 0.1.
        wd_ratio: :math:`r` of projected parameters, in [0, 1). Default 0.1.
        nesterov: look ahead, with :math:`\beta_1 m_t + (1 - \beta_1) g_t` in place of :math:`m_t`. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class R: one packed all-reduce a step. State: 8 bytes per parameter (fp32).

    When: networks with normalisation after most weights, mostly vision. Start: ``lr=3e-3``, ``weight_decay=0.01``.

    Paper: Heo et al., https://arxiv.org/abs/2006.08217.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Positive = 1e-8,
        weight_decay: Nonnegative = 0.0,
        delta: Nonnegative = 0.1,
        wd_ratio: Fraction = 0.1,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        moments = ("exp_avg", "exp_avg_sq")
        if len(shape) < 2:
            return Recipe((Update(adamp_plain),), moments)
        given = Vectors(projection(math.prod(shape[1:])), ((0,), WHOLE))
        return Recipe((Measure(adamp_moments, ((0,),) * 4), Apply(adamp_apply, given)), moments)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        return row_of(
            # Over the first moment's bias correction.
            lr=group["lr"] / (1 - beta1**step),
            weight1=1 - beta1,
            weight2=1 - beta2,
            # Weight of the gradient in the direction: 0, or ``weight1`` with Nesterov momentum.
            ahead=1 - beta1 if group["nesterov"] else 0.0,
            # One over the square root of the second moment's bias correction.
            root=1 / math.sqrt(1 - beta2**step),
            eps=group["eps"],
            delta=group["delta"],
            wd_ratio=group["wd_ratio"],
            # Share of the parameter that decay removes, where the step is not projected.
            decay=decay_rate(group),
        )
