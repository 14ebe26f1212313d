"""Ranger: RAdam with lookahead and gradient centralisation; RangerAdaBelief, with AdaBelief's second moment."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Allowed, Betas, Nonnegative, PositiveInteger, Share, hyperparameters, number
from oput_dist.kernels.language import Rule, rule, tl
from oput_dist.kernels.math import adam_moments, lerp, lookahead
from oput_dist.kernels.stage import Decay

from .advice import warn_once
from .centralize import centralized
from .scalars import WHY_NO_ACCUMULATION, WHY_NOT_CAUTIOUS, lookahead_scalars, rectification

__all__ = ["Ranger", "RangerAdaBelief"]


@rule
def ranger(p, g, state, h):
    m, v, slow = state
    m, v = adam_moments(g + h.l2 * p, m, v, h)
    u = tl.where(h.adaptive > 0, m / (tl.sqrt(v) + h.eps), m)
    p, slow = lookahead(p, p * h.keep - h.lr * u, slow, h)
    return p, (m, v, slow)


@rule
def ranger_centred(p, g, state, h, c):
    (mean,) = c
    return ranger(p, g - mean, state, h)


@rule
def ranger_belief(p, g, state, h):
    m, s, slow = state
    m = lerp(m, g, h.weight1)
    s = lerp(s, (g - m) * (g - m), h.weight2) + h.adaptive * h.eps
    u = tl.where(h.adaptive > 0, m / (tl.sqrt(s) + h.eps), m)
    p, slow = lookahead(p, p * h.keep - h.lr * u, slow, h)
    return p, (m, s, slow)


@rule
def ranger_belief_centred(p, g, state, h, c):
    (mean,) = c
    return ranger_belief(p, g - mean, state, h)


def threshold(value: Any) -> str | None:
    """What the length of the moving average must exceed; from 4 on the rectification is a real number."""
    return None if number(value) is None and value >= 4 else "a finite number >= 4"


Threshold = Annotated[float, Allowed(threshold)]


class RangerCommon(Common, total=False):
    """Spellings of ``n_sma_threshold`` in other implementations."""

    N_sma_threshhold: float
    n_sma_threshhold: float


class Respelled(Optimizer):
    """Takes these spellings in parameter groups too."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        for name in ("N_sma_threshhold", "n_sma_threshhold"):
            if isinstance(param_group, dict) and name in param_group:
                param_group["n_sma_threshold"] = param_group.pop(name)
        super().add_param_group(param_group)


class Ranger(Respelled):
    r"""Ranger: RAdam's moments of the centralised gradient, inside lookahead.

    .. math::
        \bar g_t &= g_t - \operatorname{mean}_\text{row}(g_t), \qquad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) \bar g_t, \qquad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \bar g_t^2 \\
        u_t &= \frac{R_t \sqrt{1 - \beta_2^t}}{1 - \beta_1^t} \frac{m_t}{\sqrt{v_t} + \epsilon}
            \quad\text{if } r_t > n, \text{ else } \frac{m_t}{1 - \beta_1^t}, \qquad
        p_t = (1 - \eta\lambda) p_{t-1} - \eta u_t \\
        x_t &= x_{t-1} + \alpha (p_t - x_{t-1}), \quad p_t \leftarrow x_t \qquad \text{every } k \text{ steps}

    with RAdam's rectification :math:`R_t` and length :math:`r_t` of the moving average; slow weights begin as
    :math:`x_0 = p_0`. A row is a slice along the first axis; vectors and scalars are not centralised. An element whose
    gradient is missing counts as zero in the mean of its row.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.95, 0.999).
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        eps: :math:`\epsilon \ge 0`, beside the root of the moment without bias correction. Default 1e-5.
        k: steps between two synchronisations of slow and fast weights, an integer >= 1. Default 6.
        alpha: :math:`\alpha` in (0, 1]. Default 0.5.
        decouple_wd: decoupled weight decay, at every step; else L2, added to the centralised gradient. Default True.
        use_gc: centralise gradients. Default True.
        gc_conv_only: only those with more than three axes. Default False.
        n_sma_threshold: the length :math:`n \ge 4` from which on the second moment is used. Default 5. Also taken
            under the names ``N_sma_threshhold`` and ``n_sma_threshhold``.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class R: one packed all-reduce a step; without ``use_gc`` class E: no communication. State: 12 bytes per
    parameter (fp32).

    When: small data sets and short runs of vision models, where RAdam's start without warm-up and lookahead's averaging
    make the learning rate less critical. Start: ``lr=1e-2``, ``betas=(0.95, 0.99)``.

    Paper: Wright, https://github.com/lessw2020/Ranger-Deep-Learning-Optimizer; RAdam: Liu et al.,
    https://arxiv.org/abs/1908.03265; lookahead: Zhang et al., https://arxiv.org/abs/1907.08610; centralisation: Yong
    et al., https://arxiv.org/abs/2004.01461.
    """

    rules: ClassVar[tuple[Rule, Rule]] = (ranger, ranger_centred)
    l2_first: ClassVar[bool] = False
    """Whether L2 decay is centralised too."""

    why_not_cautious = WHY_NOT_CAUTIOUS
    why_no_accumulation = WHY_NO_ACCUMULATION

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-3,
        betas: Betas = (0.95, 0.999),
        weight_decay: Nonnegative = 0.0,
        eps: Nonnegative = 1e-5,
        k: PositiveInteger = 6,
        alpha: Share = 0.5,
        decouple_wd: bool = True,
        use_gc: bool = True,
        gc_conv_only: bool = False,
        n_sma_threshold: Threshold = 5.0,
        **common: Unpack[RangerCommon],
    ) -> None:
        n_sma_threshold = common.pop("N_sma_threshhold", common.pop("n_sma_threshhold", n_sma_threshold))
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        decay = Decay.L2 if self.l2_first and is_coupled(group) else Decay.NONE
        return Recipe(centralized(group, shape, *self.rules), ("exp_avg", "exp_avg_sq", "slow_buffer"), decay)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        rectified = rectification(beta2, step, group["n_sma_threshold"])
        first, pull = lookahead_scalars(step, group["k"], group["alpha"])
        return row_of(
            # Over the first moment's bias correction; in the adaptive phase times the rectification and the root of the
            # second moment's.
            lr=group["lr"] * (1.0 if rectified is None else rectified * math.sqrt(1 - beta2**step)) / (1 - beta1**step),
            weight1=1 - beta1,
            weight2=1 - beta2,
            eps=group["eps"],
            # 1 once the second moment is usable, 0 before.
            adaptive=float(rectified is not None),
            # What decoupled decay leaves of the parameter.
            keep=1.0 if is_coupled(group) else 1 - decay_rate(group),
            l2=group["weight_decay"] if is_coupled(group) and not self.l2_first else 0.0,
            first=first,
            pull=pull,
        )


def is_coupled(group: Group) -> bool:
    """Whether weight decay is part of the gradient."""
    return not (group["decouple_wd"] or group["decouple_lr"])


class RangerAdaBelief(Ranger):
    r"""RangerAdaBelief: :class:`Ranger` whose second moment is that of the gradient's distance from its average.

    .. math::
        s_t = \beta_2 s_{t-1} + (1 - \beta_2) (\bar g_t - m_t)^2 + \epsilon

    in place of :math:`v_t`; :math:`\epsilon` is added at the steps that use it, and stays in the moment. So it grows
    towards :math:`\epsilon / (1 - \beta_2)`: what is meant by an :math:`\epsilon` of Adam's is about its square here.
    L2 decay (``decouple_wd=False``) is centralised with the gradient. Decoupled decay is :class:`Ranger`'s; the
    reference scaled it by the rectified step and, in the first steps, added it to the momentum.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 1e-3.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.95, 0.999).
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        eps: :math:`\epsilon \ge 0`: 1e-8 for vision models, 1e-16 for language models; above 1e-5 a warning says that
            little of the adaptation is left. Default 1e-5.
        k: steps between two synchronisations of slow and fast weights, an integer >= 1. Default 6.
        alpha: :math:`\alpha` in (0, 1]. Default 0.5.
        decouple_wd: decoupled weight decay, at every step; else L2, part of the gradient. Default True.
        use_gc: centralise gradients. Default True.
        gc_conv_only: only those with more than three axes. Default False.
        n_sma_threshold: the length :math:`n \ge 4` from which on the second moment is used. Default 5. Also taken
            under the names ``N_sma_threshhold`` and ``n_sma_threshhold``.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.

    Sharding class R: one packed all-reduce a step; without ``use_gc`` class E: no communication. State: 12 bytes per
    parameter (fp32).

    When: where Ranger is used and gradients are steady, so that steps may be longer than Adam's. Start: ``lr=1e-2``,
    ``betas=(0.9, 0.99)``, ``eps=1e-16``.

    Paper: Zhuang et al., https://arxiv.org/abs/2010.07468; https://github.com/juntang-zhuang/Adabelief-Optimizer.
    """

    rules: ClassVar[tuple[Rule, Rule]] = (ranger_belief, ranger_belief_centred)
    l2_first: ClassVar[bool] = True

    def complete(self, group: dict[str, Any]) -> None:
        super().complete(group)
        warn_once(
            self,
            lambda group: group["eps"] > 1e-5,
            f"eps={group['eps']!r} is added to the second moment at every step, which leaves little of the adaptation: "
            "write eps=1e-8 for vision models, eps=1e-16 for language models",
            deeper=1,
        )
