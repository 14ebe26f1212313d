"""StableAdamW: AdamW whose step shrinks where the second moment lags behind the gradient."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, at_least
from oput_dist.kernels.stage import WHOLE, Apply, Factors, Measure

__all__ = ["StableAdamW"]


@rule
def stable_moments(p, g, state, h):
    m, v = state
    m, v = adam_moments(g, m, v, h)
    return (m, v), (g * g / at_least(v * h.correct2, h.floor),)


@rule
def stable_shrinkage(sums, h):
    total, numel = sums
    shrinkage = 1.0 / at_least(tl.sqrt(total / numel), 1.0)
    return h.lr * h.correct1 * shrinkage, 1.0 - h.decay * shrinkage


@rule
def stable_apply(p, g, state, h, c):
    m, v = state
    lr, keep = c
    return p * keep - lr * m / (tl.sqrt(v) * h.root + h.eps)


class StableAdamW(Optimizer):
    r"""StableAdamW: AdamW with the update clipping of Adafactor, so gradients need no clipping.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \hat m_t &= m_t / (1 - \beta_1^t), \qquad \hat v_t = v_t / (1 - \beta_2^t) \\
        \mathrm{RMS}_t &= \sqrt{\operatorname{mean}(g_t^2 / \max(\hat v_t, \epsilon^2))}, \qquad
        \eta_t = \eta / \max(1, \mathrm{RMS}_t) \\
        p_t &= (1 - \eta_t\lambda) p_{t-1} - \eta_t \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}

    The mean runs over the whole parameter, whatever its sharding.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.99).
        eps: :math:`\epsilon > 0`. Default 1e-6.
        weight_decay: decoupled, :math:`\lambda \ge 0`; shrinks with the step. Default 1e-2.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class N: one packed all-reduce a step. State: 8 bytes per parameter (fp32).

    When: AdamW's loss spikes, as in low precision or with large batches; it needs no gradient clipping. Start:
    ``lr=3e-3``, ``weight_decay=0.01``.

    Paper: Wortsman et al., https://arxiv.org/abs/2304.13013.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.99),
        eps: Positive = 1e-6,
        weight_decay: Nonnegative = 1e-2,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        stages = (Measure(stable_moments, (WHOLE,)), Apply(stable_apply, Factors(stable_shrinkage, n=2)))
        return Recipe(stages, ("exp_avg", "exp_avg_sq"))

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        correct2 = 1 / (1 - beta2**step)
        return row_of(
            lr=group["lr"],
            weight1=1 - beta1,
            weight2=1 - beta2,
            # One over the first moment's bias correction.
            correct1=1 / (1 - beta1**step),
            # One over the second moment's bias correction.
            correct2=correct2,
            # Square root of ``correct2``.
            root=math.sqrt(correct2),
            eps=group["eps"],
            # The square of ``eps``, or the least normal fp32 number where that is smaller.
            floor=max(group["eps"] ** 2, 1.2e-38),
            # Share of the parameter that decay removes, before the step is shrunk.
            decay=decay_rate(group),
        )
