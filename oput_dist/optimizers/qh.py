"""Quasi-hyperbolic momentum: QHM, QHAdam, and RangerQH, which is QHAdam with lookahead."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import (
    Allowed,
    Betas,
    Fraction,
    Nonnegative,
    PositiveInteger,
    Share,
    each,
    hyperparameters,
    share,
)
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, lerp, lookahead
from oput_dist.kernels.stage import Decay, Update

from .advice import warn_once
from .scalars import WHY_NO_ACCUMULATION, WHY_NOT_CAUTIOUS, lookahead_scalars

__all__ = ["QHM", "QHAdam", "RangerQH"]


def mixing(value: Any) -> str | None:
    """The weight of an average beside that of the newest value."""
    return None if value == 0 or share(value) is None else "a number in [0, 1]"


Mixing = Annotated[float, Allowed(mixing)]
Mixings = Annotated[tuple[float, float], Allowed(each(mixing, "a tuple of 2 numbers in [0, 1]", 2))]


@rule
def qhm(p, g, state, h):
    (b,) = state
    b = lerp(b, g, h.weight)
    return p - h.lr * lerp(g, b, h.nu), (b,)


class QHM(Optimizer):
    r"""QHM, quasi-hyperbolic momentum: a mean of the gradient and its average.

    .. math::
        b_t = \mu b_{t-1} + (1 - \mu) g_t, \qquad p_t = p_{t-1} - \eta \bigl((1 - \nu) g_t + \nu b_t\bigr)

    where :math:`g_t` includes :math:`\lambda p_{t-1}`, or the parameter shrinks by :math:`1 - \eta\lambda` first
    (``weight_decay_type="direct"``). The average is a mean and no sum: the learning rate is :math:`1 / (1 - \mu)`
    times that of SGD with momentum.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        momentum: :math:`\mu` in [0, 1). Default 0.999. At 0 this is plain SGD whatever :math:`\nu`, and a warning
            says so.
        nu: :math:`\nu` in [0, 1]. Default 0.7.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        weight_decay_type: ``"grad"`` for L2, ``"direct"`` for decoupled decay. Default "grad".
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 4 bytes per parameter (fp32).

    When: in place of SGD with (Nesterov) momentum, with a longer memory of gradients. Start: ``lr=0.3``,
    ``momentum=0.95``, ``nu=0.7``.

    Paper: Ma & Yarats, https://arxiv.org/abs/1810.06801.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        momentum: Fraction = 0.999,
        nu: Mixing = 0.7,
        weight_decay: Nonnegative = 0.0,
        weight_decay_type: Literal["grad", "direct"] = "grad",
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def complete(self, group: dict[str, Any]) -> None:
        super().complete(group)
        text = "momentum=0 makes this plain SGD, whatever nu is; give momentum=0.999, with nu=0.7"
        warn_once(self, lambda g: bool(g["momentum"] == 0), text)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        decay = Decay.SHRINK if group["weight_decay_type"] == "direct" else Decay.L2
        return Recipe((Update(qhm),), ("momentum_buffer",), decay)

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(lr=group["lr"], weight=1 - group["momentum"], nu=group["nu"])


@rule
def qhadam_step(p, g, m, v, h):
    mean = lerp(g, m * h.correct1, h.nu1)
    square = lerp(g * g, v * h.correct2, h.nu2)
    return p - h.lr * mean / (tl.sqrt(square) + h.eps)


@rule
def qhadam(p, g, state, h):
    m, v = state
    m, v = adam_moments(g, m, v, h)
    return qhadam_step(p, g, m, v, h), (m, v)


class QHAdam(Optimizer):
    r"""QHAdam: Adam whose averages are mixed with the newest gradient and its square.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        \hat m_t = \frac{m_t}{1 - \beta_1^t}, \qquad \hat v_t = \frac{v_t}{1 - \beta_2^t} \\
        p_t &= p_{t-1} - \eta \frac{(1 - \nu_1) g_t + \nu_1 \hat m_t}
            {\sqrt{(1 - \nu_2) g_t^2 + \nu_2 \hat v_t} + \epsilon}

    where :math:`g_t` includes :math:`\lambda p_{t-1}`, or the parameter shrinks by :math:`1 - \eta\lambda` first
    (``decouple_weight_decay``).

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.995, 0.999).
        nus: :math:`(\nu_1, \nu_2)`, each in [0, 1]. Default (0.7, 1). At (1, 1) this is Adam, and a warning says so.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        decouple_weight_decay: decoupled weight decay in place of L2. Default False.
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 8 bytes per parameter (fp32).

    When: in place of Adam, with a longer memory of gradients that does not make the step sluggish.
    Start: ``lr=3e-3``, ``betas=(0.95, 0.99)``, ``nus=(0.7, 1.0)``.

    Paper: Ma & Yarats, https://arxiv.org/abs/1810.06801.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.995, 0.999),
        nus: Mixings = (0.7, 1.0),
        weight_decay: Nonnegative = 0.0,
        decouple_weight_decay: bool = False,
        eps: Nonnegative = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def complete(self, group: dict[str, Any]) -> None:
        super().complete(group)
        text = "nus=(1, 1) make the step plain Adam's; give nus=(0.7, 1.0)"
        warn_once(self, lambda g: tuple(g["nus"]) == (1, 1), text)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        decay = Decay.SHRINK if group["decouple_weight_decay"] else Decay.L2
        return Recipe((Update(qhadam),), ("exp_avg", "exp_avg_sq"), decay)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        return row_of(
            lr=group["lr"],
            eps=group["eps"],
            weight1=1 - beta1,
            weight2=1 - beta2,
            # One over the bias correction of the gradient average.
            correct1=1 / (1 - beta1**step),
            # One over that of the average of squares.
            correct2=1 / (1 - beta2**step),
            nu1=group["nus"][0],
            nu2=group["nus"][1],
        )


@rule
def rangerqh(p, g, state, h):
    m, v, slow = state
    m, v = adam_moments(g, m, v, h)
    p, slow = lookahead(p, qhadam_step(p, g, m, v, h), slow, h)
    return p, (m, v, slow)


class RangerQH(QHAdam):
    r"""RangerQH: :class:`QHAdam` inside lookahead.

    .. math::
        x_t = x_{t-1} + \alpha (p_t - x_{t-1}), \quad p_t \leftarrow x_t \qquad \text{every } k \text{ steps}

    Slow weights begin as the parameter, with decoupled decay as it is after the first decay, as in the reference.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        nus: :math:`(\nu_1, \nu_2)`, each in [0, 1]. Default (0.7, 1). At (1, 1) the step is Adam's, and a warning
            says so.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        k: steps between two synchronisations of slow and fast weights, an integer >= 1. Default 6.
        alpha: :math:`\alpha` in (0, 1]. Default 0.5.
        decouple_weight_decay: decoupled weight decay in place of L2. Default False.
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 12 bytes per parameter (fp32).

    When: as QHAdam, where the end of training is noisy: slow weights average it. Start: ``lr=5e-3``,
    ``betas=(0.9, 0.99)``, ``nus=(0.7, 1.0)``.

    Paper: Ma & Yarats, https://arxiv.org/abs/1810.06801; lookahead: Zhang et al., https://arxiv.org/abs/1907.08610;
    Wright, https://github.com/lessw2020/Ranger-Deep-Learning-Optimizer.
    """

    why_not_cautious = WHY_NOT_CAUTIOUS
    why_no_accumulation = WHY_NO_ACCUMULATION

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        nus: Mixings = (0.7, 1.0),
        weight_decay: Nonnegative = 0.0,
        k: PositiveInteger = 6,
        alpha: Share = 0.5,
        decouple_weight_decay: bool = False,
        eps: Nonnegative = 1e-8,
        **common: Unpack[Common],
    ) -> None:
        Optimizer.__init__(self, params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        decay = super().recipe(group, shape).decay
        return Recipe((Update(rangerqh),), ("exp_avg", "exp_avg_sq", "slow_buffer"), decay)

    def scalars(self, group: Group, step: int) -> Any:
        first, pull = lookahead_scalars(step, group["k"], group["alpha"])
        return row_of(**super().scalars(group, step)._asdict(), first=first, pull=pull)
