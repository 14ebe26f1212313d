"""LAMB: Adam's direction, scaled for each parameter by the ratio of its norm to the update's."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, at_most
from oput_dist.kernels.stage import WHOLE, Apply, Decay, Factors, Measure

__all__ = ["Lamb"]


@rule
def lamb_direction(p, m, v, h):
    return m * h.correct1 / (tl.sqrt(v) * h.root + h.eps) + h.weight_decay * p


@rule
def lamb_moments(p, g, state, h):
    m, v = state
    m, v = adam_moments(g, m, v, h)
    u = lamb_direction(p, m, v, h)
    return (m, v), (p * p, u * u)


@rule
def lamb_trust(sums, h):
    p_squares, u_squares, _numel = sums
    weight = at_most(tl.sqrt(p_squares), h.clamp)
    update = tl.sqrt(u_squares)
    usable = (weight > 0) & (update > 0) & (h.adapt > 0)
    return (h.lr * tl.where(usable, weight / tl.where(usable, update, 1.0), 1.0),)


@rule
def lamb_apply(p, g, state, h, c):
    m, v = state
    (lr,) = c
    return p - lr * lamb_direction(p, m, v, h)


class Lamb(Optimizer):
    r"""LAMB, by default with bias correction, as in NVIDIA's and timm's implementations.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda p_{t-1} \\
        p_t &= p_{t-1} - \eta \frac{\min(\lVert p_{t-1} \rVert, c)}{\lVert u_t \rVert} u_t

    The trust ratio is 1 where a norm is zero, and in groups without weight decay unless ``always_adapt``. Norms run
    over the whole parameter, whatever its sharding.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-6.
        weight_decay: :math:`\lambda \ge 0`, inside the scaled update; with ``decouple_lr`` outside of it. Default 0.
        clamp: the largest parameter norm :math:`c > 0` that counts; the paper's code had 10. Default None: no limit.
        always_adapt: use the trust ratio without weight decay too. Default False.
        bias_correction: divide the moments by :math:`1 - \beta^t`. The rule of 2019, in the paper's first code, is
            ``bias_correction=False, clamp=10.0, always_adapt=True``. Default True.
        **common: see :class:`oput_dist.engine.Common`; other implementations clip by ``max_grad_norm=1.0``.

    Raises:
        ValueError: for a value out of range.

    Sharding class N: one packed all-reduce a step. State: 8 bytes per parameter (fp32).

    When: large batches. Start: ``lr=0.02``, ``weight_decay=0.01``.

    Paper: You et al., https://arxiv.org/abs/1904.00962.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-6,
        weight_decay: Nonnegative = 0.0,
        clamp: Positive | None = None,
        always_adapt: bool = False,
        bias_correction: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        stages = (Measure(lamb_moments, (WHOLE, WHOLE)), Apply(lamb_apply, Factors(lamb_trust)))
        return Recipe(stages, ("exp_avg", "exp_avg_sq"), Decay.SHRINK if group["decouple_lr"] else Decay.NONE)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        return row_of(
            lr=group["lr"],
            weight1=1 - beta1,
            weight2=1 - beta2,
            # One over the first moment's bias correction.
            correct1=1 / (1 - beta1**step) if group["bias_correction"] else 1.0,
            # One over the square root of the second moment's bias correction.
            root=1 / math.sqrt(1 - beta2**step) if group["bias_correction"] else 1.0,
            eps=group["eps"],
            weight_decay=0.0 if group["decouple_lr"] else group["weight_decay"],
            clamp=math.inf if group["clamp"] is None else group["clamp"],
            # 1 to scale by the trust ratio, 0 not to.
            adapt=float(group["weight_decay"] != 0 or group["always_adapt"]),
        )
