"""LookSAM: SAM whose second pass is made every few steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from oput_dist.engine import Params
from oput_dist.engine.hyper import Nonnegative, PositiveInteger
from oput_dist.engine.plan import Plan
from oput_dist.engine.recipe import as_scalar
from oput_dist.engine.slot import Slot
from oput_dist.engine.sweep import Part

from .gradients import combine, inner_products, pairs, pieces, ratio, store
from .perturb import FirstPass
from .sharpness import SharpnessAware

__all__ = ["LookSAM"]

_DIRECTION = "looksam_direction"


class LookSAM(SharpnessAware):
    r"""LookSAM: :class:`SAM` every ``k`` steps, and its direction in the steps between.

    Every ``k`` steps, beginning with the first, the gradient is that of SAM, :math:`g_s = \nabla L(w + e)`, and what it
    has beside the gradient :math:`g = \nabla L(w)` is kept. Other steps have one pass and add it:

    .. math::
        g_v = g_s - \frac{\langle g, g_s \rangle}{\lVert g \rVert^2} g, \qquad
        g \leftarrow g + \alpha \frac{\lVert g \rVert}{\lVert g_v \rVert} g_v

    with norms of all parameters together. ``step(closure)`` calls the closure once in those steps. With the other
    interface ask first::

        loss_fn(model(x), y).backward()
        if optimizer.needs_second_pass:
            optimizer.first_step()
            loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    Without asking the result is the same: first steps then do nothing but zero gradients. For a GradScaler and all
    else see :class:`SAM`.

    Args:
        params: the optimizer to wrap; or parameters, groups, named parameters or a module, for ``base_optimizer``.
        base_optimizer: the class of the optimizer inside, or a function that makes it.
        rho: the length :math:`\rho \ge 0` of the perturbation. Default 0.05.
        k: steps from one second pass to the next, an integer >= 1; 1 is SAM. The same in all groups. Default 5.
        alpha: :math:`\alpha \ge 0`. Default 0.7.
        adaptive: see :class:`SAM`. Default False.
        eta: see :class:`SAM`. Default 0.
        skip_nonfinite: see :class:`SAM`. Default False.
        module: see :class:`SAM`.
        **options: for ``base_optimizer``.

    All but the last two are in the groups, as ``looksam_rho`` and so on; ``looksam_steps`` counts.

    Raises:
        TypeError: for what cannot be wrapped, or is wrapped by one of this family.
        ValueError: for a value out of range.
        RuntimeError: for a step without closure and first step where it needs them, or steps out of order.

    Sharding class G, plus that of the optimizer inside: an all-reduce of sums for each process group that parameters or
    state are sharded over, two in a step with two passes. Memory: copies of what the rank holds of parameters and
    gradients, between the passes. State: 4 bytes per parameter (fp32), ``looksam_direction``, laid out like that of the
    optimizer inside.

    When: SAM helps and two passes are too dear. Start: ``k=5``, ``alpha=0.7``.

    Paper: Liu et al., https://arxiv.org/abs/2203.02714.
    """

    prefix: ClassVar[str] = "looksam"
    keeps: ClassVar[tuple[str, ...]] = (_DIRECTION,)
    keeps_gradients: ClassVar[bool] = True
    counts: ClassVar[bool] = True

    def __init__(
        self,
        params: torch.optim.Optimizer | Params,
        base_optimizer: Callable[..., Any] | None = None,
        rho: Nonnegative = 0.05,
        k: PositiveInteger = 5,
        alpha: Nonnegative = 0.7,
        adaptive: bool = False,
        eta: Nonnegative = 0.0,
        skip_nonfinite: bool = False,
        module: nn.Module | None = None,
        **options: Any,
    ) -> None:
        settings = {"rho": rho, "k": k, "alpha": alpha, "adaptive": adaptive, "eta": eta}
        super().__init__(params, base_optimizer, options, settings, module, False, skip_nonfinite)

    @property
    def needs_second_pass(self) -> bool:
        """Whether this step is one of SAM's, with two passes."""
        group = self.param_groups[0]
        return bool(self.setting(group, "steps") % self.setting(group, "k") == 0)

    def check_settings(self) -> None:
        super().check_settings()
        found = {self.setting(group, "k") for group in self.param_groups}
        if len(found) > 1:
            raise ValueError(f"LookSAM: looksam_k is {sorted(found)} in different groups: it must be the same in all")

    def rewrite_gradients(self, first: FirstPass | None) -> None:
        plan = self.plan()
        if first is None:
            self._add_direction(plan)
        else:
            self._keep_direction(plan, first)

    def _directions(self, plan: Plan) -> dict[Slot, torch.Tensor]:
        """The directions, flat; zeros are made wherever there is a gradient, also for an empty piece."""
        slots = [slot for slot in plan.slots if slot.parameter.grad is not None]
        return {slot: slot.flat_state(self._kept.state[slot.parameter], self.keeps, None)[0] for slot in slots}

    def _keep_direction(self, plan: Plan, first: FirstPass) -> None:
        parts = pairs(plan, pieces(first.gradients))
        _, both, before = inner_products(plan, parts, self.model_groups, self.backends)
        scale = getattr(self, "grad_scale", None)
        own = 1.0 if scale is None else scale.double().reciprocal()
        weights = dict.fromkeys(range(len(self.param_groups)), (own, -own * ratio(both, before)))
        directions = self._directions(plan)
        for part in parts:
            directions[part.slot].copy_(part.p)
        kept = [Part(part.slot, directions[part.slot], part.g) for part in parts]
        combine(plan, kept, weights, self.backends)

    def _add_direction(self, plan: Plan) -> None:
        parts = pairs(plan, self._directions(plan).get)
        now, _, kept = inner_products(plan, parts, self.model_groups, self.backends)
        factor = ratio(now.sqrt(), kept.sqrt())
        weights = {n: (1.0, as_scalar(self.setting(g, "alpha")) * factor) for n, g in enumerate(self.param_groups)}
        combine(plan, parts, weights, self.backends)
        store(parts)
