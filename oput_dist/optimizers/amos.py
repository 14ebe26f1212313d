"""Amos: adaptive steps and adaptive weight decay towards a scale that each tensor's weights are expected to have."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Fraction, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule
from oput_dist.kernels.math import lerp, square_terms
from oput_dist.kernels.stage import WHOLE, Decay, Measure, Update, Vectors

__all__ = ["Amos"]


@functools.cache  # so that equal recipes stay equal
def amos_factors(eta: float) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
    """The shares of parameter and gradient in the step of tensors whose weights have the scale ``eta``."""

    def factors(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
        squares, count, step = sums
        v, b = vectors
        mean = squares / count.clamp(min=1.0)
        v = torch.lerp(v, mean, 1.0 - h.beta)
        precision = (1.0 - h.beta**step) / v.clamp(min=2.0**-125)
        gamma = h.lr**2 * precision * mean / (1.0 + h.c_coef * h.lr.sqrt() * b).sqrt()
        slower = 1.0 / (1.0 + h.d_coef * (h.lr * eta).sqrt() * b)
        shares = slower * (gamma / 2.0 + h.extra_l2), slower * h.lr * eta * precision.sqrt()
        return (v, b + gamma * (1.0 + b)), shares

    return factors


@rule
def amos(p, g, state, h, c):
    of_p, of_g = c
    return p - (of_p * p + of_g * g), state


@rule
def amos_momentum(p, g, state, h, c):
    (m,) = state
    of_p, of_g = c
    m = lerp(m, of_p * p + of_g * g, h.weight)
    return p - m, (m,)


class Amos(Optimizer):
    r"""Amos: Adam-like steps, one second moment for each tensor, and a decay that follows from the steps.

    .. math::
        v_t &= \beta v_{t-1} + (1 - \beta) \operatorname{mean}(g_t^2), \qquad
        \hat r_t = (1 - \beta^t) / v_t, \qquad
        \gamma_t = \frac{\xi^2\, \hat r_t \operatorname{mean}(g_t^2)}{\sqrt{1 + c \sqrt\xi\, b_{t-1}}} \\
        p_t &= p_{t-1} - \frac{(\gamma_t / 2 + \lambda_2)\, p_{t-1} + \xi \eta \sqrt{\hat r_t}\, g_t}
            {1 + d \sqrt{\xi\eta}\, b_{t-1}}, \qquad
        b_t = b_{t-1} + \gamma_t (1 + b_{t-1})

    With ``momentum`` the step is averaged before it is taken. Means run over the whole parameter, whatever its
    sharding.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: :math:`\xi \ge 0`, about one over the root of the number of batches. Default 1e-3.
        beta: :math:`\beta` in [0, 1), with :math:`1 - \beta` about as large as ``lr``. Default 0.999.
        momentum: decay rate of the average of steps, in [0, 1). Default 0.
        eta: the scale :math:`\eta > 0` that the weights of a group are expected to have; None for 0.5 for vectors and
            scalars, and :math:`\sqrt{2 / n}` for others, whose outputs sum over n inputs: all axes but the first.
            Default None.
        extra_l2: a constant decay :math:`\lambda_2 \ge 0` besides, not multiplied by the learning rate. Default 0.
        c_coef: :math:`c \ge 0`. Default 0.25.
        d_coef: :math:`d \ge 0`. Default 0.25.
        weight_decay: decoupled, >= 0, besides the decay of Amos itself. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class N: one packed all-reduce a step. State: two values for each tensor, the same on all ranks; with
    momentum 4 bytes per parameter (fp32).

    When: pre-training of language models with almost no memory for state, and no weight decay to tune. Start:
    ``lr=0.02``, ``beta=0.98``, ``momentum=0.9``.

    Paper: Tian & Parikh, https://arxiv.org/abs/2210.11693.
    """

    why_no_accumulation = "its decay grows with the steps that it takes"

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        beta: Fraction = 0.999,
        momentum: Fraction = 0.0,
        eta: Positive | None = None,
        extra_l2: Nonnegative = 0.0,
        c_coef: Nonnegative = 0.25,
        d_coef: Nonnegative = 0.25,
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        eta = group["eta"]
        if eta is None:
            eta = 0.5 if len(shape) < 2 else math.sqrt(2 / max(1, math.prod(shape[1:])))
        rule, state = (amos, ()) if group["momentum"] == 0 else (amos_momentum, ("exp_avg",))
        stages = (
            Measure(square_terms, (WHOLE,), writes_state=False),
            Update(rule, Vectors(amos_factors(float(eta)), (WHOLE, WHOLE))),
        )
        return Recipe(stages, state, Decay.SHRINK, (("exp_avg_sq", WHOLE), ("decay", WHOLE)))

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(
            lr=group["lr"],
            beta=group["beta"],
            # Of the new step in the momentum.
            weight=1 - group["momentum"],
            extra_l2=group["extra_l2"],
            c_coef=group["c_coef"],
            d_coef=group["d_coef"],
        )
