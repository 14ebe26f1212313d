"""LARS: momentum SGD, scaled for each parameter by the ratio of its norm to the gradient's."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Fraction, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import at_most
from oput_dist.kernels.stage import WHOLE, Decay, Factors, Measure, Update

__all__ = ["LARS"]


@rule
def lars_squares(p, g, state, h):
    return state, (p * p, g * g)


@rule
def lars_trust(sums, h):
    p_squares, g_squares, _numel = sums
    weight, gradient = tl.sqrt(p_squares), tl.sqrt(g_squares)
    usable = (weight > 0) & (gradient > 0)
    bottom = gradient + h.weight_decay * weight + h.eps
    ratio = tl.where(usable, h.trust_coeff * weight / tl.where(usable, bottom, 1.0), 1.0)
    ratio = tl.where(h.clip > 0, at_most(ratio / h.lr, 1.0), ratio)
    return (tl.where(h.adapt > 0, ratio, 1.0),)


@rule
def lars(p, g, state, h, c):
    (ratio,) = c
    return p - h.lr * (ratio * (g + h.weight_decay * p)), state


@rule
def lars_momentum(p, g, state, h, c):
    (b,) = state
    (ratio,) = c
    b = h.momentum * b + h.gain * (ratio * (g + h.weight_decay * p))
    return p - h.lr * b, (b,)


@rule
def lars_nesterov(p, g, state, h, c):
    (b,) = state
    (ratio,) = c
    g = ratio * (g + h.weight_decay * p)
    b = h.momentum * b + h.gain * g
    return p - h.lr * (g + h.momentum * b), (b,)


class LARS(Optimizer):
    r"""LARS, layer-wise adaptive rate scaling, as in timm; with ``trust_clip`` LARC.

    .. math::
        r_t &= \frac{c \lVert p_{t-1} \rVert}{\lVert g_t \rVert + \lambda \lVert p_{t-1} \rVert + \epsilon}, \qquad
        u_t = r_t\, (g_t + \lambda p_{t-1}) \\
        b_t &= \mu b_{t-1} + (1 - \tau) u_t \quad (b_1 = u_1), \qquad
        p_t = p_{t-1} - \eta b_t \text{, or } p_{t-1} - \eta (u_t + \mu b_t) \text{ (Nesterov)}

    The ratio :math:`r_t` is 1 where a norm is zero, and in groups without weight decay unless ``always_adapt``. Norms
    run over the whole parameter, whatever its sharding.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1.
        momentum: :math:`\mu` in [0, 1). Default 0.9; timm has 0.
        dampening: :math:`\tau` in [0, 1); the first step is not dampened. Default 0.
        nesterov: Nesterov momentum; needs ``momentum > 0`` and no dampening. Default False.
        weight_decay: :math:`\lambda \ge 0`, inside the scaled update; with ``decouple_lr`` outside of it. Default 0.
        trust_coeff: :math:`c > 0`. Default 1e-3.
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        trust_clip: take :math:`\min(r_t / \eta, 1)` for the ratio, so that it only shortens steps. Default False.
        always_adapt: use the trust ratio without weight decay too. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class N: one packed all-reduce a step. State: 4 bytes per parameter (fp32), without momentum 0.

    When: very large batches, mostly of convolutional networks on images. Start: ``lr=1.0``, ``momentum=0.9``,
    ``trust_coeff=0.02``, ``always_adapt=True``.

    Paper: You, Gitman & Ginsburg, https://arxiv.org/abs/1708.03888.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1.0,
        momentum: Fraction = 0.9,
        dampening: Fraction = 0.0,
        nesterov: bool = False,
        weight_decay: Nonnegative = 0.0,
        trust_coeff: Positive = 1e-3,
        eps: Nonnegative = 1e-8,
        trust_clip: bool = False,
        always_adapt: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def check(self, group: Group) -> None:
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"{type(self).__name__}: nesterov=True with momentum={group['momentum']!r} and "
                f"dampening={group['dampening']!r}: needs momentum > 0 and dampening = 0"
            )

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        squares = Measure(lars_squares, (WHOLE, WHOLE), writes_state=False)
        state: tuple[str, ...] = ("momentum_buffer",)
        rule = lars_nesterov if group["nesterov"] else lars_momentum
        if group["momentum"] == 0:
            rule, state = lars, ()
        decay = Decay.SHRINK if group["decouple_lr"] else Decay.NONE
        return Recipe((squares, Update(rule, Factors(lars_trust))), state, decay)

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(
            lr=group["lr"],
            momentum=group["momentum"],
            # Of the new gradient in the momentum: 1 at the first step, later one less dampening.
            gain=1.0 if step == 1 else 1.0 - group["dampening"],
            weight_decay=0.0 if group["decouple_lr"] else group["weight_decay"],
            trust_coeff=group["trust_coeff"],
            eps=group["eps"],
            # 1 to scale by the trust ratio, 0 not to.
            adapt=float(group["weight_decay"] != 0 or group["always_adapt"]),
            # 1 to let the ratio only shorten the step, 0 not to.
            clip=float(group["trust_clip"]),
        )
