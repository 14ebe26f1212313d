"""RMSprop, plain or centered, with or without momentum."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Fraction, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import at_least, lerp
from oput_dist.kernels.stage import Decay, Update

__all__ = ["RMSprop"]


@rule
def rmsprop_plain(g, v, h):
    v = lerp(v, g * g, h.weight)
    return g / (tl.sqrt(v) + h.eps), v


@rule
def rmsprop_variance(g, v, a, h):
    v = lerp(v, g * g, h.weight)
    a = lerp(a, g, h.weight)
    return g / (tl.sqrt(at_least(v - a * a, 0.0)) + h.eps), v, a


@rule
def rmsprop(p, g, state, h):
    (v,) = state
    u, v = rmsprop_plain(g, v, h)
    return p - h.lr * u, (v,)


@rule
def rmsprop_momentum(p, g, state, h):
    v, b = state
    u, v = rmsprop_plain(g, v, h)
    b = h.momentum * b + u
    return p - h.lr * b, (v, b)


@rule
def rmsprop_centered(p, g, state, h):
    v, a = state
    u, v, a = rmsprop_variance(g, v, a, h)
    return p - h.lr * u, (v, a)


@rule
def rmsprop_centered_momentum(p, g, state, h):
    v, a, b = state
    u, v, a = rmsprop_variance(g, v, a, h)
    b = h.momentum * b + u
    return p - h.lr * b, (v, a, b)


class RMSprop(Optimizer):
    r"""RMSprop, as in ``torch.optim.RMSprop``, without bias correction.

    .. math::
        v_t &= \alpha v_{t-1} + (1 - \alpha) g_t^2, \qquad a_t = \alpha a_{t-1} + (1 - \alpha) g_t, \qquad
        u_t = \frac{g_t}{\sqrt{v_t} + \epsilon} \text{ or, centered, } \frac{g_t}{\sqrt{v_t - a_t^2} + \epsilon} \\
        b_t &= \mu b_{t-1} + u_t, \qquad p_t = p_{t-1} - \eta b_t

    where :math:`g_t` includes :math:`\lambda p_{t-1}`. A variance :math:`v_t - a_t^2` that rounding makes negative
    counts as zero.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-2.
        alpha: decay rate :math:`\alpha` in [0, 1) of the averages. Default 0.99.
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: L2 factor :math:`\lambda \ge 0`. Default 0.
        momentum: :math:`\mu` in [0, 1). Default 0.
        centered: divide by the root of the variance in place of the second moment. Default False.
        decouple_wd: decay by :math:`p \leftarrow (1 - \eta\lambda) p` before the update, in place of L2. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 4 bytes per parameter (fp32), 4 more with momentum, 4 more if centered.

    When: recurrent networks, reinforcement learning, and recipes that were tuned for it; else Adam.
    Start: ``lr=1e-3``, ``alpha=0.99``.

    Paper: Hinton et al., https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf; centered: Graves,
    https://arxiv.org/abs/1308.0850.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-2,
        alpha: Fraction = 0.99,
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        momentum: Fraction = 0.0,
        centered: bool = False,
        decouple_wd: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        rules = {
            (False, False): rmsprop,
            (False, True): rmsprop_momentum,
            (True, False): rmsprop_centered,
            (True, True): rmsprop_centered_momentum,
        }
        centered, moving = bool(group["centered"]), group["momentum"] != 0
        state = ("square_avg",) + ("grad_avg",) * centered + ("momentum_buffer",) * moving
        decay = Decay.SHRINK if group["decouple_wd"] else Decay.L2
        return Recipe((Update(rules[centered, moving]),), state, decay)

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(lr=group["lr"], weight=1 - group["alpha"], eps=group["eps"], momentum=group["momentum"])
