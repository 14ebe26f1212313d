"""NovoGrad: the second moment is one value for each parameter tensor, of its gradient's norm."""

from __future__ import annotations

from typing import Any

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule
from oput_dist.kernels.math import square_terms
from oput_dist.kernels.stage import WHOLE, Decay, Measure, Update, Vectors

__all__ = ["NovoGrad"]


def novograd_scale(sums: Any, vectors: Any, h: Any) -> tuple[Any, Any]:
    """The second moment, which begins as the first square; one over its root; the largest so far, if that is kept."""
    squares, _count, step = sums
    v = torch.where(step > 1, torch.lerp(vectors[0], squares, h.weight2), squares)
    moments = (v, *(torch.maximum(largest, v) for largest in vectors[1:]))
    return moments, (1.0 / (moments[-1].sqrt() + h.eps),)


@rule
def novograd(p, g, state, h, c):
    (m,) = state
    (scale,) = c
    m = h.beta1 * m + h.gain * (g * scale + h.weight_decay * p)
    return p - h.lr * m, (m,)


class NovoGrad(Optimizer):
    r"""NovoGrad: momentum of gradients that are normalized tensor by tensor.

    .. math::
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) \lVert g_t \rVert^2 \quad (v_1 = \lVert g_1 \rVert^2) \\
        m_t &= \beta_1 m_{t-1} + \Bigl(\frac{g_t}{\sqrt{v_t} + \epsilon} + \lambda p_{t-1}\Bigr), \qquad
        p_t = p_{t-1} - \eta m_t

    with the new direction times :math:`1 - \beta_1` under ``grad_averaging``. Norms run over the whole parameter,
    whatever its sharding.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.95, 0.98).
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`, inside the momentum; with ``decouple_lr`` outside of it. Default 0.
        grad_averaging: see above. Default False.
        amsgrad: divide by the root of the largest :math:`v` so far. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class N: one packed all-reduce a step. State: 4 bytes per parameter (fp32), and one value for each tensor,
    with amsgrad two, the same on all ranks.

    When: large batches with little memory for state, as in speech recognition. Start: ``lr=1e-2``,
    ``betas=(0.95, 0.98)``.

    Paper: Ginsburg et al., https://arxiv.org/abs/1905.11286.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.95, 0.98),
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        grad_averaging: bool = False,
        amsgrad: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        squares = Measure(square_terms, (WHOLE,), writes_state=False)
        moments = ("exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg_sq",)
        return Recipe(
            (squares, Update(novograd, Vectors(novograd_scale, (WHOLE,)))),
            ("exp_avg",),
            Decay.SHRINK if group["decouple_lr"] else Decay.NONE,
            tuple((name, WHOLE) for name in moments),
        )

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        return row_of(
            lr=group["lr"],
            beta1=beta1,
            weight2=1 - beta2,
            # Of the new direction in the momentum: 1, or one less beta1.
            gain=1 - beta1 if group["grad_averaging"] else 1.0,
            eps=group["eps"],
            weight_decay=0.0 if group["decouple_lr"] else group["weight_decay"],
        )
