"""AdEMAMix: Adam with a second, much slower momentum."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas3, Nonnegative, PositiveInteger, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, lerp
from oput_dist.kernels.stage import Decay, Update

__all__ = ["AdEMAMix"]


@rule
def ademamix(p, g, state, h):
    m, v, slow = state
    m, v = adam_moments(g, m, v, h)
    slow = lerp(slow, g, h.weight3)
    u = (m * h.correct1 + h.alpha * slow) / (tl.sqrt(v) * h.root + h.eps)
    return p - h.lr * u, (m, v, slow)


def memory(beta: float) -> float:
    """The time constant of a moving average, in steps."""
    return -1 / math.log(beta) if beta > 0 else 0.0


def warmed(beta1: float, beta3: float, share: float) -> float:
    """Between the betas, at a share of the warm-up, so that the time constant grows linearly; never above beta3."""
    steps = (1 - share) * memory(beta1) + share * memory(beta3)
    return min(math.exp(-1 / steps), beta3) if steps > 0 else 0.0


class AdEMAMix(Optimizer):
    r"""AdEMAMix: AdamW with a mixture of a fast and a slow average of gradients.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad s_t = \beta_3^{(t)} s_{t-1} + (1 - \beta_3^{(t)}) g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= (1 - \eta\lambda) p_{t-1} - \eta
            \frac{m_t / (1 - \beta_1^t) + \alpha^{(t)} s_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} \\
        \alpha^{(t)} &= \alpha \min(t / T, 1), \qquad
        \beta_3^{(t)} = \min\Bigl(\exp\frac{\ln\beta_1 \ln\beta_3}
            {(1 - t / T) \ln\beta_3 + (t / T) \ln\beta_1},\; \beta_3\Bigr) \text{ while } t < T

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2, \beta_3)`, each in [0, 1): of the fast momentum, the second moment and the slow
            momentum. Default (0.9, 0.999, 0.9999).
        alpha: weight :math:`\alpha \ge 0` of the slow momentum. Default 5.
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        T_alpha_beta3: steps :math:`T` of the warm-up of :math:`\alpha` and :math:`\beta_3`, an integer >= 1; the paper
            takes the whole run. Default None: no warm-up.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 12 bytes per parameter (fp32).

    When: long runs of language models, where gradients of thousands of steps ago still help.
    Start: ``lr=1e-3``, ``betas=(0.9, 0.99, 0.99)``, ``alpha=2.0``, ``T_alpha_beta3=200``.

    Paper: Pagliardini et al., https://arxiv.org/abs/2409.03137.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas3 = (0.9, 0.999, 0.9999),
        alpha: Nonnegative = 5.0,
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        T_alpha_beta3: PositiveInteger | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        return Recipe((Update(ademamix),), ("exp_avg", "exp_avg_sq", "exp_avg_slow"), Decay.SHRINK)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2, beta3 = group["betas"]
        share = 1.0 if group["T_alpha_beta3"] is None else min(step / group["T_alpha_beta3"], 1.0)
        return row_of(
            lr=group["lr"],
            weight1=1 - beta1,
            weight2=1 - beta2,
            weight3=1 - (beta3 if share == 1 else warmed(beta1, beta3, share)),
            # One over the fast momentum's bias correction.
            correct1=1 / (1 - beta1**step),
            alpha=group["alpha"] * share,
            # One over the square root of the second moment's bias correction.
            root=1 / math.sqrt(1 - beta2**step),
            eps=group["eps"],
        )
