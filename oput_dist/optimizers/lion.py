"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule
from oput_dist.kernels.math import lerp, sign
from oput_dist.kernels.stage import Decay, Update

__all__ = ["Lion"]


@rule
def lion(p, g, state, h):
    (m,) = state
    p = p - h.lr * sign(lerp(m, g, h.weight1))
    return p, (lerp(m, g, h.weight2),)


class Lion(Optimizer):
    r"""Lion, evolved sign momentum.

    .. math::
        p_t = (1 - \eta\lambda) p_{t-1} - \eta \operatorname{sign}(\beta_1 m_{t-1} + (1 - \beta_1) g_t), \qquad
        m_t = \beta_2 m_{t-1} + (1 - \beta_2) g_t

    with :math:`\operatorname{sign}(0) = 0`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`, a third to a tenth of AdamW's. Default 1e-4.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.99).
        weight_decay: decoupled, :math:`\lambda \ge 0`, three to ten times AdamW's. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 4 bytes per parameter (fp32).

    When: half of AdamW's state must do, and batches are large. Start: ``lr=3e-4``, ``weight_decay=0.1``.

    Paper: Chen et al., https://arxiv.org/abs/2302.06675.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(lion),), ("exp_avg",), Decay.SHRINK)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        return row_of(lr=group["lr"], weight1=1 - beta1, weight2=1 - beta2)
