"""Yogi: Adam whose second moment changes by steps of bounded size."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import lerp, sign
from oput_dist.kernels.stage import Decay, Update

from .scalars import adam_scalars

__all__ = ["Yogi"]


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

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-2,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-3,
        initial_accumulator: Nonnegative = 1e-6,
        weight_decay: Nonnegative = 0.0,
        initial_momentum: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(yogi),), ("exp_avg", "exp_avg_sq"), Decay.L2)

    def scalars(self, group: Group, step: int) -> Any:
        # What moments begin with, at the first step, where the state is still zero; 0 later.
        start2 = group["initial_accumulator"] if step == 1 else 0.0
        start1 = start2 if group["initial_momentum"] else 0.0
        return row_of(**adam_scalars(group, step), start1=start1, start2=start2)
