"""AccSGD: accelerated SGD, a short step and a running average of long steps."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import Decay, Update

__all__ = ["AccSGD"]


@rule
def accsgd(p, g, state, h):
    (b,) = state
    b = tl.where(h.first > 0, p, b)
    b = lerp(b, p - h.long * g, h.weight)
    return lerp(b, p - h.short * g, h.nearness), (b,)


class AccSGD(Optimizer):
    r"""AccSGD, accelerated stochastic gradient descent.

    .. math::
        b_t &= (1 - \alpha) b_{t-1} + \alpha \Bigl(p_{t-1} - \frac{\eta\kappa}{c} g_t\Bigr) \quad (b_0 = p_0),
            \qquad \alpha = \frac{c^2 \xi}{\kappa} \\
        p_t &= \frac{c\,(p_{t-1} - \eta g_t) + \alpha b_t}{c + \alpha}

    where :math:`g_t` includes :math:`\lambda p_{t-1}`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: the short step :math:`\eta \ge 0`. Default 1e-3.
        kappa: ratio of the long to the short step :math:`\kappa > 0`. Default 1000.
        xi: statistical advantage :math:`\xi > 0`, in the paper at most :math:`\sqrt\kappa`. Default 10.
        small_const: :math:`c` in (0, 1), with :math:`c^2 \xi \le \kappa`. Default 0.7.
        weight_decay: L2 factor :math:`\lambda \ge 0`. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 4 bytes per parameter (fp32).

    When: gradients with much noise, small batches, where plain momentum gains little over SGD. Start: ``lr=0.1``,
    ``kappa=100.0``, ``xi=10.0``.

    Paper: Kidambi et al., https://arxiv.org/abs/1803.05591.
    """

    why_no_accumulation = "its momentum buffer is an average of places, not of gradients"

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        kappa: Positive = 1000.0,
        xi: Positive = 10.0,
        small_const: Positive = 0.7,
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def check(self, group: Group) -> None:
        kappa, xi, small = group["kappa"], group["xi"], group["small_const"]
        if small >= 1 or small**2 * xi > kappa:
            raise ValueError(
                f"AccSGD: small_const={small!r} with kappa={kappa!r} and xi={xi!r} is not allowed: must be a number in "
                "(0, 1) with small_const**2 * xi <= kappa"
            )

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(accsgd),), ("momentum_buffer",), Decay.L2)

    def scalars(self, group: Group, step: int) -> Any:
        lr, kappa, small = group["lr"], group["kappa"], group["small_const"]
        weight = small**2 * group["xi"] / kappa
        return row_of(
            # The learning rate.
            short=lr,
            # The long step.
            long=lr * kappa / small,
            # Of the newest long step in the average.
            weight=weight,
            # The share of the short step in the new parameter; the rest is the average's.
            nearness=small / (small + weight),
            first=float(step == 1),
        )
