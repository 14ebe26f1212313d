"""What optimizers share that divide by an estimate of the Hessian's diagonal, made anew every so many steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from oput_dist.curvature import Context, EmpiricalFisher, Estimator, GaussNewtonBartlett, Hutchinson
from oput_dist.curvature.context import check_averaged, data_groups, undisturbed
from oput_dist.curvature.fold import cut, fold, spatial_means
from oput_dist.engine import Common, Group, Optimizer, Params
from oput_dist.engine.forms import kept_state
from oput_dist.engine.hyper import nearest
from oput_dist.engine.match import qualified_names
from oput_dist.engine.plan import Plan
from oput_dist.layout import reshard_fsdp2

__all__ = ["Curved", "estimator_of"]

_ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "gauss-newton-bartlett": GaussNewtonBartlett,
    "gnb": GaussNewtonBartlett,
    "hutchinson": Hutchinson,
    "empirical-fisher": EmpiricalFisher,
}


def estimator_of(owner: str, given: str | Estimator) -> Estimator:
    """An estimator as it is, or by name in any case.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(given, Estimator):
        return given
    name = given.lower().replace("_", "-").replace(" ", "-") if isinstance(given, str) else ""
    if name not in _ESTIMATORS:
        raise ValueError(
            f"{owner}: estimator={given!r} is not allowed: must be one of {', '.join(map(repr, _ESTIMATORS))}, or an "
            f"oput.Estimator.{nearest(name, _ESTIMATORS)}"
        )
    return _ESTIMATORS[name]()


class Curved(Optimizer):
    """An optimizer with an estimate of the Hessian's diagonal in its state.

    In a training loop :meth:`refresh` stands beside ``step``; all but every ``k``-th time it does nothing::

        for inputs, labels in batches:
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.refresh(lambda: model(inputs))  # what the function must return, the estimator says

    Attributes:
        estimator: makes the estimates.
        curvature: the name of the state that holds them.
    """

    curvature: ClassVar[str] = "hessian"
    carried: ClassVar[tuple[str, ...]] = ("estimator",)
    why_no_release: ClassVar[str | None] = "refresh() runs backward passes of its own, which must move no parameter"

    def __init__(self, params: Params, defaults: dict[str, Any], common: Common, estimator: str | Estimator) -> None:
        self.estimator = estimator_of(type(self).__name__, estimator)
        super().__init__(params, {**defaults, "refreshes": 0, "steps_since_refresh": 0}, common)

    @abstractmethod
    def weight(self, group: Group) -> float:
        """Of a new estimate in the average that the state holds."""

    @property
    def due(self) -> bool:
        """Whether the next :meth:`refresh` makes an estimate: before the first one, and ``k`` steps after each."""
        return any(g["refreshes"] == 0 or g["steps_since_refresh"] >= g["k"] for g in self.param_groups)

    def advance(self, group: dict[str, Any]) -> None:
        group["steps_since_refresh"] += 1

    def refresh(self, *outputs: Callable[[], Any], force: bool = False) -> bool:
        """Estimate the curvature anew, if that is due, at the parameters as they are.

        Gradients are left as they were, and so are batch-norm statistics (if the optimizer knows the module). What is
        not finite in an estimate is left out of the average. Every rank must call it, outside of ``no_sync``, with its
        own share of the batch; a part of it, the same on all ranks, will do and costs less.

        Args:
            *outputs: a function for each micro-batch, which runs the model (as wrapped: DDP, FSDP) and returns what the
                estimator asks for: logits for :class:`GaussNewtonBartlett`, the mean loss for :class:`Hutchinson`,
                losses that are not reduced for :class:`EmpiricalFisher`.
            force: whether it is due or not.

        Returns:
            whether an estimate was made.

        Raises:
            TypeError, RuntimeError: for functions that return something else, or without a graph.
            CurvatureError: where the model cannot be differentiated as the estimator needs it, or ranks do not average
                gradients now (``no_sync``).
        """
        if not outputs or not all(callable(output) for output in outputs):
            what = "nothing was given" if not outputs else "a value was given"
            raise TypeError(
                f"{type(self).__name__}.refresh takes functions that run the model, but {what}: "
                "optimizer.refresh(lambda: model(inputs))"
            )
        if not (force or self.due):
            return False
        plan, whole = self._current_plan(), self._whole_plan()
        module = None if self._model is None else self._model.module
        check_averaged([slot.parameter for slot in whole.owners], module)
        context = Context(
            whole,
            self._names(whole),
            data_groups(whole.owners, module, self._spread().data),
            max(group["refreshes"] for group in self.param_groups),
            module,
            self._reshard,
            self._options.backends,
        )
        with undisturbed(context.parameters, module):
            estimates = cut(whole, plan, self.estimator.estimate(context, outputs))
        self._take_over(estimates, self.estimator.spatial)
        return True

    def update_hessian(self, batch_size: int = 1) -> None:
        """Take the squares of the gradients as they are, times ``batch_size``, for the estimate.

        For loops that sample labels themselves, as the reference implementation's: after a backward pass of the mean
        loss on labels drawn from the model's own softmax, with ``batch_size`` tokens in the global batch.
        """
        plan = self._current_plan()
        plan.settle_gradients()
        found = {slot.index: slot.flat_gradient() for slot in plan.slots if slot.numel}
        self._take_over({i: g * g * batch_size for i, g in found.items() if g is not None}, False)

    @torch.no_grad()
    def _take_over(self, estimates: dict[int, torch.Tensor], spatial: bool) -> None:
        plan = self._current_plan()
        if spatial:
            estimates = spatial_means(plan, estimates)
        for slot in plan.slots:
            if slot.index in estimates:
                names = self.recipe(self.param_groups[slot.group], slot.layout.shape).state
                kept_state(slot, self.state[slot.parameter], names, self._options)
                self.state[slot.parameter].setdefault("step", plan.counter(slot))
        weights = {i: self.weight(group) for i, group in enumerate(self.param_groups)}
        fold(plan, self.state, self.curvature, estimates, weights, self._options.backends)
        for group in self.param_groups:
            group.update(refreshes=group["refreshes"] + 1, steps_since_refresh=0)

    def _whole_plan(self) -> Plan:
        """That of whole parameters where the current one partitions them (ZeRO-1)."""
        plan = self._current_plan()
        if self._shard_group is None:
            return plan
        if "whole" not in plan.memo:
            plan.memo["whole"] = Plan.of(self.param_groups, {}, None, lambda group, shape: False, self._model)
        whole: Plan = plan.memo["whole"]
        return whole

    def _names(self, plan: Plan) -> list[str]:
        """Of each slot, for random numbers: qualified where all are known, else by place in the groups."""
        names = qualified_names(self, plan.slots)
        if None not in names:
            return [str(name) for name in names]
        return [f"{slot.group}.{slot.index}" for slot in plan.slots]

    def _reshard(self) -> None:
        reshard_fsdp2(p for group in self.param_groups for p in group["params"])
        if self._model is not None:
            self._model.reshard()
