"""GSAM: SAM that lowers the gap between the perturbed loss and the loss, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from oput_dist.engine import Group, Params
from oput_dist.engine.hyper import Nonnegative, Number, Positive
from oput_dist.engine.recipe import as_scalar

from .gradients import combine, inner_products, pairs, pieces, ratio, store
from .perturb import FirstPass
from .sharpness import SharpnessAware

__all__ = ["GSAM"]


class GSAM(SharpnessAware):
    r"""GSAM, surrogate gap guided SAM: :class:`SAM` with the gradients of both passes.

    .. math::
        g = g_1 - \alpha \Bigl(g_0 - \frac{\langle g_0, g_1 \rangle}{\lVert g_1 \rVert^2} g_1\Bigr), \qquad
        g_0 = \nabla L(w), \quad g_1 = \nabla L(w + e)

    What :math:`g_0` has beside :math:`g_1` is descended backwards, so that the gap between both losses shrinks while
    the perturbed loss, to first order, is not touched. The perturbation follows the learning rate, if ``lr_max`` is
    given:

    .. math::
        \rho_t = \rho_{\min} + (\rho - \rho_{\min}) \frac{\eta_t - \eta_{\min}}{\eta_{\max} - \eta_{\min}}

    and at least 0. Both ways to step are those of :class:`SAM`. With a GradScaler and ``scaler.unscale_(optimizer)``
    the first gradients must be unscaled as well: ``optimizer.first_step(grad_scale=scaler.get_scale())``. Clip by
    ``max_grad_norm`` of the inner optimizer: between the passes only :math:`g_1` would be clipped.

    Args:
        params: the optimizer to wrap; or parameters, groups, named parameters or a module, for ``base_optimizer``.
        base_optimizer: the class of the optimizer inside, or a function that makes it.
        rho: the length :math:`\rho \ge 0` of the perturbation, at ``lr_max`` if that is given. Default 0.05.
        alpha: :math:`\alpha`. Default 0.4.
        rho_min: :math:`\rho_{\min} \ge 0`, at ``lr_min``. Default 0.
        lr_max: the largest learning rate of the schedule, > 0. Default None: :math:`\rho_t = \rho`.
        lr_min: the smallest, >= 0 and below ``lr_max``. Default 0.
        adaptive: see :class:`SAM`. Default False.
        eta: see :class:`SAM`. Default 0.
        skip_nonfinite: see :class:`SAM`. Default False.
        module: see :class:`SAM`.
        **options: for ``base_optimizer``.

    All but the last two are in the groups, as ``gsam_rho`` and so on.

    Raises:
        TypeError: for what cannot be wrapped, or is wrapped by one of this family.
        ValueError: for a value out of range.
        RuntimeError: for a step without closure and first step, or steps out of order.

    Sharding class G, plus that of the optimizer inside: two all-reduces of sums for each process group that parameters
    are sharded over. Memory: copies of what the rank holds of parameters and gradients, between the passes. No state.

    When: as SAM, with a schedule that ends low. Start: ``rho=0.05``, ``alpha=0.4``, ``lr_max`` that of the schedule.

    Paper: Zhuang et al., https://arxiv.org/abs/2203.08065.
    """

    prefix: ClassVar[str] = "gsam"
    keeps_gradients: ClassVar[bool] = True

    def __init__(
        self,
        params: torch.optim.Optimizer | Params,
        base_optimizer: Callable[..., Any] | None = None,
        rho: Nonnegative = 0.05,
        alpha: Number = 0.4,
        rho_min: Nonnegative = 0.0,
        lr_max: Positive | None = None,
        lr_min: Nonnegative = 0.0,
        adaptive: bool = False,
        eta: Nonnegative = 0.0,
        skip_nonfinite: bool = False,
        module: nn.Module | None = None,
        **options: Any,
    ) -> None:
        settings = {"rho": rho, "alpha": alpha, "rho_min": rho_min, "lr_max": lr_max, "lr_min": lr_min}
        settings |= {"adaptive": adaptive, "eta": eta}
        super().__init__(params, base_optimizer, options, settings, module, False, skip_nonfinite)
        self._scale: float | torch.Tensor | None = None

    def check(self, settings: Mapping[str, Any]) -> None:
        lr_max, lr_min, rho_min = (settings[name] for name in ("lr_max", "lr_min", "rho_min"))
        if lr_max is None and (rho_min or lr_min):
            name, value = ("rho_min", rho_min) if rho_min else ("lr_min", lr_min)
            raise ValueError(f"GSAM: {name}={value!r} without lr_max: give lr_max, the largest rate of the schedule")
        if lr_max is not None and not lr_min < lr_max:
            raise ValueError(f"GSAM: lr_min={lr_min!r} is not allowed: must be below lr_max={lr_max!r}")

    def radius(self, group: Group) -> Any:
        rho = super().radius(group)
        lr_max, lr_min, low = (self.setting(group, name) for name in ("lr_max", "lr_min", "rho_min"))
        if lr_max is None:
            return rho
        radius = low + (rho - low) * (as_scalar(group["lr"]) - lr_min) / (lr_max - lr_min)
        return radius.clamp(min=0.0) if isinstance(radius, torch.Tensor) else max(0.0, radius)

    def first_step(self, zero_grad: bool = True, grad_scale: float | torch.Tensor | None = None) -> None:
        """Perturb the weights, see :meth:`SAM.first_step`.

        Args:
            zero_grad: set the gradients to None, for the second pass.
            grad_scale: what the loss was multiplied by, where a GradScaler unscales the gradients of the second pass
                before the step.
        """
        super().first_step(zero_grad)
        self._scale = grad_scale

    def rewrite_gradients(self, first: FirstPass | None) -> None:
        if first is None:
            return
        scale = self._first_scale()
        plan = self.whole_plan()
        parts = pairs(plan, pieces(first.gradients))
        now, both, _ = inner_products(plan, parts, self.model_groups, self.backends)
        share = ratio(both, now)
        weights = {}
        for number, group in enumerate(self.param_groups):
            alpha = as_scalar(self.setting(group, "alpha")) / scale
            weights[number] = (1.0 + alpha * share, -alpha)
        combine(plan, parts, weights, self.backends)
        store(parts)

    def _first_scale(self) -> float | torch.Tensor:
        """By how much the gradients of the first pass are larger than those of the second are now."""
        if getattr(self, "found_inf", None) is None or getattr(self, "grad_scale", None) is not None:
            return 1.0
        if self._scale is None:
            raise RuntimeError(
                "GSAM: scaler.unscale_(optimizer) has unscaled the gradients of the second pass, but those of the "
                "first are needed too: call optimizer.first_step(grad_scale=scaler.get_scale()). The weights are as "
                "before the step"
            )
        return self._scale
