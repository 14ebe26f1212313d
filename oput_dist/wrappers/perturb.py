"""A step up from the weights, and back: what wrappers of the SAM family do between two passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from oput_dist.engine import Group, Shape, row_of
from oput_dist.engine.finish import finish
from oput_dist.engine.optimizer import Optimizer
from oput_dist.engine.plan import Plan
from oput_dist.engine.recipe import as_scalar
from oput_dist.engine.slot import Slot
from oput_dist.engine.statistics import hold_statistics, release_statistics
from oput_dist.engine.sweep import Part, sweep
from oput_dist.engine.wrapper import Wrapper
from oput_dist.layout import whole_or_local

from .sam_stages import PERTURB, SQUARES

__all__ = ["FirstPass", "Perturbing"]


@dataclass
class FirstPass:
    """What lasts from the first pass of a step to the second."""

    weights: list[tuple[torch.Tensor, torch.Tensor]]
    """Parameters with copies of what this rank held of them."""
    gradients: dict[torch.Tensor, torch.Tensor]
    """Copies of the gradients, where they are needed again, laid out like their parameters."""
    squares: torch.Tensor
    """The square of the norm that the perturbation was divided by."""
    held: list[Any]
    """Batch-norm layers that do not track."""


class Perturbing(Wrapper):
    """A wrapper that can move the weights up the gradient, and back.

    Needs the settings ``rho``, ``adaptive`` and ``eta``.

    Attributes:
        keeps_gradients: whether the gradients of the first pass are needed after the second.
    """

    keeps_gradients: ClassVar[bool] = False
    _local = False
    _first: FirstPass | None = None
    _whole: Plan | None = None

    def radius(self, group: Group) -> Any:
        """How far the perturbation of a group goes now."""
        return as_scalar(self.setting(group, "rho"))

    def perturbs(self, slot: Slot) -> bool:
        """Whether a parameter is perturbed in this step; all ranks agree."""
        return True

    def perturb(self) -> None:
        """Keep the weights and move them up the gradients that are here. All ranks must call it."""
        self.reshard()
        plan = self.whole_plan()
        parts = self.parts(plan)
        self._check_local(plan)
        squares = self.squares(plan, parts)
        inverse = 1.0 / (squares.sqrt() + 1e-12)  # 0 or NaN if a gradient is not finite, and then nothing moves
        parts = [part for part in parts if self.perturbs(part.slot)]
        weights = {part.slot.parameter: _memory(part.slot.parameter).clone() for part in parts}
        gradients = _gradients(plan) if self.keeps_gradients else {}
        self._first = FirstPass(list(weights.items()), gradients, squares, hold_statistics(self._module))
        sweep(plan, PERTURB, parts, self._rows(inverse), self.backends)
        finish(plan, [(part.slot, part.p) for part in parts])

    @torch.no_grad()
    def restore(self) -> None:
        """Undo a first step: the weights are what they were, bit for bit, and batch-norm layers track again."""
        if self._first is None:
            return
        release_statistics(self._first.held)
        self.reshard()
        if self._first.weights:
            torch._foreach_copy_(
                [_memory(parameter) for parameter, _ in self._first.weights], [copy for _, copy in self._first.weights]
            )
        self._first = None

    def whole_plan(self) -> Plan:
        """Slots of all that this rank holds. Under ZeRO-1 that is everything, so no sum over ranks is needed."""
        origin = self.origin
        if not isinstance(origin, Optimizer) or origin._shard_group is None:
            return self.plan()
        if self._whole is None or self._whole.stale(self.param_groups):
            self._whole = Plan.of(self.param_groups, {}, None, self._sums, self._model)
        return self._whole

    def _sums(self, group: Group, shape: Shape) -> bool:
        return True

    def parts(self, plan: Plan) -> list[Part]:
        """Parameters that have a gradient here, with it."""
        plan.settle_gradients()
        found = [(slot, slot.flat_gradient()) for slot in plan.slots]
        return [Part(slot, slot.flat_parameter(), g) for slot, g in found if g is not None and slot.numel]

    def squares(self, plan: Plan, parts: Sequence[Part]) -> torch.Tensor:
        """The square of the norm that perturbations are divided by, over all ranks: 0-d, float64."""
        sums = sweep(plan, SQUARES, parts, self._rows(None), self.backends)
        assert sums is not None
        return sums.total(self.model_groups)[0]

    def _rows(self, inverse: torch.Tensor | None) -> dict[int, Any]:
        return {
            number: row_of(
                adaptive=float(self.setting(group, "adaptive")),
                eta=self.setting(group, "eta"),
                factor=0.0 if inverse is None else self.radius(group) * inverse,
            )
            for number, group in enumerate(self.param_groups)
        }

    @property
    def _module(self) -> nn.Module | None:
        return None if self._model is None else self._model.module

    def _check_local(self, plan: Plan) -> None:
        for slot in plan.slots if self._local else ():
            if slot.layout.groups or isinstance(slot.parameter, DTensor):
                raise ValueError(
                    f"{type(self).__name__}: local=True, but {slot.name} is sharded, so no rank has a gradient of its "
                    "own for it: leave local out, or replicate the parameters (DistributedDataParallel)"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_whole": None}


def _memory(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter."""
    return whole_or_local(parameter.detach())


def _gradients(plan: Plan) -> dict[torch.Tensor, torch.Tensor]:
    """Copies of the gradients, partial sums added up, by parameter."""
    found = ((s.parameter, s.parameter.grad if s.settled is None else s.settled) for s in plan.owners)
    return {parameter: gradient.detach().clone() for parameter, gradient in found if gradient is not None}
