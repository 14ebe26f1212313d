"""Steps by the sign of the momentum: Signum, and Tiger."""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Fraction, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule
from oput_dist.kernels.math import lerp, sign
from oput_dist.kernels.stage import Decay, Update

__all__ = ["Signum", "Tiger"]


@rule
def signsgd(p, g, state, h):
    return p - h.lr * sign(g), state


@rule
def signum(p, g, state, h):
    (m,) = state
    m = lerp(m, g, h.weight)
    return p - h.lr * sign(m), (m,)


class Signum(Optimizer):
    r"""Signum, the sign of the momentum; without momentum signSGD.

    .. math::
        m_t = \mu m_{t-1} + (1 - \mu) g_t, \qquad p_t = (1 - \eta\lambda) p_{t-1} - \eta \operatorname{sign}(m_t)

    with :math:`\operatorname{sign}(0) = 0`. With ``decouple_wd=False`` the decay :math:`\lambda p_{t-1}` is part of
    :math:`g_t` instead.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`: by so much each element moves, about a tenth of Adam's. Default 1e-4.
        momentum: :math:`\mu` in [0, 1). Default 0.9.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        decouple_wd: decoupled weight decay in place of L2. Default True.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 4 bytes per parameter (fp32), without momentum 0.

    When: half of Adam's memory, and gradients whose scale says little. Start: ``lr=1e-3``, ``momentum=0.95``.

    Paper: Bernstein et al., https://arxiv.org/abs/1802.04434.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-4,
        momentum: Fraction = 0.9,
        weight_decay: Nonnegative = 0.0,
        decouple_wd: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        decay = Decay.SHRINK if group["decouple_wd"] else Decay.L2
        if group["momentum"] == 0:
            return Recipe((Update(signsgd),), decay=decay)
        return Recipe((Update(signum),), ("momentum_buffer",), decay)

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(lr=group["lr"], weight=1 - group["momentum"])


class Tiger(Optimizer):
    r"""Tiger: the sign of the momentum, with the momentum and decay that suit language models.

    .. math::
        m_t = \beta m_{t-1} + (1 - \beta) g_t, \qquad p_t = (1 - \eta\lambda) p_{t-1} - \eta \operatorname{sign}(m_t)

    with :math:`\operatorname{sign}(0) = 0`. The author's code also scales learning rates by the size of a parameter's
    values and by its name; give groups of their own learning rates for that.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`: by so much each element moves. Default 1e-3.
        beta: :math:`\beta` in [0, 1). Default 0.965.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.01.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 4 bytes per parameter (fp32).

    When: language models on half of Adam's memory; as Lion, with one average. Start: ``lr=1e-3``, ``beta=0.965``.

    Paper: Su, https://github.com/bojone/tiger.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        beta: Fraction = 0.965,
        weight_decay: Nonnegative = 0.01,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(signum),), ("exp_avg",), Decay.SHRINK)

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(lr=group["lr"], weight=1 - group["beta"])
