"""A2Grad: Nesterov's accelerated gradient with a step that shrinks as the gradient's noise adds up; three averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Fraction, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import WHOLE, Decay, Measure, Update, Vectors

__all__ = ["A2GradExp", "A2GradInc", "A2GradUni"]


@rule
def a2grad_mean(p, g, state, h):
    x, mean = state
    x = tl.where(h.first > 0, p, x)
    mean = lerp(mean, g, h.weight)
    return (x, mean), ((g - mean) * (g - mean),)


@rule
def a2grad(p, g, state, h, c):
    x, mean = state
    (length,) = c
    move = length * g
    x = x - move
    return lerp(p, x, h.share) - (1.0 - h.share) * h.before * move, (x, mean)


def _length(h: Any, step: Any, noise: Any) -> Any:
    """The length of the step against the gradient."""
    return 1.0 / (2.0 * h.lips / step.clamp(min=1.0) + h.beta * noise)


def a2grad_uni(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """The noise is the root of the sum of all deviations."""
    deviation, _count, step = sums
    v = vectors[0] + deviation
    return (v,), (_length(h, step, v.sqrt()),)


def a2grad_inc(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """Likewise, with weights that grow like the square of the step."""
    deviation, _count, step = sums
    v = vectors[0] * (1.0 - 1.0 / step.clamp(min=1.0)) ** 2 + deviation
    return (v,), (_length(h, step, v.sqrt()),)


def a2grad_exp(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """The noise follows from the largest moving average of the deviations."""
    deviation, _count, step = sums
    average = torch.lerp(vectors[0], deviation, 1.0 - h.rho)
    v = torch.maximum(vectors[1], average)
    return (average, v), (_length(h, step, (step * v).sqrt()),)


class A2Grad(Optimizer):
    """What the three have in common."""

    length: ClassVar[Callable[..., Any]]
    averages: ClassVar[tuple[str, ...]] = ("v_k",)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        stages = (Measure(a2grad_mean, (WHOLE,)), Update(a2grad, Vectors(self.length, (WHOLE,))))
        return Recipe(stages, ("x_k", "avg_grad"), Decay.L2, tuple((name, WHOLE) for name in self.averages))

    def scalars(self, group: Group, step: int) -> Any:
        return row_of(
            beta=group["beta"],
            lips=group["lips"],
            rho=group.get("rho", 0.0),
            # 1 at the first step, else 0.
            first=float(step == 1),
            # Of the new gradient in the mean of all so far.
            weight=1 / step,
            # The share of the anchor in the last step's interpolation, 1 at the first.
            before=2 / (step + 1),
            # The same of this step.
            share=2 / (step + 2),
        )


class A2GradUni(A2Grad):
    r"""A2Grad with uniform averages.

    .. math::
        \bar g_t &= \bar g_{t-1} + (g_t - \bar g_{t-1}) / t, \qquad
        v_t = v_{t-1} + \lVert g_t - \bar g_t \rVert^2, \qquad
        c_t = \frac{1}{2 L / t + \beta \sqrt{v_t}} \\
        x_t &= x_{t-1} - c_t g_t, \qquad
        p_t = (1 - \alpha_t) p_{t-1} + \alpha_t x_t - (1 - \alpha_t)\, \alpha_{t-1} c_t g_t, \qquad
        \alpha_t = \frac{2}{t + 2}

    where :math:`x_0 = p_0`, :math:`\alpha_0 = 1`, and :math:`g_t` includes the L2 term :math:`\lambda p_{t-1}`. Norms
    run over the whole parameter, whatever its sharding; the paper's :math:`v_t` is elementwise, all implementations'
    is one value for each tensor.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: not used, and schedules of it do nothing; only ``decouple_lr`` decays by it. Default 1.
        beta: weight of the noise :math:`\beta \ge 0`: the larger, the shorter the steps. Default 10.
        lips: the Lipschitz constant :math:`L > 0` of the gradient. Default 10.
        weight_decay: L2 factor :math:`\lambda \ge 0`. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class N: one packed all-reduce a step. State: 8 bytes per parameter (fp32), and one value for each tensor,
    the same on all ranks.

    When: convex problems and small networks, where no learning rate is to be tuned. Start: ``beta=1.0``,
    ``lips=3.0``.

    Paper: Deng, Cheng & Lan, https://arxiv.org/abs/1810.00553.
    """

    length: ClassVar = staticmethod(a2grad_uni)

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1.0,
        beta: Nonnegative = 10.0,
        lips: Positive = 10.0,
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)


class A2GradInc(A2GradUni):
    r"""A2Grad with incremental averages: :class:`A2GradUni` with
    :math:`v_t = (1 - 1/t)^2\, v_{t-1} + \lVert g_t - \bar g_t \rVert^2`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: not used, and schedules of it do nothing; only ``decouple_lr`` decays by it. Default 1.
        beta: weight of the noise :math:`\beta \ge 0`: the larger, the shorter the steps. Default 10.
        lips: the Lipschitz constant :math:`L > 0` of the gradient. Default 10.
        weight_decay: L2 factor :math:`\lambda \ge 0`. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class N: one packed all-reduce a step. State: 8 bytes per parameter (fp32), and one value for each tensor,
    the same on all ranks.

    When: as :class:`A2GradUni`, where the noise of early gradients should be forgotten. Start: ``beta=1.0``,
    ``lips=3.0``.

    Paper: Deng, Cheng & Lan, https://arxiv.org/abs/1810.00553.
    """

    length: ClassVar = staticmethod(a2grad_inc)


class A2GradExp(A2Grad):
    r"""A2Grad with exponential averages: :class:`A2GradUni` with

    .. math::
        \bar v_t = \rho \bar v_{t-1} + (1 - \rho) \lVert g_t - \bar g_t \rVert^2, \qquad
        v_t = \max(v_{t-1}, \bar v_t), \qquad
        c_t = \frac{1}{2 L / t + \beta \sqrt{t\, v_t}}

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: not used, and schedules of it do nothing; only ``decouple_lr`` decays by it. Default 1.
        beta: weight of the noise :math:`\beta \ge 0`: the larger, the shorter the steps. Default 10.
        lips: the Lipschitz constant :math:`L > 0` of the gradient. Default 10.
        rho: decay rate :math:`\rho` of the average, in [0, 1). Default 0.5.
        weight_decay: L2 factor :math:`\lambda \ge 0`. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class N: one packed all-reduce a step. State: 8 bytes per parameter (fp32), and two values for each
    tensor, the same on all ranks.

    When: as :class:`A2GradUni`, with steps that keep to the noisiest phase so far. Start: ``beta=0.3``,
    ``lips=3.0``, ``rho=0.5``.

    Paper: Deng, Cheng & Lan, https://arxiv.org/abs/1810.00553.
    """

    length: ClassVar = staticmethod(a2grad_exp)
    averages: ClassVar = ("v_kk", "v_k")

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1.0,
        beta: Nonnegative = 10.0,
        lips: Positive = 10.0,
        rho: Fraction = 0.5,
        weight_decay: Nonnegative = 0.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)
