"""AdaBound: Adam whose learning rates are bounded ever more tightly, until it is SGD."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, at_least, at_most
from oput_dist.kernels.stage import Decay, Update

__all__ = ["AdaBound"]


@rule
def bounded(v, h):
    return at_most(at_least(h.lr / (tl.sqrt(v) + h.eps), h.low), h.high)


@rule
def adabound(p, g, state, h):
    m, v = state
    m, v = adam_moments(g, m, v, h)
    return p - bounded(v, h) * m, (m, v)


@rule
def adabound_amsbound(p, g, state, h):
    m, v, largest = state
    m, v = adam_moments(g, m, v, h)
    largest = at_least(v, largest)
    return p - bounded(largest, h) * m, (m, v, largest)


class AdaBound(Optimizer):
    r"""AdaBound, and AMSBound: each element's learning rate is clipped to bounds that meet at the rate of SGD.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        F = \eta_F\, \eta / \eta_0 \\
        \eta_t &= \operatorname{clip}\Bigl(\frac{\eta \sqrt{1 - \beta_2^t}}{(1 - \beta_1^t)(\sqrt{v_t} + \epsilon)},\;
            F \Bigl(1 - \frac{1}{\gamma t + 1}\Bigr),\; F \Bigl(1 + \frac{1}{\gamma t}\Bigr)\Bigr), \qquad
        p_t = p_{t-1} - \eta_t m_t

    where :math:`g_t` includes :math:`\lambda p_{t-1}`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        final_lr: the rate of SGD :math:`\eta_F \ge 0` that is reached in the end. Default 0.1.
        gamma: how fast it is reached, :math:`\gamma > 0`. Default 1e-3.
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: L2 factor :math:`\lambda \ge 0`. Default 0.
        amsbound: divide by the root of the largest :math:`v` so far. Default False.
        base_lr: the learning rate :math:`\eta_0 > 0` that ``final_lr`` goes with, so that a schedule scales both.
            Default None: a group's own initial ``lr``.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 8 bytes per parameter (fp32), with amsbound 12.

    When: image classification, where it begins like Adam and ends like SGD with momentum.
    Start: ``lr=1e-3``, ``betas=(0.9, 0.99)``, ``final_lr=0.1``.

    Paper: Luo et al., https://arxiv.org/abs/1902.09843.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        final_lr: Nonnegative = 0.1,
        gamma: Positive = 1e-3,
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        amsbound: bool = False,
        base_lr: Positive | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def check(self, group: Group) -> None:
        if group["base_lr"] is None and float(group["lr"]) == 0:
            raise ValueError("AdaBound: lr=0 without base_lr: give base_lr, the learning rate that final_lr goes with")

    def complete(self, group: dict[str, Any]) -> None:
        super().complete(group)
        if group["base_lr"] is None:
            group["base_lr"] = float(group["lr"])

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        if group["amsbound"]:
            return Recipe((Update(adabound_amsbound),), ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), Decay.L2)
        return Recipe((Update(adabound),), ("exp_avg", "exp_avg_sq"), Decay.L2)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        final = group["lr"] * (group["final_lr"] / group["base_lr"])
        return row_of(
            # With both bias corrections.
            lr=group["lr"] * (math.sqrt(1 - beta2**step) / (1 - beta1**step)),
            weight1=1 - beta1,
            weight2=1 - beta2,
            eps=group["eps"],
            low=final * (1 - 1 / (group["gamma"] * step + 1)),
            high=final * (1 + 1 / (group["gamma"] * step)),
        )
