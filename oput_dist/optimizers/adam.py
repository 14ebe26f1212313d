"""Adam and AdamW, with and without amsgrad."""

from __future__ import annotations

from typing import Any, ClassVar

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, at_least
from oput_dist.kernels.stage import Decay, Update

from .scalars import adam_scalars

__all__ = ["Adam", "AdamW"]


@rule
def adam(p, g, state, h):
    m, v = state
    m, v = adam_moments(g, m, v, h)
    return p - h.lr * m / (tl.sqrt(v) * h.root + h.eps), (m, v)


@rule
def adam_amsgrad(p, g, state, h):
    m, v, largest = state
    m, v = adam_moments(g, m, v, h)
    largest = at_least(v, largest)
    return p - h.lr * m / (tl.sqrt(largest) * h.root + h.eps), (m, v, largest)


class Adam(Optimizer):
    r"""Adam, with L2 weight decay.

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        p_t = p_{t-1} - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    where :math:`g_t` includes :math:`\lambda p_{t-1}`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: L2 factor :math:`\lambda \ge 0`. Default 0.
        amsgrad: divide by the root of the largest :math:`v` so far. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 8 bytes per parameter (fp32), with amsgrad 12.

    When: the reference for most others; with decay rather AdamW. Start: ``lr=3e-3``.

    Paper: Kingma & Ba, https://arxiv.org/abs/1412.6980; amsgrad: Reddi et al., https://arxiv.org/abs/1904.09237.
    """

    decay: ClassVar[Decay] = Decay.L2

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        amsgrad: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        if group["amsgrad"]:
            return Recipe((Update(adam_amsgrad),), ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), self.decay)
        return Recipe((Update(adam),), ("exp_avg", "exp_avg_sq"), self.decay)

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(**adam_scalars(group, step))


class AdamW(Adam):
    r"""AdamW: Adam with decoupled weight decay, :math:`p \leftarrow (1 - \eta\lambda) p` before the update of
    :class:`Adam`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`. Default 1e-2.
        amsgrad: divide by the root of the largest :math:`v` so far. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 8 bytes per parameter (fp32), with amsgrad 12.

    When: the default for transformers. Start: ``lr=3e-3``, ``weight_decay=0.01``.

    Paper: Loshchilov & Hutter, https://arxiv.org/abs/1711.05101.
    """

    decay: ClassVar[Decay] = Decay.SHRINK

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 1e-2,
        amsgrad: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, **hyperparameters(locals()), **common)
