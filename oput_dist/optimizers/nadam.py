"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

import functools
import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments
from oput_dist.kernels.stage import Decay, Update

__all__ = ["NAdam"]


@rule
def nadam(p, g, state, h):
    m, v = state
    m, v = adam_moments(g, m, v, h)
    return p - (h.gradient * g + h.momentum * m) / (tl.sqrt(v) * h.root + h.eps), (m, v)


def momentum_at(beta1: float, momentum_decay: float, step: int) -> float:
    """The momentum of a step."""
    return beta1 * (1 - 0.5 * math.pow(0.96, step * momentum_decay))


@functools.lru_cache(maxsize=64)  # schedules of beta1 must not fill the memory
def _products(beta1: float, momentum_decay: float) -> list[float]:
    """The products that are known so far."""
    return [1.0]


def momentum_product(beta1: float, momentum_decay: float, step: int) -> float:
    """The product of the momenta of all steps up to this one; 0 where it no longer shows beside 1."""
    known = _products(beta1, momentum_decay)
    while len(known) <= step and known[-1] > 1e-20:
        known.append(known[-1] * momentum_at(beta1, momentum_decay, len(known)))
    return known[step] if step < len(known) else 0.0


class NAdam(Optimizer):
    r"""NAdam, as in ``torch.optim.NAdam``: Adam with Nesterov momentum that grows from step to step.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        \mu_t = \beta_1 (1 - 0.5 \cdot 0.96^{t \psi}) \\
        p_t &= p_{t-1} - \eta \Bigl( \frac{(1 - \mu_t) g_t}{1 - \prod_{i \le t} \mu_i}
            + \frac{\mu_{t+1} m_t}{1 - \prod_{i \le t+1} \mu_i} \Bigr)
            \Big/ \bigl( \sqrt{v_t / (1 - \beta_2^t)} + \epsilon \bigr)

    where :math:`g_t` includes :math:`\lambda p_{t-1}`, or the parameter shrinks by :math:`1 - \eta\lambda` first
    (``decoupled_weight_decay``).

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 2e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        momentum_decay: how fast the momentum grows, :math:`\psi \ge 0`. Default 4e-3.
        decoupled_weight_decay: decoupled weight decay in place of L2. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 8 bytes per parameter (fp32).

    When: as Adam, where Nesterov momentum is wanted.
    Start: ``lr=2e-3``, ``betas=(0.9, 0.99)``.

    Paper: Dozat, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 2e-3,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        momentum_decay: Nonnegative = 4e-3,
        decoupled_weight_decay: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        decay = Decay.SHRINK if group["decoupled_weight_decay"] else Decay.L2
        return Recipe((Update(nadam),), ("exp_avg", "exp_avg_sq"), decay)

    def scalars(self, group: Group, step: int) -> Any:
        (beta1, beta2), psi = group["betas"], group["momentum_decay"]
        now, following = momentum_at(beta1, psi, step), momentum_at(beta1, psi, step + 1)
        product = momentum_product(beta1, psi, step)
        return row_of(
            # Learning rate of the gradient, over its bias correction.
            gradient=group["lr"] * ((1 - now) / (1 - product)),
            # Learning rate of the first moment, over its bias correction.
            momentum=group["lr"] * (following / (1 - product * following)),
            weight1=1 - beta1,
            weight2=1 - beta2,
            # One over the square root of the second moment's bias correction.
            root=1 / math.sqrt(1 - beta2**step),
            eps=group["eps"],
        )
