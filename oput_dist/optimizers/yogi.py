"""Yogi: Adam whose second moment changes by steps of bounded size."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape
from oput_dist.engine.hyper import betas as pair
from oput_dist.engine.hyper import boolean, nonnegative
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import lerp, sign
from oput_dist.kernels.stage import Decay, Update

__all__ = ["Yogi"]


class YogiScalars(NamedTuple):
    lr: float
    """Learning rate over the first moment's bias correction."""
    weight1: float
    weight2: float
    root: float
    """One over the square root of the second moment's bias correction."""
    eps: float
    start1: float
    start2: float
    """What moments begin with, at the first step, where the state is still zero; 0 later."""


@rule
def yogi(p, g, state, h):
    m, v = state
    m = lerp(m + h.start1, g, h.weight1)
    v = v + h.start2
    square = g * g
    v = v - h.weight2 * sign(v - square) * square
    return p - h.lr * m / (tl.sqrt(v) * h.root + h.eps), (m, v)


class Yogi(Optimizer):
    r"""Yogi: the second moment moves by :math:`(1 - \beta_2) g_t^2` towards the square of the gradient, so learning
    rates cannot rise fast.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        v_t = v_{t-1} - (1 - \beta_2) \operatorname{sign}(v_{t-1} - g_t^2)\, g_t^2 \\
        p_t &= p_{t-1} - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    where :math:`g_t` includes :math:`\lambda p_{t-1}`, :math:`m_0 = 0` and :math:`v_0` is ``initial_accumulator``.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-2.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-3.
        initial_accumulator: :math:`v_0 \ge 0`. Default 1e-6.
        weight_decay: L2 factor :math:`\lambda \ge 0`. Default 0.
        initial_momentum: begin with :math:`m_0` at ``initial_accumulator`` too, as other implementations do; then
            parameters drift without a gradient. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 8 bytes per parameter (fp32).

    When: sparse or very noisy gradients, where Adam's second moment forgets too fast.
    Start: ``lr=3e-3``, ``betas=(0.9, 0.99)``, ``eps=1e-6``.

    Paper: Zaheer et al., Adaptive methods for nonconvex optimization, NeurIPS 2018,
    https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization.
    """

    checks: ClassVar = {
        "betas": pair(2),
        "eps": nonnegative,
        "initial_accumulator": nonnegative,
        "initial_momentum": boolean,
    }

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-3,
        initial_accumulator: float = 1e-6,
        weight_decay: float = 0.0,
        initial_momentum: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "initial_accumulator": initial_accumulator,
            "weight_decay": weight_decay,
            "initial_momentum": initial_momentum,
        }
        super().__init__(params, defaults, common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(yogi),), ("exp_avg", "exp_avg_sq"), Decay.L2)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        start = group["initial_accumulator"] if step == 1 else 0.0
        return YogiScalars(
            lr=group["lr"] / (1 - beta1**step),
            weight1=1 - beta1,
            weight2=1 - beta2,
            root=1 / math.sqrt(1 - beta2**step),
            eps=group["eps"],
            start1=start if group["initial_momentum"] else 0.0,
            start2=start,
        )
