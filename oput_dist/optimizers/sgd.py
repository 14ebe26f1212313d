"""SGD with momentum and Nesterov momentum; SGDW."""

from __future__ import annotations

from typing import Annotated, Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Allowed, Fraction, Nonnegative, fraction, hyperparameters
from oput_dist.kernels.language import rule
from oput_dist.kernels.stage import Decay, Update

__all__ = ["SGD", "SGDW"]


@rule
def sgd(p, g, state, h):
    return p - h.lr * g, state


@rule
def sgd_momentum(p, g, state, h):
    (b,) = state
    b = h.momentum * b + h.gain * g
    return p - h.lr * b, (b,)


@rule
def sgd_nesterov(p, g, state, h):
    (b,) = state
    b = h.momentum * b + h.gain * g
    return p - h.lr * (g + h.momentum * b), (b,)


def dampening_check(value: Any) -> str | None:
    """A number, or whether it is the momentum."""
    return None if isinstance(value, bool) or fraction(value) is None else "True, False or a number in [0, 1)"


Dampening = Annotated[float | bool, Allowed(dampening_check)]


class SGD(Optimizer):
    r"""Stochastic gradient descent, with momentum as in ``torch.optim.SGD``.

    .. math::
        b_t = \mu b_{t-1} + (1 - \tau) g_t \quad (b_1 = g_1), \qquad
        u_t = g_t + \mu b_t \text{ (Nesterov) or } b_t, \qquad
        p_t = p_{t-1} - \eta u_t

    where :math:`g_t` includes the L2 term :math:`\lambda p_{t-1}`, or the parameter shrinks by
    :math:`1 - \eta\lambda` first (``decouple_wd``).

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        momentum: :math:`\mu` in [0, 1). Default 0.
        dampening: :math:`\tau` in [0, 1); the first step is not dampened. Or True for :math:`\tau = \mu`, so that
            :math:`b_t` is a mean of gradients; then the first step is dampened too, unless ``torch_init``. Default 0.
        nesterov: Nesterov momentum; needs ``momentum > 0`` and no dampening. Default False.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        decouple_wd: decoupled weight decay (SGDW) in place of L2. Default False.
        torch_init: begin with :math:`b_1 = g_1` where ``dampening=True``, as it is elsewhere. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 0 bytes per parameter, with momentum 4 (fp32).

    When: vision models with a tuned schedule, and as the plainest baseline. Start: ``lr=0.1``, ``momentum=0.9``.

    Paper: Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013;
    decoupled decay: Loshchilov & Hutter, https://arxiv.org/abs/1711.05101.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        momentum: Fraction = 0.0,
        dampening: Dampening = 0.0,
        nesterov: bool = False,
        weight_decay: Nonnegative = 0.0,
        decouple_wd: bool = False,
        torch_init: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def check(self, group: Group) -> None:
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ValueError(
                f"{type(self).__name__}: nesterov=True with momentum={group['momentum']!r} and "
                f"dampening={group['dampening']!r}: needs momentum > 0 and dampening = 0"
            )

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        decay = Decay.SHRINK if group["decouple_wd"] else Decay.L2
        if group["momentum"] == 0:
            return Recipe((Update(sgd),), decay=decay)
        rule = sgd_nesterov if group["nesterov"] else sgd_momentum
        return Recipe((Update(rule),), ("momentum_buffer",), decay)

    def scalars(self, group: Group, step: int) -> Any:
        averaged = group["dampening"] is True
        dampening = group["momentum"] if averaged else group["dampening"]
        plain_first = step == 1 and (group["torch_init"] or not averaged)
        return row_of(lr=group["lr"], momentum=group["momentum"], gain=1.0 if plain_first else 1.0 - dampening)


class SGDW(SGD):
    r"""SGDW: :class:`SGD` with decoupled weight decay, :math:`p \leftarrow (1 - \eta\lambda) p` before the update.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        momentum: :math:`\mu` in [0, 1). Default 0.
        dampening: :math:`\tau` in [0, 1), or True, see :class:`SGD`. Default 0.
        weight_decay: :math:`\lambda \ge 0`. Default 1e-2.
        nesterov: Nesterov momentum; needs ``momentum > 0`` and no dampening. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 0 bytes per parameter, with momentum 4 (fp32).

    When: as SGD, where weight decay and learning rate are tuned apart, or a schedule moves the rate a lot.
    Start: ``lr=0.1``, ``momentum=0.9``.

    Paper: Loshchilov & Hutter, https://arxiv.org/abs/1711.05101.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        momentum: Fraction = 0.0,
        dampening: Dampening = 0.0,
        weight_decay: Nonnegative = 1e-2,
        nesterov: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, **hyperparameters(locals()), decouple_wd=True, **common)
