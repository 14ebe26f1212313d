"""Adan: adaptive Nesterov momentum."""

from __future__ import annotations

import math
import warnings
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Betas3, Nonnegative, betas3, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import Decay, Update

__all__ = ["Adan"]


@rule
def adan(p, g, state, h):
    m, d, n, previous = state
    change = (g - previous) * h.started
    m = lerp(m, g, h.weight1)
    d = lerp(d, change, h.weight2)
    ahead = g + h.beta2 * change
    n = lerp(n, ahead * ahead, h.weight3)
    u = (m * h.correct1 + d * h.correct2) / (tl.sqrt(n) * h.root + h.eps)
    return (p - h.lr * u) / h.prox, (m, d, n, g)


def of_old_values(betas: Any) -> Any:
    """Betas as weights of the old value. All in (0, 0.5), they were meant as weights of the new one."""
    if betas3(betas) is not None or not all(0 < beta < 0.5 for beta in betas):
        return betas
    old = tuple(1 - beta for beta in betas)
    warnings.warn(
        f"Adan: betas={tuple(betas)} are taken as weights of the new value; here betas are weights of the old value: "
        f"write betas={old}",
        stacklevel=4,
    )
    return old


class AdanCommon(Common, total=False):
    """What optimi calls ``no_prox``."""

    adam_wd: bool


class Adan(Optimizer):
    r"""Adan. Betas are the weights of the **old** value, as in the authors' code.

    .. math::
        \Delta_t &= g_t - g_{t-1} \quad (\Delta_1 = 0) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad d_t = \beta_2 d_{t-1} + (1 - \beta_2) \Delta_t \\
        n_t &= \beta_3 n_{t-1} + (1 - \beta_3) (g_t + \beta_2 \Delta_t)^2 \\
        u_t &= \frac{m_t / (1 - \beta_1^t) + \beta_2 d_t / (1 - \beta_2^t)}{\sqrt{n_t / (1 - \beta_3^t)} + \epsilon} \\
        p_t &= \frac{p_{t-1} - \eta u_t}{1 + \eta\lambda}

    With ``no_prox`` the decay comes first, as in AdamW: :math:`p_t = (1 - \eta\lambda) p_{t-1} - \eta u_t`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3; often five to ten times AdamW's.
        betas: :math:`(\beta_1, \beta_2, \beta_3)`, each in [0, 1). Default (0.98, 0.92, 0.99). All in (0, 0.5)
            they are taken as weights of the new value, converted, and a warning says so.
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`. Default 0; the paper uses 0.02.
        no_prox: decay before the update in place of the proximal form. Default False. Also taken under the name
            ``adam_wd``.
        **common: see :class:`oput_dist.engine.Common`; the paper clips by ``max_grad_norm``.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication (one all-reduce with ``max_grad_norm``). State: 16 bytes per parameter (fp32).

    When: vision and language models with learning rates of five to ten times AdamW's. Start: ``lr=5e-3``,
    ``betas=(0.98, 0.92, 0.99)``.

    Paper: Xie et al., https://arxiv.org/abs/2208.06677.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas3 = (0.98, 0.92, 0.99),
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        no_prox: bool = False,
        **common: Unpack[AdanCommon],
    ) -> None:
        betas, no_prox = of_old_values(betas), common.pop("adam_wd", False) or no_prox
        super().__init__(params, hyperparameters(locals()), common)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and "betas" in param_group:
            param_group["betas"] = of_old_values(param_group["betas"])
        if isinstance(param_group, dict) and "adam_wd" in param_group:
            param_group["no_prox"] = param_group.pop("adam_wd")
        super().add_param_group(param_group)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        decay = Decay.SHRINK if group["no_prox"] else Decay.NONE
        return Recipe((Update(adan),), ("exp_avg", "exp_avg_diff", "exp_avg_sq", "previous_grad"), decay)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2, beta3 = group["betas"]
        return row_of(
            lr=group["lr"],
            weight1=1 - beta1,
            weight2=1 - beta2,
            weight3=1 - beta3,
            # 0 at the first step, which has no previous gradient; 1 later.
            started=0.0 if step == 1 else 1.0,
            beta2=beta2,
            # One over the bias correction of the gradient average.
            correct1=1 / (1 - beta1**step),
            # beta2 over the bias correction of the difference average.
            correct2=beta2 / (1 - beta2**step),
            root=1 / math.sqrt(1 - beta3**step),
            eps=group["eps"],
            # What the parameter is divided by after the update.
            prox=1.0 if group["no_prox"] else 1 + decay_rate(group),
        )
