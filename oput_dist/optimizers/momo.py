"""Momo and MomoAdam: momentum with a step size that follows from the loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Params, Recipe, Shape, decay_rate, row_of
from oput_dist.engine.hyper import Betas, Fraction, Nonnegative, Number, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import adam_moments, lerp
from oput_dist.kernels.stage import WHOLE, Apply, Decay, JointWithLoss, Measure

from .jointly import Jointly

__all__ = ["Momo", "MomoAdam"]


@rule
def momo_average(p, g, state, h):
    (d,) = state
    d = lerp(d, g, h.weight)
    return (d,), (p * d, d * d, g * p)


def momo_step(totals: Any, kept: Any, h: Any, loss: Any) -> tuple[Any, Any]:
    """The step size from the model of the loss: ``min(lr / rho, max(gap, 0) / d_d)``."""
    p_d, d_d, g_p, _numel = totals.unbind()
    loss = loss * h.direction
    count = kept["updates"] + 1
    plain_first = (count == 1) & (h.bias_correction == 0)
    weight = torch.where(plain_first, torch.ones_like(count), torch.full_like(count, 1 - h.beta))
    loss_avg = torch.lerp(kept["loss_avg"], loss, weight)
    dot_avg = torch.lerp(kept["dot_avg"], g_p, weight)
    rho = 1 - h.beta**count if h.bias_correction else torch.ones_like(count)
    grow, fstar = 1 / h.shrink, kept["fstar"]
    if h.use_fstar:
        cap = grow * (loss_avg - dot_avg) + p_d
        lowered = torch.maximum(cap / (2 * grow * rho), torch.full_like(cap, h.lower_bound))
        fstar = torch.where(cap < grow * rho * fstar, lowered, fstar)
    gap = (grow * (loss_avg - rho * fstar - dot_avg) + p_d).clamp(min=0.0)
    longest = h.lr / rho
    tau = torch.where(d_d > 0, torch.minimum(longest, gap / torch.where(d_d > 0, d_d, 1.0)), longest)
    if h.use_fstar:
        estimate = (loss_avg + p_d - dot_avg - tau * d_d / 2) / rho
        fstar = torch.maximum(estimate, torch.full_like(estimate, h.lower_bound))
    return {"updates": count, "loss_avg": loss_avg, "dot_avg": dot_avg, "fstar": fstar}, (tau,)


@rule
def momo_apply(p, g, state, h, c):
    (d,) = state
    (tau,) = c
    return (p - tau * d) * h.shrink


@rule
def momo_adam_direction(m, v, h):
    return m / (tl.sqrt(v) * h.root + h.eps)


@rule
def momo_adam_moments(p, g, state, h):
    m, v = state
    m, v = adam_moments(g, m, v, h)
    return (m, v), (p * m, m * momo_adam_direction(m, v, h), g * p)


@rule
def momo_adam_apply(p, g, state, h, c):
    m, v = state
    (tau,) = c
    return p - tau * momo_adam_direction(m, v, h)


@rule
def momo_adam_prox(p, g, state, h, c):
    m, v = state
    (tau,) = c
    return (p - tau * momo_adam_direction(m, v, h)) * h.shrink


class _NeedsLoss(Jointly):
    """What Momo and MomoAdam have in common."""

    def running(self, group: Group) -> dict[str, float]:
        return {"updates": 0.0, "loss_avg": 0.0, "dot_avg": 0.0}

    def complete(self, group: dict[str, Any]) -> None:
        super().complete(group)
        group.setdefault("fstar", torch.tensor(float(group["lb"]), dtype=torch.float64))

    def step(self, closure: Callable[[], Any] | None = None, loss: torch.Tensor | float | None = None) -> Any:
        """Take one step, see :meth:`Optimizer.step`.

        Args:
            closure: computes the loss anew, with gradients; called once, and what it returns is the loss.
            loss: the mean loss of this rank's share of the batch, in place of a closure.

        Raises:
            ValueError: without either.
        """
        return self.run(closure, loss)


class Momo(_NeedsLoss):
    r"""Momo: momentum whose step is as long as the loss, and a lower bound of it, say that it should be.

    .. math::
        d_t &= \beta d_{t-1} + (1 - \beta) g_t, \qquad \bar f_t = \beta \bar f_{t-1} + (1 - \beta) f_t, \qquad
        \gamma_t = \beta \gamma_{t-1} + (1 - \beta) \langle g_t, p_{t-1} \rangle \\
        \tau_t &= \min\Bigl(\frac{\eta}{\rho_t},
            \frac{\max\bigl(A (\bar f_t - \rho_t f^* - \gamma_t) + \langle p_{t-1}, d_t \rangle, 0\bigr)}
            {\lVert d_t \rVert^2}\Bigr), \qquad A = 1 + \eta\lambda \\
        p_t &= (p_{t-1} - \tau_t d_t) / A

    Averages begin with the first values, and :math:`\rho_t = 1`; or with zero, and :math:`\rho_t = 1 - \beta^t`
    (``bias_correction``). Inner products run over all parameters of all groups, whatever their sharding; each group's
    own learning rate is the cap of its step.

    ``step`` needs the batch loss: ``step(closure)`` or, after ``loss.backward()``, ``step(loss=loss)``. The loss is
    averaged over ``data_group``, by default all ranks: each rank must give the mean over its share of the batch.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: the largest step :math:`\eta \ge 0`. Default 1. At 1e-2 or less, nearly every step is the largest: then it
            is SGD with momentum, and a warning says so.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        beta: :math:`\beta` in [0, 1). Default 0.9.
        lb: a lower bound :math:`f^*` of the loss. Default 0.
        bias_correction: see above. Default False.
        use_fstar: estimate :math:`f^*` on the way, never below ``lb``. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range, or a step without the loss.

    Sharding class G: one packed all-reduce a step. State: 4 bytes per parameter (fp32), and four scalars that are kept
    in the parameter groups.

    When: models that SGD trains well, where the learning rate should need little search and a lower bound of the loss
    is known. Start: ``lr=1.0``, ``beta=0.9``.

    Paper: Schaipp et al., https://arxiv.org/abs/2305.07583.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1.0,
        weight_decay: Nonnegative = 0.0,
        beta: Fraction = 0.9,
        lb: Number = 0.0,
        bias_correction: bool = False,
        use_fstar: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)
        if isinstance(lr, float) and 0 < lr <= 1e-2:
            warnings.warn(
                f"Momo: lr={lr!r} is the largest step, and so small a one that nearly every step will be it, as in SGD "
                "with momentum: write lr=1.0",
                stacklevel=2,
            )

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        stages = (Measure(momo_average, (WHOLE,) * 3), Apply(momo_apply, JointWithLoss(momo_step)))
        return Recipe(stages, ("exp_avg",), kept=(*self.running(group), "fstar"))

    def scalars(self, group: Group, step: int) -> Any:
        plain_first = step == 1 and not group["bias_correction"]
        return row_of(
            lr=group["lr"],
            beta=group["beta"],
            # Of the new gradient in the average: 1 at the first step unless averages are bias-corrected.
            weight=1.0 if plain_first else 1 - group["beta"],
            # One over what decay divides the parameter by.
            shrink=1 / (1 + decay_rate(group)),
            lower_bound=group["lb"],
            bias_correction=float(group["bias_correction"]),
            use_fstar=float(group["use_fstar"]),
            # Of the loss: -1 to ascend, as gradients are negated then.
            direction=-1.0 if group["maximize"] else 1.0,
        )


class MomoAdam(_NeedsLoss):
    r"""MomoAdam: Adam whose step is as long as the loss, and a lower bound of it, say that it should be.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        D_t = \sqrt{v_t / (1 - \beta_2^t)} + \epsilon \\
        \bar f_t &= \beta_1 \bar f_{t-1} + (1 - \beta_1) f_t, \qquad
        \gamma_t = \beta_1 \gamma_{t-1} + (1 - \beta_1) \langle g_t, p_{t-1} \rangle, \qquad
        \rho_t = 1 - \beta_1^t \\
        \tau_t &= \min\Bigl(\frac{\eta}{\rho_t},
            \frac{\max\bigl(A (\bar f_t - \rho_t f^* - \gamma_t) + \langle p_{t-1}, m_t \rangle, 0\bigr)}
            {\langle m_t, m_t / D_t \rangle}\Bigr), \qquad A = 1 + \eta\lambda \\
        p_t &= (p_{t-1} - \tau_t m_t / D_t) / A

    All averages begin with zero. Without ``divide``, decay comes first, as in AdamW:
    :math:`p_t = (1 - \eta\lambda) p_{t-1} - \tau_t m_t / D_t`. Inner products run over all parameters of all groups,
    whatever their sharding; each group's own learning rate is the cap of its step, and each group has its own
    :math:`f^*`.

    ``step`` needs the batch loss, as that of :class:`Momo` does.

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: the largest step :math:`\eta \ge 0`. Default 1e-2.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-8.
        weight_decay: :math:`\lambda \ge 0`. Default 0.
        lb: a lower bound :math:`f^*` of the loss. Default 0.
        divide: proximal decay, after the update; False to decay before it. Default True.
        use_fstar: estimate :math:`f^*` on the way, never below ``lb``. Default False.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range, or a step without the loss.

    Sharding class G: one packed all-reduce a step. State: 8 bytes per parameter (fp32), and four scalars that are kept
    in the parameter groups.

    When: in place of Adam, where the learning rate should need little search; give a rate that is too large rather
    than too small. Start: ``lr=3e-3``, ``betas=(0.9, 0.99)``.

    Paper: Schaipp et al., https://arxiv.org/abs/2305.07583.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 1e-2,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-8,
        weight_decay: Nonnegative = 0.0,
        lb: Number = 0.0,
        divide: bool = True,
        use_fstar: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(params, hyperparameters(locals()), common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        rule, decay = (momo_adam_prox, Decay.NONE) if group["divide"] else (momo_adam_apply, Decay.SHRINK)
        stages = (Measure(momo_adam_moments, (WHOLE,) * 3), Apply(rule, JointWithLoss(momo_step)))
        return Recipe(stages, ("exp_avg", "exp_avg_sq"), decay, kept=(*self.running(group), "fstar"))

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        return row_of(
            lr=group["lr"],
            # The first moment's, which the averages of the loss have too.
            beta=beta1,
            weight1=1 - beta1,
            weight2=1 - beta2,
            # One over the square root of the second moment's bias correction.
            root=1 / math.sqrt(1 - beta2**step),
            eps=group["eps"],
            # One over what proximal decay divides the parameter by.
            shrink=1 / (1 + decay_rate(group)),
            lower_bound=group["lb"],
            bias_correction=1.0,
            use_fstar=float(group["use_fstar"]),
            # Of the loss: -1 to ascend, as gradients are negated then.
            direction=-1.0 if group["maximize"] else 1.0,
        )
