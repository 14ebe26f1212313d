"""Momo: momentum with a step size that follows from the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from typing_extensions import Unpack

from oput_dist.engine import Common, Group, Optimizer, Params, Recipe, Shape, decay_rate
from oput_dist.engine.hyper import boolean, fraction, number
from oput_dist.kernels.language import rule
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import WHOLE, Apply, Joint, Measure

__all__ = ["Momo"]


class MomoScalars(NamedTuple):
    lr: float
    beta: float
    weight: float
    """Of the new gradient in the average: 1 at the first step unless averages are bias-corrected."""
    shrink: float
    """One over what decay divides the parameter by."""
    lower_bound: float
    bias_correction: float
    use_fstar: float


@rule
def momo_average(p, g, state, h):
    (d,) = state
    d = lerp(d, g, h.weight)
    return (d,), (p * d, d * d, g * p)


def momo_step(totals: Any, kept: Any, h: Any, loss: Any) -> tuple[Any, Any]:
    """The step size from the model of the loss: ``min(lr / rho, max(gap, 0) / |d|^2)``."""
    p_d, d_d, g_p, _numel = totals.unbind()
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


class Momo(Optimizer):
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
        lr: the largest step :math:`\eta \ge 0`. Default 1.
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

    Paper: Schaipp et al., https://arxiv.org/abs/2305.07583.
    """

    checks: ClassVar = {"beta": fraction, "lb": number, "bias_correction": boolean, "use_fstar": boolean}

    def __init__(
        self,
        params: Params,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        beta: float = 0.9,
        lb: float = 0.0,
        bias_correction: bool = False,
        use_fstar: bool = False,
        **common: Unpack[Common],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "beta": beta,
            "lb": lb,
            "bias_correction": bias_correction,
            "use_fstar": use_fstar,
            "updates": torch.zeros((), dtype=torch.float64),
            "loss_avg": torch.zeros((), dtype=torch.float64),
            "dot_avg": torch.zeros((), dtype=torch.float64),
            "fstar": torch.tensor(lb if isinstance(lb, (int, float)) else 0.0, dtype=torch.float64),
        }
        super().__init__(params, defaults, common)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        stages = (Measure(momo_average, (WHOLE,) * 3), Apply(momo_apply, Joint(momo_step)))
        return Recipe(stages, ("exp_avg",), kept=("updates", "loss_avg", "dot_avg", "fstar"))

    def scalars(self, group: Group, step: int) -> Any:
        plain_first = step == 1 and not group["bias_correction"]
        return MomoScalars(
            lr=group["lr"],
            beta=group["beta"],
            weight=1.0 if plain_first else 1 - group["beta"],
            shrink=1 / (1 + decay_rate(group)),
            lower_bound=group["lb"],
            bias_correction=float(group["bias_correction"]),
            use_fstar=float(group["use_fstar"]),
        )

    def step(self, closure: Callable[[], Any] | None = None, loss: torch.Tensor | float | None = None) -> Any:
        """Take one step, see :meth:`Optimizer.step`.

        Args:
            closure: computes the loss anew, with gradients; called once, and what it returns is the loss.
            loss: the mean loss of this rank's share of the batch, in place of a closure.

        Raises:
            ValueError: without either.
        """
        return self.run(closure, loss)
