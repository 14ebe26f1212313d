"""RAdam: Adam that steps like SGD until its second moment can be trusted."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, hyperparameters
from oput_dist.kernels.stage import Decay, Update

from .adam import adam
from .scalars import rectification

__all__ = ["RAdam"]


def rectified(group: Group, step: int, warm: float = 1.0) -> tuple[Any, float, float]:
    """``lr``, ``root`` and ``eps`` of a rectified step, for a rule that divides by ``sqrt(v) * root + eps``.

    While the second moment has no usable variance the divisor is 1, and ``lr`` is that of the momentum times ``warm``.
    """
    beta1, beta2 = group["betas"]
    factor, lr = rectification(beta2, step), group["lr"] / (1 - beta1**step)
    if factor is None:
        return lr * warm, 0.0, 1.0
    return lr * (factor * math.sqrt(1 - beta2**step)), 1.0, group["eps"]


class RAdam(Optimizer):
    r"""RAdam, rectified Adam, as in ``torch.optim.RAdam``.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        \rho_\infty &= \frac{2}{1 - \beta_2} - 1, \qquad
        \rho_t = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t}, \qquad
        r_t = \sqrt{\frac{(\rho_t - 4)(\rho_t - 2) \rho_\infty}{(\rho_\infty - 4)(\rho_\infty - 2) \rho_t}} \\
        p_t &= p_{t-1} - \eta \frac{m_t}{1 - \beta_1^t} \cdot
            \begin{cases} r_t \sqrt{1 - \beta_2^t} / (\sqrt{v_t} + \epsilon) & \rho_t > 5 \\ 1 & \text{else}
            \end{cases}

    where :math:`g_t` includes :math:`\lambda p_{t-1}`, or the parameter shrinks by :math:`1 - \eta\lambda` first
    (``decoupled_weight_decay``). With :math:`\beta_2 = 0.999` the first five steps are those of momentum SGD.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        decoupled_weight_decay: decoupled weight decay in place of L2. Default False.
        decouple_wd: the same, under optimi's name. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 8 bytes per parameter (fp32).

    When: in place of Adam where a warm-up of the learning rate is not wanted.
    Start: ``lr=3e-3``, ``betas=(0.9, 0.99)``.

    Paper: Liu et al., https://arxiv.org/abs/1908.03265.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        decoupled_weight_decay: bool = False,
        decouple_wd: bool = False,
        **common: Unpack[Common],
    ) -> None:
        if decoupled_weight_decay is False:
            decoupled_weight_decay = decouple_wd
        super().__init__(params, hyperparameters(locals(), "decouple_wd"), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        decay = Decay.SHRINK if group["decoupled_weight_decay"] else Decay.L2
        return Recipe((Update(adam),), ("exp_avg", "exp_avg_sq"), decay)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        lr, root, eps = rectified(group, step)
        return row_of(lr=lr, weight1=1 - beta1, weight2=1 - beta2, root=root, eps=eps)
