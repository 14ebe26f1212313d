"""PID: momentum with a term for the change of the gradient."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Fraction, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import Decay, Update

from .advice import warn_once
from .sgd import sgd

__all__ = ["PID"]


@rule
def pid(p, g, state, h):
    i, d, previous = state
    i = h.momentum * i + h.gain * g
    d = lerp(d, (g - previous) * h.started, 1.0 - h.momentum)
    return p - h.lr * (g + h.integral * i + h.derivative * d), (i, d, g * h.kept)


class PID(Optimizer):
    r"""PID controller: the gradient, its momentum as the integral, and its averaged change as the derivative.

    .. math::
        I_t &= \mu I_{t-1} + (1 - \tau) g_t \quad (I_1 = g_1), \qquad
        D_t = \mu D_{t-1} + (1 - \mu) (g_t - g_{t-1}) \quad (D_1 = 0) \\
        p_t &= p_{t-1} - \eta (g_t + K_i I_t + K_d D_t)

    where :math:`g_t` includes :math:`\lambda p_{t-1}`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`; a step is some :math:`K_i / (1 - \mu)` times SGD's. Default 1e-3.
        momentum: :math:`\mu` in [0, 1). Default 0.9. At 0 the integral and the derivative are left out, as in the
            reference: plain SGD, and a warning says so.
        dampening: :math:`\tau` in [0, 1); the first step is not dampened. Default 0.
        weight_decay: L2 factor :math:`\lambda \ge 0`. Default 0.
        integral: :math:`K_i \ge 0`. Default 5.
        derivative: :math:`K_d \ge 0`. Default 10.
        bug_compat: as in the reference, which forgets the first gradient: at the second step :math:`g_1` counts as 0
            in the derivative. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 12 bytes per parameter (fp32), without momentum 0.

    When: SGD with momentum overshoots; the derivative brakes it. Start: ``lr=1e-3``, ``momentum=0.9``,
    ``integral=5.0``, ``derivative=10.0``.

    Paper: An et al., A PID controller approach for stochastic optimization of deep networks, CVPR 2018,
    https://doi.org/10.1109/CVPR.2018.00889.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        momentum: Fraction = 0.9,
        dampening: Fraction = 0.0,
        weight_decay: Nonnegative = 0.0,
        integral: Nonnegative = 5.0,
        derivative: Nonnegative = 10.0,
        bug_compat: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def complete(self, group: dict[str, Any]) -> None:
        super().complete(group)
        text = "momentum=0 leaves out the integral and the derivative: plain SGD; give momentum=0.9"
        warn_once(self, lambda g: bool(g["momentum"] == 0), text)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        if group["momentum"] == 0:
            return Recipe((Update(sgd),), decay=Decay.L2)
        return Recipe((Update(pid),), ("i_buffer", "d_buffer", "grad_buffer"), Decay.L2)

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(
            lr=group["lr"],
            momentum=group["momentum"],
            # Of the gradient in the integral.
            gain=1.0 if step == 1 else 1 - group["dampening"],
            # 0 at the first step, which has no previous gradient; 1 later.
            started=float(step > 1),
            # 1, or 0 where the gradient is not kept for the next step.
            kept=float(step > 1 or not group["bug_compat"]),
            integral=group["integral"],
            derivative=group["derivative"],
        )
