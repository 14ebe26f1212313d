"""SWATS: begins as Adam and goes on as SGD, each tensor when its Adam steps have told it a learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, at_least, lerp
from oput_dist.kernels.stage import WHOLE, Decay, Measure, Update, Vectors

__all__ = ["SWATS"]


@rule
def swats_moments(p, g, state, h):
    m, v = state
    m, v = adam_moments(g, m, v, h)
    u = m / (tl.sqrt(v) + h.eps)
    return (m, v), (u * u, u * g)


@rule
def swats_moments_amsgrad(p, g, state, h):
    m, v, largest = state
    m, v = adam_moments(g, m, v, h)
    largest = at_least(v, largest)
    u = m / (tl.sqrt(largest) + h.eps)
    return (m, v, largest), (u * u, u * g)


def swats_phase(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """The estimate of SGD's learning rate, and this rate once the estimate stands still; 0 while Adam goes on."""
    u_u, u_g, _count, step = sums  # the step that all ranks know, not that inside h
    average, sgd_lr = vectors
    beta1, correction2 = 1 - h.weight1, 1 - (1 - h.weight2) ** step.clamp(min=1.0)
    lr = h.rate * correction2.sqrt() / (1 - beta1 ** step.clamp(min=1.0))
    usable = (u_g != 0) & (lr > 0) & (sgd_lr == 0)
    estimate = lr * u_u / torch.where(usable, u_g, 1.0)
    average = torch.where(usable, torch.lerp(average, estimate, h.weight2), average)
    settled = average / correction2
    close = (settled - estimate).abs() <= 1e-8 + h.tolerance * estimate.abs()
    switching = usable & (step > 1) & (settled > 0) & close
    return (average, torch.where(switching, settled, sgd_lr)), (sgd_lr, switching)


@rule
def swats_step(p, g, m, divisor, h, c):
    """The parameter, and the momentum, which both phases share: SGD's begins anew."""
    sgd_lr, switching = c
    adam = h.lr * m / (tl.sqrt(divisor) + h.eps)
    step = tl.where(sgd_lr > 0, sgd_lr * lerp(m, g, h.ahead), adam)
    return p - step, tl.where(switching > 0, 0.0, m)


@rule
def swats(p, g, state, h, c):
    m, v = state
    p, m = swats_step(p, g, m, v, h, c)
    return p, (m, v)


@rule
def swats_amsgrad(p, g, state, h, c):
    m, v, largest = state
    p, m = swats_step(p, g, m, largest, h, c)
    return p, (m, v, largest)


class SWATS(Optimizer):
    r"""SWATS: Adam that switches to SGD.

    .. math::
        d_t &= \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t} + \epsilon}, \qquad
        p_t = p_{t-1} - d_t \quad \text{with the moments } m_t, v_t \text{ of Adam} \\
        \gamma_t &= \frac{\langle d_t, d_t \rangle}{\langle d_t, g_t \rangle}, \qquad
        \lambda_t = \beta_2 \lambda_{t-1} + (1 - \beta_2) \gamma_t, \qquad
        \Lambda_t = \lambda_t / (1 - \beta_2^t)

    until, at :math:`t > 1`, :math:`\Lambda_t > 0` and :math:`\lvert \Lambda_t - \gamma_t \rvert \le 10^{-8} + \tau
    \lvert \gamma_t \rvert`. From the next step on, :math:`m` starting anew from 0,

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        p_t = p_{t-1} - \Lambda m_t \text{, or } p_{t-1} - \Lambda (\beta_1 m_t + (1 - \beta_1) g_t) \text{ (Nesterov)}

    where :math:`g_t` includes the L2 term. Each tensor switches by itself, and its rate :math:`\Lambda` stays as it was
    found: it is kept in the state, and learning rate schedules have no effect on the tensor any more. Inner products
    run over the whole parameter, whatever its sharding.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0` of the Adam phase. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon > 0`. Default 1e-3.
        weight_decay: L2 factor, >= 0. Default 0.
        amsgrad: divide by the root of the largest :math:`v` so far. Default False.
        nesterov: Nesterov momentum in the SGD phase. Default False.
        tolerance: :math:`\tau \ge 0`, relative: the larger, the earlier the switch. Default 1e-6.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class N: one packed all-reduce a step. State: 8 bytes per parameter (fp32), with amsgrad 12, and two values
    for each tensor, the same on all ranks.

    When: image classification, where SGD generalizes better than Adam but starts slower. Start: ``lr=3e-3``,
    ``betas=(0.9, 0.99)``, ``eps=1e-8``.

    Paper: Keskar & Socher, https://arxiv.org/abs/1712.07628.
    """

    why_no_accumulation = "it learns from the steps that it takes when to go on as SGD"

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Positive = 1e-3,
        weight_decay: Nonnegative = 0.0,
        amsgrad: bool = False,
        nesterov: bool = False,
        tolerance: Nonnegative = 1e-6,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        rules: Any = (swats_moments, swats)
        state: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
        if group["amsgrad"]:
            rules, state = (swats_moments_amsgrad, swats_amsgrad), (*state, "max_exp_avg_sq")
        stages = (Measure(rules[0], (WHOLE, WHOLE)), Update(rules[1], Vectors(swats_phase, (WHOLE, WHOLE))))
        return Recipe(stages, state, Decay.L2, (("exp_avg2", WHOLE), ("sgd_lr", WHOLE)))

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        correction2 = 1 - beta2**step
        return row_of(
            # Learning rate of the Adam phase, times the root of the second moment's bias correction, over the first's.
            lr=group["lr"] * math.sqrt(correction2) / (1 - beta1**step),
            weight1=1 - beta1,
            weight2=1 - beta2,
            eps=group["eps"],
            # Weight of the gradient in the SGD step: 0, or ``weight1`` with Nesterov momentum.
            ahead=1 - beta1 if group["nesterov"] else 0.0,
            rate=group["lr"],
            tolerance=group["tolerance"],
        )
