"""ADOPT: Adam that divides by the second moment of earlier gradients, so that any beta2 converges."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import at_least, at_most, lerp
from oput_dist.kernels.stage import Decay, Update

__all__ = ["ADOPT"]


@rule
def adopt(p, g, state, h):
    m, v = state
    u = g / at_least(tl.sqrt(v), h.eps)
    m = lerp(m, at_most(at_least(u, -h.clip), h.clip), h.weight1)
    return p * h.keep - h.lr * m, (m, lerp(v, g * g, h.weight2))


class ADOPT(Optimizer):
    r"""ADOPT: the gradient is divided by the root of the **previous** second moment, and momentum comes after.

    .. math::
        u_t &= \operatorname{clip}\Bigl(\frac{g_t}{\max(\sqrt{v_{t-1}}, \epsilon)}, \pm (t - 1)^c\Bigr), \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) u_t \\
        p_t &= p_{t-1} - \eta m_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2

    The first step only sets :math:`v_1 = g_1^2`: parameters stay as they are, without decay too. From then on
    :math:`g_t` includes :math:`\lambda p_{t-1}`, or the parameter shrinks by :math:`1 - \eta\lambda` first
    (``decouple``). There is no bias correction.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.9999).
        eps: :math:`\epsilon > 0`. Default 1e-6.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        decouple: decoupled weight decay in place of L2. Default False.
        clip_exp: the exponent :math:`c \ge 0` of the limit; None for no limit, as in the paper's first version.
            Default 0.25.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 8 bytes per parameter (fp32).

    When: in place of AdamW, above all where Adam is unstable or its beta2 needs tuning.
    Start: ``lr=3e-3``, ``betas=(0.9, 0.99)``, ``decouple=True``.

    Paper: Taniguchi et al., https://arxiv.org/abs/2411.02853.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.9999),
        eps: Positive = 1e-6,
        weight_decay: Nonnegative = 0.0,
        decouple: bool = False,
        clip_exp: Nonnegative | None = 0.25,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        # The engine's own shrinking would not spare the first step.
        decay = Decay.NONE if group["decouple"] or group["decouple_lr"] else Decay.L2
        return Recipe((Update(adopt),), ("exp_avg", "exp_avg_sq"), decay)

    def scalars(self, group: Group, step: int) -> Any:
        if step == 1:  # leaves everything alone but the second moment
            return row_of(lr=group["lr"] * 0.0, weight1=0.0, weight2=1.0, eps=group["eps"], clip=0.0, keep=1.0)
        (beta1, beta2), exponent = group["betas"], group["clip_exp"]
        return row_of(
            lr=group["lr"],
            weight1=1 - beta1,
            weight2=1 - beta2,
            eps=group["eps"],
            # The largest normalised gradient.
            clip=math.inf if exponent is None else (step - 1) ** exponent,
            # What decoupled decay leaves of the parameter.
            keep=1 - decay_rate(group) if group["decouple"] or group["decouple_lr"] else 1.0,
        )
