"""AggMo: the mean of several momenta."""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any

from typing_extensions import Self, Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape
from oput_dist.engine.hyper import BetasN, Nonnegative, check_group, hyperparameters, positive_integer, share
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.stage import Decay, Update

__all__ = ["AggMo"]


@functools.cache  # so that equal groups share a kernel
def aggmo_scalars(count: int) -> Any:
    """The class of ``h`` for a number of momenta: the learning rate over it, then each beta."""
    return namedtuple("AggMoScalars", ["lr", *(f"beta{i}" for i in range(count))])


@rule
def aggmo(p, g, state, h):
    new = ()
    for i in tl.static_range(len(state)):
        b = h[i + 1] * state[i] + g
        p = p - h.lr * b
        new = new + (b,)  # noqa: RUF005 - Triton
    return p, new


class AggMo(Optimizer):
    r"""AggMo, aggregated momentum: the mean of :math:`K` momenta, of which the fast ones damp the slow.

    .. math::
        b^{(i)}_t = \beta_i b^{(i)}_{t-1} + g_t, \qquad p_t = p_{t-1} - \frac{\eta}{K} \sum_{i=1}^K b^{(i)}_t

    where :math:`g_t` includes :math:`\lambda p_{t-1}`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`\beta_1, \dots, \beta_K`, one or more, each in [0, 1). Default (0, 0.9, 0.99).
        weight_decay: L2 factor :math:`\lambda \ge 0`. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 4 bytes per parameter and beta (fp32).

    When: instead of SGD with momentum where a large momentum would pay but oscillates. Start: ``lr=0.03``,
    ``betas=(0.0, 0.9, 0.99)``.

    Paper: Lucas et al., https://arxiv.org/abs/1804.00325.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: BetasN = (0.0, 0.9, 0.99),
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    @classmethod
    def from_exp_form(
        cls,
        params: Params,
        lr: float = 1e-3,
        a: float = 0.1,
        k: int = 3,
        weight_decay: float = 0.0,
        **common: Unpack[Common],
    ) -> Self:
        """With the betas ``1 - a**i`` for ``i = 0, ..., k - 1``.

        Args:
            params: as above, and so for ``lr``, ``weight_decay`` and ``common``.
            a: in (0, 1]. Default 0.1.
            k: the number of betas, an integer >= 1. Default 3.
        """
        check_group(f"{cls.__name__}.from_exp_form", {"a": a, "k": k}, {"a": share, "k": positive_integer})
        return cls(params, lr, tuple(1 - a**i for i in range(k)), weight_decay, **common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        names = tuple(f"momentum_buffer_{i}" for i in range(len(group["betas"])))
        return Recipe((Update(aggmo),), names, Decay.L2)

    def scalars(self, group: Group, step: int) -> Any:
        betas = group["betas"]
        return aggmo_scalars(len(betas))(group["lr"] / len(betas), *betas)
