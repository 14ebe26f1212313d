"""AdaBelief: Adam that divides by how far gradients stray from their average."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import at_least, lerp
from oput_dist.kernels.stage import Decay, Update

from .advice import warn_once
from .radam import rectified

__all__ = ["AdaBelief"]


@rule
def belief_moments(g, m, s, h):
    m = lerp(m, g, h.weight1)
    surprise = g - m
    return m, lerp(s, surprise * surprise, h.weight2) + h.added


@rule
def adabelief(p, g, state, h):
    m, s = state
    m, s = belief_moments(g, m, s, h)
    return p * h.keep - h.lr * m / (tl.sqrt(s) * h.root + h.eps), (m, s)


@rule
def adabelief_amsgrad(p, g, state, h):
    m, s, largest = state
    m, s = belief_moments(g, m, s, h)
    largest = at_least(s, largest)
    return p * h.keep - h.lr * m / (tl.sqrt(largest) * h.root + h.eps), (m, s, largest)


class AdaBelief(Optimizer):
    r"""AdaBelief: steps are long where gradients are as their average let expect.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad
        s_t = \beta_2 s_{t-1} + (1 - \beta_2) (g_t - m_t)^2 + \epsilon \\
        p_t &= p_{t-1} - \eta \frac{m_t / (1 - \beta_1^t)}{\sqrt{s_t / (1 - \beta_2^t)} + \epsilon}

    or, with ``rectify``, the step of :class:`RAdam` with :math:`s_t` in place of :math:`v_t`. :math:`\epsilon` stays in
    the state, so it is about the square of Adam's.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. The authors advise 1e-16 for language, 1e-8 for vision and 1e-12 for reinforcement
            learning; from 1e-4 on there is a warning. Default 1e-16.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        amsgrad: divide by the root of the largest :math:`s` so far, with ``rectify`` too (where the authors' package
            leaves it without effect). Default False.
        weight_decouple: decoupled weight decay in place of L2. Default True.
        fixed_decay: decay by :math:`1 - \lambda`, whatever the learning rate; needs ``weight_decouple``. Default False.
        rectify: see above. Default True.
        degenerated_to_sgd: with ``rectify``, step like momentum SGD while the variance is not usable (the first five
            steps with :math:`\beta_2 = 0.999`); without, not at all. Default True.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class E: no communication. State: 8 bytes per parameter (fp32), with amsgrad 12.

    When: where Adam generalises worse than SGD, such as image classification and GANs.
    Start: ``lr=1e-3``, ``betas=(0.9, 0.99)``, ``eps=1e-16``.

    Paper: Zhuang et al., https://arxiv.org/abs/2010.07468.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-16,
        weight_decay: Nonnegative = 0.0,
        amsgrad: bool = False,
        weight_decouple: bool = True,
        fixed_decay: bool = False,
        rectify: bool = True,
        degenerated_to_sgd: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def complete(self, group: dict[str, Any]) -> None:
        super().complete(group)
        warn_once(
            self,
            lambda group: group["eps"] >= 1e-4,
            "eps=1e-4 and more drowns the variance that it is added to, and steps are nearly those of momentum SGD: "
            "write eps=1e-16, or 1e-8 for vision",
        )

    def check(self, group: Group) -> None:
        if group["fixed_decay"] and (not group["weight_decouple"] or group["decouple_lr"]):
            raise ValueError(
                f"AdaBelief: fixed_decay=True with weight_decouple={group['weight_decouple']} and "
                f"decouple_lr={group['decouple_lr']}: needs weight_decouple=True and decouple_lr=False"
            )

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        decay = Decay.NONE if group["fixed_decay"] else Decay.SHRINK if group["weight_decouple"] else Decay.L2
        if group["amsgrad"]:
            return Recipe((Update(adabelief_amsgrad),), ("exp_avg", "exp_avg_var", "max_exp_avg_var"), decay)
        return Recipe((Update(adabelief),), ("exp_avg", "exp_avg_var"), decay)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        lr, root, eps = group["lr"] / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), group["eps"]
        if group["rectify"]:
            lr, root, eps = rectified(group, step, warm=float(group["degenerated_to_sgd"]))
        keep = 1.0 - group["weight_decay"] if group["fixed_decay"] else 1.0
        return row_of(
            lr=lr,
            weight1=1 - beta1,
            weight2=1 - beta2,
            # To the variance, at every step: the hyperparameter eps.
            added=group["eps"],
            root=root,
            # The divisor is the root of the variance times ``root``, and ``eps``; 0 and 1 for a step of momentum SGD.
            eps=eps,
            # What fixed decay leaves of the parameter.
            keep=keep,
        )
