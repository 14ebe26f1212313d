"""DiffGrad: Adam that slows down where the gradient hardly changes."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, sigmoid
from oput_dist.kernels.stage import Decay, Update

__all__ = ["DiffGrad"]


@rule
def diffgrad(p, g, state, h):
    m, v, previous = state
    m, v = adam_moments(g, m, v, h)
    friction = sigmoid(tl.abs(previous - g))
    return p - h.lr * (friction * m) / (tl.sqrt(v) * h.root + h.eps), (m, v, g)


class DiffGrad(Optimizer):
    r"""DiffGrad: the step of Adam, down to half of it where the gradient is the last one again.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        \xi_t = \frac{1}{1 + e^{-\lvert g_{t-1} - g_t \rvert}} \\
        p_t &= p_{t-1} - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \cdot \frac{\xi_t m_t}{\sqrt{v_t} + \epsilon}

    where :math:`g_t` includes :math:`\lambda p_{t-1}`, and :math:`g_0 = 0`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: L2 factor :math:`\lambda \ge 0`. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 12 bytes per parameter (fp32).

    When: convolutional networks. The changes of gradients must be of size 1 to matter: with smaller ones it is Adam at
    half the learning rate.
    Start: ``lr=5e-3``, ``betas=(0.9, 0.99)``.

    Paper: Dubey et al., https://arxiv.org/abs/1909.11015.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(diffgrad),), ("exp_avg", "exp_avg_sq", "previous_grad"), Decay.L2)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        lr = group["lr"] * (math.sqrt(1 - beta2**step) / (1 - beta1**step))
        return row_of(lr=lr, weight1=1 - beta1, weight2=1 - beta2, root=1.0, eps=group["eps"])
