"""MARS: AdamW on gradients whose variance is reduced by the previous ones."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, at_least
from oput_dist.kernels.stage import WHOLE, Decay, Factors, Measure, Update

from .adam import adam
from .scalars import adam_scalars

__all__ = ["MARS"]


@rule
def mars_corrected(g, last, h):
    return g + h.gain * (g - last)


@rule
def mars_norm(p, g, state, h):
    _m, _v, last = state
    c = mars_corrected(g, last, h)
    return state, (c * c,)


@rule
def mars_clip(sums, h):
    squares, _numel = sums
    return (1.0 / at_least(tl.sqrt(squares), 1.0),)


@rule
def mars(p, g, state, h, c):
    m, v, last = state
    (clip,) = c
    m, v = adam_moments(clip * mars_corrected(g, last, h), m, v, h)
    return p - h.lr * m / (tl.sqrt(v) * h.root + h.eps), (m, v, g)


class MARS(Optimizer):
    r"""MARS-AdamW, in the approximate form that takes each gradient once.

    .. math::
        c_t &= g_t + \gamma \frac{\beta_1}{1 - \beta_1} (g_t - g_{t-1}), \qquad
        \bar c_t = c_t / \max(1, \lVert c_t \rVert) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) \bar c_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) \bar c_t^2 \\
        p_t &= (1 - \eta\lambda) p_{t-1}
            - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    with :math:`c_1 = g_1`. The norm runs over the whole parameter, whatever its sharding. Parameters with less than two
    axes are updated by AdamW with the same betas unless ``optimize_1d``; for other values give them a group.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 3e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.95, 0.99).
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        gamma: how much of the change is added, :math:`\gamma \ge 0`. Default 0.025.
        optimize_1d: use MARS for vectors and scalars too. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class N: one packed all-reduce a step. State: 12 bytes per parameter (fp32), of vectors 8 unless
    ``optimize_1d``.

    When: pretraining of language models, in place of AdamW.
    Start: ``lr=3e-3``, ``betas=(0.95, 0.99)``.

    Paper: Yuan et al., https://arxiv.org/abs/2411.10438.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 3e-3,
        betas: Betas = (0.95, 0.99),
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        gamma: Nonnegative = 0.025,
        optimize_1d: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        if len(shape) < 2 and not group["optimize_1d"]:
            return Recipe((Update(adam),), ("exp_avg", "exp_avg_sq"), Decay.SHRINK)
        stages = (Measure(mars_norm, (WHOLE,), writes_state=False), Update(mars, Factors(mars_clip)))
        return Recipe(stages, ("exp_avg", "exp_avg_sq", "last_grad"), Decay.SHRINK)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, _beta2 = group["betas"]
        # Weight of the gradient's change; 0 at the first step, which has no previous gradient.
        gain = 0.0 if step == 1 else group["gamma"] * beta1 / (1 - beta1)
        return row_of(**adam_scalars(group, step), gain=gain)
