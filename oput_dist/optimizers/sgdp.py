"""SGDP: SGD with momentum without the part of the step that only makes scale-invariant weights grow."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Fraction, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule
from oput_dist.kernels.stage import WHOLE, Apply, Measure, Update, Vectors

from .adamp import projection

__all__ = ["SGDP"]


@rule
def sgdp_direction(g, b, h):
    return h.ahead * g + h.along * b


@rule
def sgdp_plain(p, g, state, h):
    (b,) = state
    b = h.momentum * b + h.gain * g
    return p * (1.0 - h.decay) - h.lr * sgdp_direction(g, b, h), (b,)


@rule
def sgdp_momentum(p, g, state, h):
    (b,) = state
    b = h.momentum * b + h.gain * g
    return (b,), (g * p, g * g, p * p, p * sgdp_direction(g, b, h))


@rule
def sgdp_apply(p, g, state, h, c):
    (b,) = state
    along, ratio = c
    return p * (1.0 - h.decay * ratio) - h.lr * (sgdp_direction(g, b, h) - along * p)


class SGDP(Optimizer):
    r"""SGDP: SGD with momentum; where gradient and weights are nearly orthogonal, as weights before a normalisation
    layer are, the step is projected onto the tangent of the sphere.

    .. math::
        b_t &= \mu b_{t-1} + (1 - \tau) g_t, \qquad
        u_t = g_t + \mu b_t \text{ (Nesterov) or } b_t \\
        \bar u_t &= u_t - \hat p\,(\hat p \cdot u_t), \quad \hat p = p_{t-1} / (\lVert p_{t-1} \rVert + \epsilon)
            \quad\text{if } \max \lvert\cos(p_{t-1}, g_t)\rvert < \delta / \sqrt{\dim p}, \text{ else } u_t \\
        p_t &= \Bigl(1 - \frac{\eta\lambda r}{1 - \mu}\Bigr) p_{t-1} - \eta \bar u_t

    The test and the projection are made for each slice along the first axis, and failing that for the whole parameter;
    :math:`r` is ``wd_ratio`` where the step was projected, else 1. Parameters with less than two axes are never
    projected. With ``decouple_lr`` the decay is not divided by :math:`1 - \mu`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        momentum: :math:`\mu` in [0, 1). Default 0.
        dampening: :math:`\tau` in [0, 1), from the first step on. Default 0.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        nesterov: Nesterov momentum; needs ``momentum > 0``. Default False.
        eps: :math:`\epsilon > 0`. Default 1e-8.
        delta: the threshold :math:`\delta \ge 0`. Default 0.1.
        wd_ratio: :math:`r` of projected parameters, in [0, 1). Default 0.1.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class R: one packed all-reduce a step. State: 4 bytes per parameter (fp32).

    When: models with normalisation layers that are trained by SGD with momentum, mostly convolutional ones. Start:
    ``lr=0.1``, ``momentum=0.9``, ``nesterov=True``.

    Paper: Heo et al., https://arxiv.org/abs/2006.08217.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        momentum: Fraction = 0.0,
        dampening: Fraction = 0.0,
        weight_decay: Nonnegative = 0.0,
        nesterov: bool = False,
        eps: Positive = 1e-8,
        delta: Nonnegative = 0.1,
        wd_ratio: Fraction = 0.1,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def check(self, group: Group) -> None:
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError(f"SGDP: nesterov=True with momentum={group['momentum']!r}: needs momentum > 0")

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        if len(shape) < 2:
            return Recipe((Update(sgdp_plain),), ("momentum_buffer",))
        given = Vectors(projection(math.prod(shape[1:])), ((0,), WHOLE))
        return Recipe((Measure(sgdp_momentum, ((0,),) * 4), Apply(sgdp_apply, given)), ("momentum_buffer",))

    def scalars(self, group: Group, step: int) -> Any:
        momentum, nesterov = group["momentum"], group["nesterov"]
        return row_of(
            lr=group["lr"],
            momentum=momentum,
            gain=1 - group["dampening"],
            # Weight of the gradient in the direction: 0, or 1 with Nesterov momentum.
            ahead=float(nesterov),
            # Weight of the momentum in the direction: 1, or ``momentum`` with Nesterov momentum.
            along=momentum if nesterov else 1.0,
            eps=group["eps"],
            delta=group["delta"],
            wd_ratio=group["wd_ratio"],
            # Share of the parameter that decay removes, where the step is not projected.
            decay=decay_rate(group) / (1.0 if group["decouple_lr"] else 1 - momentum),
        )
