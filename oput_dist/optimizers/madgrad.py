"""MADGRAD: dual averaging with momentum, scaled by the cube root of summed squares."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Fraction, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import cube_root, lerp
from oput_dist.kernels.stage import Decay, Update

__all__ = ["MADGRAD"]


@rule
def madgrad_way(n, s, h):
    """From the start to the point that the sums stand for."""
    root = cube_root(n) + h.eps
    return s / tl.where(root > 0, root, 1.0)


@rule
def madgrad_sums(g, n, s, h):
    return n + h.gain * (g * g), s + h.gain * g


@rule
def madgrad(p, g, state, h):
    n, s, start = state
    start = tl.where(h.first > 0, p, start)
    n, s = madgrad_sums(g, n, s, h)
    return lerp(p, start - madgrad_way(n, s, h), h.weight) - h.decay * p, (n, s, start)


@rule
def madgrad_plain(p, g, state, h):
    n, s = state
    start = p + madgrad_way(n, s, h)
    n, s = madgrad_sums(g, n, s, h)
    return start - madgrad_way(n, s, h) - h.decay * p, (n, s)


class MADGRAD(Optimizer):
    r"""MADGRAD, momentumized adaptive dual averaged gradient method.

    .. math::
        n_t &= n_{t-1} + l\sqrt{t}\, g_t^2, \qquad s_t = s_{t-1} + l\sqrt{t}\, g_t, \qquad
        l = \eta + \epsilon \text{, or 0 if } \eta = 0 \\
        z_t &= p_0 - \frac{s_t}{\sqrt[3]{n_t} + \epsilon}, \qquad p_t = \mu p_{t-1} + (1 - \mu) z_t

    where :math:`g_t` includes :math:`\lambda p_{t-1}`, or :math:`l\lambda p_{t-1}` is taken from :math:`p_t`
    (``decouple_decay``). Since every gradient counts to the end, L2 decay works far more than in SGD: the values that
    are usual there are a known mistake here; start from 0.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-2.
        momentum: :math:`\mu` in [0, 1). Default 0.9.
        weight_decay: :math:`\lambda \ge 0`, mostly 0, and much less than with SGD. Default 0.
        eps: :math:`\epsilon \ge 0`. Default 1e-6.
        decouple_decay: decoupled weight decay in place of L2. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 12 bytes per parameter (fp32), without momentum 8.

    When: sparse or badly scaled gradients, where AdaGrad would do but its steps shrink too soon. Start: ``lr=3e-3``,
    ``momentum=0.9``.

    Paper: Defazio & Jelassi, https://arxiv.org/abs/2101.11075.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-2,
        momentum: Fraction = 0.9,
        weight_decay: Nonnegative = 0.0,
        eps: Nonnegative = 1e-6,
        decouple_decay: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def complete(self, group: dict[str, Any]) -> None:
        super().complete(group)
        group.setdefault("keeps_x0", group["momentum"] != 0)

    def check(self, group: Group) -> None:
        if group["momentum"] != 0 and not group.get("keeps_x0", True):
            raise ValueError(
                f"MADGRAD: momentum={group['momentum']!r} in a group that was made with momentum=0, which keeps no "
                "starting point: make the optimizer with momentum > 0"
            )

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        decay = Decay.NONE if group["decouple_decay"] or group["decouple_lr"] else Decay.L2
        if group["momentum"] == 0:
            return Recipe((Update(madgrad_plain),), ("grad_sum_sq", "s"), decay)
        return Recipe((Update(madgrad),), ("grad_sum_sq", "s", "x0"), decay)

    def scalars(self, group: Group, step: int) -> Any:
        lr: Any = (group["lr"] != 0) * (group["lr"] + group["eps"])
        decay: Any = lr * group["weight_decay"] if group["decouple_decay"] else 0.0
        if group["decouple_lr"]:
            decay = decay_rate(group)
        return row_of(
            # What a gradient counts in the sums: the learning rate times the root of the step.
            gain=lr * math.sqrt(step),
            # Of the newest point in the parameter: 1 - momentum.
            weight=1 - group["momentum"],
            eps=group["eps"],
            # Share of the old parameter that decoupled decay removes.
            decay=decay,
            first=float(step == 1),
        )
