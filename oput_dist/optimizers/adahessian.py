"""AdaHessian: Adam with the Hessian's diagonal in place of the gradient, where Adam squares it."""

from __future__ import annotations

import warnings
from typing import Any, Literal

from typing_extensions import Unpack

from oput_dist.curvature import Hutchinson
from oput_dist.engine import Common, Group, Params, Recipe, Shape, row_of
from oput_dist.engine.hyper import Betas, Nonnegative, PositiveInteger, Share, hyperparameters
from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.math import lerp
from oput_dist.kernels.stage import Decay, Update

from .curved import Curved

__all__ = ["AdaHessian"]


@rule
def moments(g, m, v, hessian, h):
    return lerp(m, g, h.weight1), lerp(v, hessian * hessian, h.weight2)


@rule
def adahessian(p, g, state, h):
    m, v, hessian = state
    m, v = moments(g, m, v, hessian, h)
    return p - h.step * m / (tl.sqrt(v * h.correct2) + h.eps), (m, v)


@rule
def adahessian_power(p, g, state, h):
    m, v, hessian = state
    m, v = moments(g, m, v, hessian, h)
    v_hat = v * h.correct2
    root = tl.where(v_hat > 0, tl.exp(0.5 * h.power * tl.log(tl.where(v_hat > 0, v_hat, 1.0))), v_hat)
    return p - h.step * m / (root + h.eps), (m, v)


class AdaHessian(Curved):
    r"""AdaHessian, with Hutchinson's estimate of the Hessian's diagonal, averaged over convolution kernels.

    .. math::
        m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \qquad v_t = \beta_2 v_{t-1} + (1 - \beta_2) D_t^2 \\
        p_t &= (1 - \eta\lambda) p_{t-1}
        - \eta \frac{m_t / (1 - \beta_1^t)}{\bigl(v_t / (1 - \beta_2^t)\bigr)^{\kappa/2} + \epsilon}

    :math:`D_t` is the newest estimate (:class:`Hutchinson` with ``spatial=True``), which ``refresh`` makes every ``k``
    steps. The paper's order takes it where the gradient is taken, before the step::

        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.refresh(lambda: F.cross_entropy(model(inputs), labels))
        optimizer.step()

    Args:
        params: parameters, groups, named parameters, or a module.
        lr: learning rate :math:`\eta \ge 0`. Default 0.1.
        betas: :math:`(\beta_1, \beta_2)`, each in [0, 1). Default (0.9, 0.999).
        eps: :math:`\epsilon \ge 0`. Default 1e-4.
        weight_decay: decoupled, :math:`\lambda \ge 0`. Default 0.
        hessian_power: :math:`\kappa` in (0, 1]. Default 1.
        k: steps between estimates, an integer >= 1. Default 1.
        product: how the Hessian is multiplied: ``"exact"``, or ``"difference"`` under FSDP and with fused attention.
            Default exact.
        seed: of the probes. Default 0.
        **common: see :class:`oput_dist.engine.Common`.

    Raises:
        ValueError: for a value out of range.
        CurvatureError: in ``refresh``, where the model cannot be differentiated twice.

    Sharding class E, and the estimate's passes (R where a convolution kernel is cut). State: 12 bytes per parameter
    (fp32).

    When: a second derivative at every step is affordable. Start: ``lr=0.03``, ``product="difference"``.

    Paper: Yao et al., https://arxiv.org/abs/2006.00719.
    """

    def __init__(
        self,
        params: Params,
        lr: Nonnegative = 0.1,
        betas: Betas = (0.9, 0.999),
        eps: Nonnegative = 1e-4,
        weight_decay: Nonnegative = 0.0,
        hessian_power: Share = 1.0,
        k: PositiveInteger = 1,
        product: Literal["exact", "difference"] = "exact",
        seed: int = 0,
        **common: Unpack[Common],
    ) -> None:
        estimator = Hutchinson(product=product, spatial=True, seed=seed)
        super().__init__(params, hyperparameters(locals(), "product", "seed", "estimator"), common, estimator)

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        stage = Update(adahessian if group["hessian_power"] == 1 else adahessian_power)
        return Recipe((stage,), ("exp_avg", "exp_hessian_diag_sq", "hessian"), Decay.SHRINK)

    def scalars(self, group: Group, step: int) -> Any:
        beta1, beta2 = group["betas"]
        return row_of(
            step=group["lr"] / (1 - beta1**step),
            weight1=1 - beta1,
            weight2=1 - beta2,
            correct2=1 / (1 - beta2**step),
            power=group["hessian_power"],
            eps=group["eps"],
        )

    def weight(self, group: Group) -> float:
        return 1.0

    def advance(self, group: dict[str, Any]) -> None:
        if group["refreshes"] == 0 and group["steps_since_refresh"] == 0:
            warnings.warn(
                "AdaHessian stepped without an estimate of curvature, which it divides by: call "
                "optimizer.refresh(lambda: loss_function(model(inputs), labels)) before step()",
                stacklevel=8,
            )
        super().advance(group)
