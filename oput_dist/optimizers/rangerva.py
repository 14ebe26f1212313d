"""RangerVA: momentum over a calibrated second moment, inside lookahead."""

from __future__ import annotations

import math
from typing import Any, Literal

from typing_extensions import Unpack

from oput_dist.engine import Group, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, Positive, PositiveInteger, Share, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import at_least, lerp, lookahead, softplus
from oput_dist.kernels.stage import Update

from .ranger import RangerCommon, Respelled
from .scalars import WHY_NO_ACCUMULATION, WHY_NOT_CAUTIOUS, lookahead_scalars

__all__ = ["RangerVA"]


@rule
def rangerva_moments(g, m, v, h):
    v = tl.where(h.twice > 0, lerp(v, g * g, h.weight2), v)
    return lerp(m, g, h.weight1), lerp(v, tl.where(h.squared > 0, g * g, tl.abs(g)), h.weight2)


@rule
def rangerva_step(p, m, v, slow, h):
    size = tl.where(h.squared > 0, tl.sqrt(v), v)
    smooth = tl.where(h.smooth > 0, h.smooth, 1.0)
    scale = tl.where(h.smooth > 0, softplus(smooth * size) / smooth, size + h.eps)
    return lookahead(p, h.keep * p - h.lr * m / scale, slow, h)


@rule
def rangerva(p, g, state, h):
    m, v, slow = state
    m, v = rangerva_moments(g, m, v, h)
    p, slow = rangerva_step(p, m, v, slow, h)
    return p, (m, v, slow)


@rule
def rangerva_amsgrad(p, g, state, h):
    m, v, slow, largest = state
    m, v = rangerva_moments(g, m, v, h)
    largest = at_least(v, largest)
    p, slow = rangerva_step(p, m, largest, slow, h)
    return p, (m, v, slow, largest)


class RangerVA(Respelled):
    r"""RangerVA: the calibrated Adam (SAdam), whose denominator is a softplus and so never small, inside lookahead.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        \hat v_t = \max(\hat v_{t-1}, v_t) \\
        p_t &= (1 - \eta\lambda) p_{t-1} - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
            \frac{m_t}{\log\bigl(1 + \exp(s \sqrt{\hat v_t})\bigr) / s} \\
        x_t &= x_{t-1} + \alpha (p_t - x_{t-1}), \quad p_t \leftarrow x_t \qquad \text{every } k \text{ steps},
            \qquad x_0 = p_0

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        alpha: :math:`\alpha` in (0, 1]. Default 0.5.
        k: steps between two synchronisations of slow and fast weights, an integer >= 1. Default 6.
        n_sma_threshold: a number > 0 that changes nothing: this rule has no rectification, and the reference does not
            use it either. Default 5. Also taken under the names ``n_sma_threshhold`` and ``N_sma_threshhold``.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.95, 0.999).
        eps: :math:`\epsilon > 0`, added to :math:`\sqrt{\hat v_t}` where there is no softplus. Default 1e-5.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        amsgrad: divide by the largest :math:`v` so far; else by :math:`v_t`. Default True.
        transformer: ``"softplus"``; or None or ``""`` for the plain denominator. Default "softplus".
        smooth: :math:`s > 0`. Default 50.
        grad_transformer: ``"square"``; or ``"abs"`` for a second moment of :math:`\lvert g_t \rvert`, which then takes
            the place of the root, and :math:`1 - \beta_2^t` that of its root. Default "square".
        bug_compat: as the reference, which averages squares a first time at every step, before the moment above, and
            knows one bias correction only. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 16 bytes per parameter (fp32), without amsgrad 12.

    When: gradients that are tiny at times, where Adam's steps would grow: the softplus bounds them. Start: ``lr=3e-3``,
    ``betas=(0.95, 0.99)``, ``smooth=1000.0``.

    Paper: Tong et al., https://arxiv.org/abs/1908.00700; Wright,
    https://github.com/lessw2020/Ranger-Deep-Learning-Optimizer.
    """

    why_not_cautious = WHY_NOT_CAUTIOUS
    why_no_accumulation = WHY_NO_ACCUMULATION

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        alpha: Share = 0.5,
        k: PositiveInteger = 6,
        n_sma_threshold: Positive = 5.0,
        betas: Betas = (0.95, 0.999),
        eps: Positive = 1e-5,
        weight_decay: Nonnegative = 0.0,
        amsgrad: bool = True,
        transformer: Literal["softplus", "", None] = "softplus",
        smooth: Positive = 50.0,
        grad_transformer: Literal["square", "abs"] = "square",
        bug_compat: bool = False,
        **common: Unpack[RangerCommon],
    ) -> None:
        n_sma_threshold = common.pop("n_sma_threshhold", common.pop("N_sma_threshhold", n_sma_threshold))
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        names = ("exp_avg", "exp_avg_sq", "slow_buffer")
        if group["amsgrad"]:
            return Recipe((Update(rangerva_amsgrad),), (*names, "max_exp_avg_sq"))
        return Recipe((Update(rangerva),), names)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        squared, twice = group["grad_transformer"] == "square", group["bug_compat"]
        correct2 = 1 - beta2**step
        first, pull = lookahead_scalars(step, group["k"], group["alpha"])
        return row_of(
            # Learning rate with both bias corrections.
            lr=group["lr"] * (math.sqrt(correct2) if squared or twice else correct2) / (1 - beta1**step),
            weight1=1 - beta1,
            weight2=1 - beta2,
            # 1 if the second moment is that of squares, 0 if of absolute values.
            squared=float(squared),
            # 1 to average squares first, as the reference does.
            twice=float(twice),
            # Of the softplus; 0 for none.
            smooth=group["smooth"] if group["transformer"] else 0.0,
            eps=group["eps"],
            # What decay leaves of the parameter.
            keep=1 - decay_rate(group),
            first=first,
            pull=pull,
        )
