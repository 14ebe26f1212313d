"""AdaMod: Adam whose learning rates may not exceed their own average."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Fraction, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, at_most, lerp
from oput_dist.kernels.stage import Decay, Update

__all__ = ["AdaMod"]


@rule
def adamod(p, g, state, h):
    m, v, average = state
    m, v = adam_moments(g, m, v, h)
    lr = h.lr / (tl.sqrt(v) + h.eps)
    average = lerp(average, lr, h.weight3)
    return p - at_most(lr, average) * m, (m, v, average)


class AdaMod(Optimizer):
    r"""AdaMod: each element's learning rate is at most its long-term average, which begins at zero: a warm-up.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        \eta_t = \frac{\eta \sqrt{1 - \beta_2^t}}{(1 - \beta_1^t)(\sqrt{v_t} + \epsilon)} \\
        e_t &= \beta_3 e_{t-1} + (1 - \beta_3) \eta_t, \qquad
        p_t = (1 - \eta\lambda) p_{t-1} - \min(\eta_t, e_t)\, m_t

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        beta3: decay rate :math:`\beta_3` in [0, 1) of the average of learning rates; the warm-up takes some
            :math:`1 / (1 - \beta_3)` steps. Default 0.999.
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 12 bytes per parameter (fp32).

    When: where Adam needs a warm-up, such as transformers: it has one built in.
    Start: ``lr=3e-3``, ``betas=(0.9, 0.99)``, ``beta3=0.95``.

    Paper: Ding et al., https://arxiv.org/abs/1910.12249.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        beta3: Fraction = 0.999,
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(adamod),), ("exp_avg", "exp_avg_sq", "exp_avg_lr"), Decay.SHRINK)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        lr = group["lr"] * (math.sqrt(1 - beta2**step) / (1 - beta1**step))
        return row_of(
            # With both bias corrections.
            lr=lr,
            weight1=1 - beta1,
            weight2=1 - beta2,
            weight3=1 - group["beta3"],
            eps=group["eps"],
        )
