"""LaProp: momentum of normalised gradients, where Adam normalises the momentum of gradients."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import Decay, Update

from .scalars import adam_scalars

__all__ = ["LaProp"]


@rule
def laprop(p, g, state, h):
    m, v = state
    v = lerp(v, g * g, h.weight2)
    m = lerp(m, g / (tl.sqrt(v) * h.root + h.eps), h.weight1)
    return p - h.lr * m, (m, v)


class LaProp(Optimizer):
    r"""LaProp: each gradient is normalised when it enters the momentum, so that the two betas do not interfere.

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
        p_t &= (1 - \eta\lambda) p_{t-1} - \eta \frac{m_t}{1 - \beta_1^t}

    The learning rate is that of the step, as in the paper; the authors' code keeps those of earlier steps inside the
    momentum, which is the same while it does not change.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 4e-4.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-15.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 8 bytes per parameter (fp32).

    When: in place of AdamW, above all with a small beta2, or with gradients that are noisy or spike.
    Start: ``lr=3e-3``, ``betas=(0.9, 0.99)``.

    Paper: Ziyin et al., https://arxiv.org/abs/2002.04839.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 4e-4,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-15,
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(laprop),), ("exp_avg", "exp_avg_sq"), Decay.SHRINK)

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(**adam_scalars(group, step))
