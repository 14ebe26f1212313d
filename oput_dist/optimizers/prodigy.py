"""Prodigy and DAdaptAdam: Adam that estimates its own learning rate, from how far the parameters have to go."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Allowed, Betas, Fraction, Nonnegative, Positive, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, lerp
from oput_dist.kernels.stage import WHOLE, Apply, Decay, Joint, Measure

from .jointly import Jointly

__all__ = ["DAdaptAdam", "Prodigy"]


def bounded(value: Any) -> str | None:
    """What ``growth_rate`` may be."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1
    return None if ok else "a number >= 1, math.inf for no bound"


Growth = Annotated[float, Allowed(bounded)]


# Prodigy


@rule
def prodigy_moments(p, g, state, h):
    m, v, s, p0 = state
    p0 = tl.where(h.first > 0, p, p0)
    m, v = adam_moments(h.d * g, m, v, h)
    s = h.beta3 * s + h.d / h.d0 * h.d * tl.where(h.lr > 0, h.gain, 0.0) * g
    return (m, v, s, p0), (h.lr * g * (p0 - p), tl.abs(s))


def prodigy_estimate(totals: Any, kept: Any, h: Any) -> tuple[Any, Any]:
    """The new estimate; without any progress all stays as it is."""
    along, size, _numel = totals.unbind()
    d, none = kept["d"], size == 0
    numerator = h.beta3 * kept["d_numerator"] + d / h.d0 * d * along
    found = h.d_coef * numerator / torch.where(none, torch.ones_like(size), size)
    largest = torch.maximum(kept["d_max"], found)
    grown = torch.minimum(largest, h.growth_rate * torch.where(d == h.d0, torch.maximum(d, found), d))
    new = {"d": grown, "d_max": largest, "d_numerator": numerator}
    new = {name: torch.where(none, kept[name], value) for name, value in new.items()}
    return new, (new["d"],)


@rule
def prodigy_apply(p, g, state, h, c):
    m, v, _s, _p0 = state
    (d,) = c
    return p * (1.0 - h.d * h.decay) - h.d * h.lr * m / (tl.sqrt(v) + d * h.eps)


# D-Adaptation


@rule
def dadapt_moments(p, g, state, h):
    m, v, s = state
    along = h.layer_scale * h.lr * g * s / (tl.sqrt(v) + h.eps)
    step = h.d * h.lr * g
    m = lerp(m, h.layer_scale * step, h.weight1)
    s = lerp(s, step, h.weight3)
    return (m, lerp(v, g * g, h.weight2), s), (along, h.layer_scale * tl.abs(s))


def dadapt_estimate(totals: Any, kept: Any, h: Any) -> tuple[Any, Any]:
    """The new estimate, which never falls; without any progress all stays as it is."""
    along, size, _numel = totals.unbind()
    d, none = kept["d"], size == 0
    weighted = (1 - h.weight3) * kept["numerator_weighted"] + h.weight3 * d * along
    found = weighted / (h.weight3 * torch.where(none, torch.ones_like(size), size))
    new = {"d": torch.maximum(d, torch.minimum(found, d * h.growth_rate)), "numerator_weighted": weighted}
    return {name: torch.where(none, kept[name], value) for name, value in new.items()}, (d,)


@rule
def dadapt_apply(p, g, state, h, c):
    m, v, _s = state
    return p * (1.0 - h.d * h.decay) - m / (tl.sqrt(v) + h.eps)


class _Estimating(Jointly):
    """What Prodigy and DAdaptAdam have in common."""

    def _decay(self, group: Group) -> Decay:
        """With ``decouple_lr``, decay takes no account of the estimate either."""
        if group["decouple_lr"]:
            return Decay.SHRINK
        return Decay.NONE if group["decouple"] else Decay.L2

    def _corrected(self, group: Group, step: int) -> tuple[Any, Any]:
        """Learning rate and decoupled decay, both over ``d``."""
        beta1, beta2 = group["betas"]
        correction = math.sqrt(1 - beta2**step) / (1 - beta1**step) if group["use_bias_correction"] else 1.0
        decays = group["decouple"] and not group["decouple_lr"]
        return group["lr"] * correction, decay_rate(group) * correction if decays else 0.0


class Prodigy(_Estimating):
    r"""Prodigy: Adam whose learning rate is ``lr`` times an estimate :math:`d` of the distance to the solution.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) d_t g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) d_t^2 g_t^2 \\
        r_t &= \beta_3 r_{t-1} + \tfrac{d_t^2}{d_0} \eta \langle g_t, p_0 - p_{t-1} \rangle, \qquad
        s_t = \beta_3 s_{t-1} + \tfrac{d_t^2}{d_0} \eta g_t, \qquad
        \hat d_{t+1} = c\, r_t / \lVert s_t \rVert_1 \\
        d_{t+1} &= \min\bigl(\max_{i \le t+1} \hat d_i,\; \gamma d_t\bigr) \qquad
        (d_1 = d_0 \text{, which counts among the } \hat d_i) \\
        p_t &= (1 - d_t \eta \lambda) p_{t-1} - d_t \eta \frac{m_t}{\sqrt{v_t} + d_{t+1} \epsilon}

    As long as :math:`d_t = d_0`, the larger of it and :math:`\hat d_{t+1}` takes its place in the bound. Sums run over
    all parameters of all groups, whatever their sharding. There is one :math:`d` for all, which each group keeps as
    ``group["d"]``; each group's own learning rate enters its own steps and its terms of the sums, and
    :math:`\beta_3` is the first group's.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: :math:`\eta \ge 0`, the factor of the estimate; where a schedule begins. Default 1.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        beta3: :math:`\beta_3` in [0, 1). Default None: :math:`\sqrt{\beta_2}`.
        eps: :math:`\epsilon > 0`. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`. With ``decouple_lr`` the decay takes no account of :math:`d`. Default 0.
        decouple: decoupled weight decay; False for L2. Default True.
        use_bias_correction: multiply :math:`\eta` by Adam's bias corrections,
            :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`. Default False.
        safeguard_warmup: leave :math:`\eta` out of :math:`s`, for schedules that warm up. Default False.
        d0: the first estimate :math:`d_0 > 0`, far too small rather than too large. Default 1e-6.
        d_coef: the factor :math:`c > 0` of the estimate: the means to tune the method. Default 1.
        growth_rate: the bound :math:`\gamma \ge 1` of the estimate's growth in a step. Default infinity: none.
        **common: see :class:`oput_dist.engine.Common`. Clipping by ``max_grad_norm`` changes the estimate.

    Raises:
        ValueError: for a value out of range, and for a group whose ``beta3``, ``d0``, ``d_coef`` or ``growth_rate``
            is not the first's.

    Sharding class G: one packed all-reduce a step. State: 16 bytes per parameter (fp32), and three scalars that are
    kept in the parameter groups.

    When: no time or no wish to search for a learning rate; leave lr at 1, with a cosine schedule.
    Start: ``lr=1.0``, ``betas=(0.9, 0.99)``, ``d0=1e-5``, ``d_coef=0.5``.

    Paper: Mishchenko & Defazio, https://arxiv.org/abs/2306.06101.
    """

    shared: ClassVar[tuple[str, ...]] = ("beta3", "d0", "d_coef", "growth_rate")

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1.0,
        betas: Betas = (0.9, 0.999),
        beta3: Fraction | None = None,
        eps: Positive = 1e-8,
        weight_decay: Nonnegative = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: Positive = 1e-6,
        d_coef: Positive = 1.0,
        growth_rate: Growth = math.inf,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def running(self, group: Group) -> dict[str, float]:
        return {"d": group["d0"], "d_max": group["d0"], "d_numerator": 0.0}

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        stages = (Measure(prodigy_moments, (WHOLE,) * 2), Apply(prodigy_apply, Joint(prodigy_estimate)))
        state = ("exp_avg", "exp_avg_sq", "s", "p0")
        return Recipe(stages, state, self._decay(group), kept=tuple(self.running(group)))

    def scalars(self, group: Group, step: int) -> Any:
        first, (beta1, beta2), (lr, decay) = self.param_groups[0], group["betas"], self._corrected(group, step)
        return row_of(
            # The estimate before this step.
            d=group["d"],
            d0=first["d0"],
            # Learning rate, with Adam's bias corrections if they are wanted; times ``d`` it is the step.
            lr=lr,
            weight1=1 - beta1,
            weight2=1 - beta2,
            beta3=math.sqrt(first["betas"][1]) if first["beta3"] is None else first["beta3"],
            # Of the gradient in the sum of gradients: ``lr``, or 1 with a safeguard for warm-up.
            gain=1.0 if group["safeguard_warmup"] else lr,
            eps=group["eps"],
            # What decoupled decay takes from the parameter, over ``d``.
            decay=decay,
            d_coef=first["d_coef"],
            growth_rate=first["growth_rate"],
            # 1 at the first step, else 0.
            first=float(step == 1),
        )


class DAdaptAdam(_Estimating):
    r"""Adam with D-Adaptation: its learning rate is ``lr`` times an estimate :math:`d` that never falls.

    .. math::
        \hat d_{t+1} &= \frac{r_t}{(1 - \sqrt{\beta_2}) \lVert s_t \rVert_1}, \qquad
        r_t = \sqrt{\beta_2}\, r_{t-1} + (1 - \sqrt{\beta_2})\, d_t \eta
            \Bigl\langle g_t, \frac{s_{t-1}}{\sqrt{v_{t-1}} + \epsilon} \Bigr\rangle \\
        s_t &= \sqrt{\beta_2}\, s_{t-1} + (1 - \sqrt{\beta_2})\, d_t \eta g_t, \qquad
        d_{t+1} = \max\bigl(d_t, \min(\hat d_{t+1}, \gamma d_t)\bigr) \\
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) d_t \eta g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2 \\
        p_t &= p_{t-1} - \frac{m_t}{\sqrt{v_t} + \epsilon}

    where :math:`g_t` includes :math:`\lambda p_{t-1}`, or the parameter shrinks by :math:`1 - d_t \eta \lambda`
    (``decouple``). Sums run over all parameters of all groups, whatever their sharding. There is one :math:`d` for
    all, which each group keeps as ``group["d"]``; :math:`\sqrt{\beta_2}` is the first group's in all but :math:`v`. To
    give groups other rates, set ``layer_scale`` of a group: it multiplies the group's terms of :math:`m`, of
    :math:`r` and of the norm of :math:`s`.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: :math:`\eta \ge 0`, the factor of the estimate; where a schedule begins. Default 1.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon > 0`. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`. With ``decouple_lr`` the decay takes no account of :math:`d`. Default 0.
        decouple: decoupled weight decay in place of L2. Default False.
        use_bias_correction: multiply :math:`\eta` by Adam's bias corrections,
            :math:`\sqrt{1 - \beta_2^t} / (1 - \beta_1^t)`. Default False.
        d0: the first estimate :math:`d_0 > 0`, far too small rather than too large. Default 1e-6.
        growth_rate: the bound :math:`\gamma \ge 1` of the estimate's growth in a step. Default infinity: none.
        layer_scale: the factor > 0 of a group's rate. Default 1.
        **common: see :class:`oput_dist.engine.Common`. Clipping by ``max_grad_norm`` changes the estimate.

    Raises:
        ValueError: for a value out of range, and for a group whose ``d0`` or ``growth_rate`` is not the first's.

    Sharding class G: one packed all-reduce a step. State: 12 bytes per parameter (fp32), and two scalars that are kept
    in the parameter groups.

    When: no time or no wish to search for a learning rate, with less state than Prodigy; leave lr at 1.
    Start: ``lr=1.0``, ``betas=(0.9, 0.99)``, ``d0=1e-5``, ``decouple=True``, ``use_bias_correction=True``.

    Paper: Defazio & Mishchenko, https://arxiv.org/abs/2301.07733.
    """

    shared: ClassVar[tuple[str, ...]] = ("d0", "growth_rate")

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1.0,
        betas: Betas = (0.9, 0.999),
        eps: Positive = 1e-8,
        weight_decay: Nonnegative = 0.0,
        decouple: bool = False,
        use_bias_correction: bool = False,
        d0: Positive = 1e-6,
        growth_rate: Growth = math.inf,
        layer_scale: Positive = 1.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def running(self, group: Group) -> dict[str, float]:
        return {"d": group["d0"], "numerator_weighted": 0.0}

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        stages = (Measure(dadapt_moments, (WHOLE,) * 2), Apply(dadapt_apply, Joint(dadapt_estimate)))
        state = ("exp_avg", "exp_avg_sq", "s")
        return Recipe(stages, state, self._decay(group), kept=tuple(self.running(group)))

    def scalars(self, group: Group, step: int) -> Any:
        first, (beta1, beta2), (lr, decay) = self.param_groups[0], group["betas"], self._corrected(group, step)
        return row_of(
            d=group["d"],
            # Learning rate, with Adam's bias corrections if they are wanted; times ``d`` it is the step.
            lr=lr,
            weight1=1 - beta1,
            weight2=1 - beta2,
            # Of the new gradient in the average of gradients.
            weight3=1 - math.sqrt(first["betas"][1]),
            eps=group["eps"],
            # What decoupled decay takes from the parameter, over ``d``.
            decay=decay,
            layer_scale=group["layer_scale"],
            growth_rate=first["growth_rate"],
        )
