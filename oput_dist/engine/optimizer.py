"""The base class of all optimizers: torch.optim's contract on the outside, the engine inside."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn

from oput_dist.kernels.stage import Update
from oput_dist.layout import clean_name, is_flattened, reshard_fsdp2

from .accumulation import check_accumulates
from .common import Common
from .hyper import Check, boolean, check_group, nearest, nonnegative, optional, positive, signature_checks
from .load import load_state_dict
from .matrices import matrices_in
from .model import Model, check_not_replaced
from .options import GroupHandle, Options, check_home, check_rounded, group_handle, options_of, releases
from .plan import Plan
from .recipe import Group, Recipe, Shape
from .rewrite import rewrite
from .saved import FORMAT, FORMAT_KEY, completed
from .step import Outcome, Spread, Step
from .storage import check_storage

if TYPE_CHECKING:
    from .release import Release

__all__ = ["Common", "Optimizer", "Params"]

Params = nn.Module | Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


_GROUP_COMMON: dict[str, Check] = {
    "lr": nonnegative,
    "weight_decay": nonnegative,
    "decouple_lr": boolean,
    "max_lr": optional(positive),
    "maximize": boolean,
    "cautious": boolean,
}
_LATER = ("cautious",)
"""Options that came after the first format: a group has them only where they are set, so that what was saved without
them loads, also through ``torch.distributed.checkpoint``, which asks for every key of a group."""


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer whose update is a :class:`Recipe` of rules. Subclasses give the recipe and its scalars.

    ``torch.amp.GradScaler`` leaves unscaling to the update itself, in the pass that it makes anyway, and a step that
    found an overflow is skipped. Only FSDP1's ``ShardedGradScaler`` needs gradients unscaled first.

    Attributes:
        skipped: steps that were left out because a gradient was not finite.
        outcome: what became of the last step; None before the first.
        gradient_release: whether it was made for gradient release.
        carried: attributes of a class of its own that copies and pickles have too.
        why_no_release: why gradients cannot be released in the backward pass; None if that depends on the recipe.
        why_no_accumulation: why gradients cannot be accumulated in the state, likewise.
        checks: what hyperparameters must satisfy that no type of the signature of ``__init__`` says.
        forms: hyperparameters that say in what form state is kept: what loads does not change them.
    """

    checks: ClassVar[Mapping[str, Check]] = {}
    forms: ClassVar[tuple[str, ...]] = ()
    carried: ClassVar[tuple[str, ...]] = ()
    why_not_cautious: ClassVar[str | None] = None
    why_no_release: ClassVar[str | None] = None
    why_no_accumulation: ClassVar[str | None] = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Read by GradScaler. FSDP1's own tells ranks of each other's overflows only while it unscales gradients."""
        return not any(is_flattened(p) for group in self.param_groups for p in group["params"])

    def __init__(self, params: Params, defaults: dict[str, Any], common: Common) -> None:
        unknown = [name for name in common if name not in Common.__annotations__]
        owner = type(self).__name__
        if unknown:
            known = [*defaults, *Common.__annotations__]
            raise TypeError(f"{owner} has no option {unknown[0]!r}.{nearest(unknown[0], known)}")
        self._options = options_of(owner, common)
        self.gradient_release = releases(owner, common, self._options)
        self._shard_group = group_handle(owner, common, "shard_group")
        self._model_group = group_handle(owner, common, "model_group")
        self._data_group = group_handle(owner, common, "data_group")
        self._model = _model(owner, params, common, self.works_on_matrices())
        self.skipped = 0
        self.outcome: Outcome | None = None
        self._plan: Plan | None = None
        self._owners_known: dict[Any, Any] = {}
        self._begun = False
        self._release: Release | None = None
        every = {
            **defaults,
            "decouple_lr": common.get("decouple_lr", False),
            "max_lr": common.get("max_lr"),
            "maximize": common.get("maximize", False),
            "optimizer": owner,
            FORMAT_KEY: FORMAT,
        }
        every.update({name: common.get(name) for name in _LATER if common.get(name, False) is not False})
        self.validate(every)
        if isinstance(params, nn.Module):
            params = [(clean_name(name), parameter) for name, parameter in params.named_parameters()]
        super().__init__(params, every)
        every_parameter = [p for group in self.param_groups for p in group["params"]]
        check_rounded(owner, self._options, every_parameter)
        check_home(owner, self._options, every_parameter)
        if self._options.storage is not None and not any(is_flattened(p) for p in every_parameter):
            check_storage(owner, self._options.storage, self._state_names())

    @abstractmethod
    def recipe(self, group: Group, shape: Shape) -> Recipe:
        """The stages and state of the parameters of one global shape in a group. Must not depend on the step."""

    def recipe_of(self, group: Group, shape: Shape) -> Recipe:
        """The recipe with what the group's common options make of it."""
        recipe = self.recipe(group, shape)
        return recipe.cautious() if group.get("cautious") else recipe

    @property
    def options(self) -> Options:
        """What holds for all groups."""
        return self._options

    def works_on_matrices(self) -> bool:
        """Whether any group may have parameters that are worked on whole; decided without looking at them."""
        return False

    def validate(self, group: Group) -> None:
        """Raise ValueError for the first hyperparameter of a group that is out of range."""
        owner = type(self).__name__
        check_group(owner, group, _GROUP_COMMON)
        check_group(owner, group, self.ranges())
        self.check(group)
        if self.why_not_cautious is not None and group.get("cautious"):
            raise ValueError(f"{owner}: cautious=True is not possible here: {self.why_not_cautious}")
        if group["decouple_lr"] and group["max_lr"] is None and float(group["lr"]) == 0:
            raise ValueError(f"{owner}: decouple_lr=True with lr=0: give max_lr, the largest rate of the schedule")

    @classmethod
    def ranges(cls) -> Mapping[str, Check]:
        """What hyperparameters must satisfy, by name: as the signatures of ``__init__`` say, then ``checks``."""
        said = signature_checks(cls)  # type: ignore[arg-type]  # cached, and classes are hashable
        return {**said, **cls.checks} if cls.checks else said

    def check(self, group: Group) -> None:
        """Raise ValueError if the hyperparameters of a group do not go together."""

    def advance(self, group: dict[str, Any]) -> None:
        """Change what a group keeps from step to step, after a step that counted; on all ranks alike."""

    @abstractmethod
    def scalars(self, group: Group, step: int) -> Any:
        """The NamedTuple ``h`` that the rules see, for a group at step ``1, 2, ...``, computed in float64."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyperparameters and parameters are checked first."""
        if self.__dict__.get("_release") is not None:
            raise ValueError(
                f"{type(self).__name__}: a group cannot be added while gradients are released: call "
                "remove_gradient_release(model), add the group, and prepare_for_gradient_release again"
            )
        if isinstance(param_group, dict):
            self._check_new_group(param_group)
        super().add_param_group(param_group)
        self.complete(self.param_groups[-1])
        self._plan = None

    def complete(self, group: dict[str, Any]) -> None:
        """Fill in what depends on a new group's own values, such as its initial learning rate."""
        if group["decouple_lr"] and group["max_lr"] is None:
            group["max_lr"] = float(group["lr"])

    def _check_new_group(self, param_group: dict[str, Any]) -> None:
        owner = type(self).__name__
        if not isinstance(param_group.get("params"), (torch.Tensor, set)):
            param_group["params"] = list(param_group["params"])
        self.validate({**self.defaults, **param_group})
        for name in param_group:
            if name in Common.__annotations__ and name not in (*self.defaults, *_LATER):
                raise ValueError(
                    f"{owner}: {name} holds for the whole optimizer, not for a group: give it to the class"
                )
            known = name == "params" or name in self.defaults
            if not known and (near := nearest(name, [*self.defaults, *_LATER], cutoff=0.85)):
                warnings.warn(f"{owner}: parameter group has an unknown option {name!r}.{near}", stacklevel=4)
        entries = param_group["params"]
        seen: set[int] = set()
        for i, entry in enumerate([entries] if isinstance(entries, torch.Tensor) else entries):
            label, tensor = entry if isinstance(entry, tuple) else (f"{i} of group {len(self.param_groups)}", entry)
            if id(tensor) in seen:
                raise ValueError(f"{owner}: parameter {label} is in its group twice")
            seen.add(id(tensor))
            if isinstance(tensor, torch.Tensor) and not tensor.is_floating_point():
                raise TypeError(
                    f"{owner}: parameter {label} has dtype {tensor.dtype}: only real floating-point parameters can be "
                    "optimized"
                )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Parameters whose gradient is None are skipped: parameter, state and step counter stay as they are, and they
        add nothing to norms. Under sharding this holds for each rank's piece. Gradients are never modified.

        Args:
            closure: computes the loss anew, with gradients; called once.

        Returns:
            what ``closure`` returned, or None.

        Raises:
            TypeError, ValueError: for a gradient that cannot be used, before anything is changed.
        """
        return self.run(closure, None)

    @torch._disable_dynamo  # as torch.compiler.disable, which imports Dynamo at once: a second of a process
    @torch.no_grad()
    def run(self, closure: Callable[[], Any] | None, loss: torch.Tensor | float | None) -> Any:
        """What ``step`` does; ``loss`` is given where the optimizer needs it and there is no closure."""
        if self._release is not None and not self._may_rehearse():
            self._release.step(closure)
            return loss
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.check_step()
        plan = self._current_plan()
        check_not_replaced(plan.owners, self._model)
        scale, overflow = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # as GradScaler sets them
        if overflow is not None and self._overflowed(plan, bool(overflow)):
            self.skipped += 1
            self.outcome = Outcome.SKIPPED
            return loss
        unscale = None if scale is None else 1.0 / scale.double()
        self.end(self.step_on(plan, self._options, not self._begun, loss, unscale))
        return loss

    def _overflowed(self, plan: Plan, here: bool) -> bool:
        """Whether an overflow was found, on any of the ranks that must step together."""
        matrices = matrices_in(self, plan, self.param_groups) if self.works_on_matrices() else None
        return here if matrices is None else matrices.anywhere(here)

    def check_step(self) -> None:
        """Raise for hyperparameters, or whatever else, with which no step can be taken now."""
        for group in self.param_groups:
            self.validate(group)

    def step_on(
        self,
        plan: Plan,
        options: Options,
        first: bool,
        loss: torch.Tensor | float | None = None,
        unscale: torch.Tensor | None = None,
    ) -> Outcome:
        """Update the parameters of a plan: a step, or a part of one. See :class:`Step`; :meth:`end` follows."""
        groups, spread = self.param_groups, self._spread()
        return Step(plan, groups, self.state, self.recipe_of, self.scalars, options, first, spread, loss, unscale).run()

    def end(self, outcome: Outcome) -> None:
        """What follows once all parameters of a step were updated."""
        self.outcome = outcome
        if outcome is Outcome.SKIPPED:
            self.skipped += 1
            return
        if outcome is Outcome.DONE and not self._options.accumulate:
            for group in self.param_groups:
                self.advance(group)
        self._begun = True

    def _may_rehearse(self) -> bool:
        """Whether a step now can only be meant to create state, see :class:`Step`."""
        return not self._begun and all(group["lr"] == 0 for group in self.param_groups)

    @property
    def optimizer_accumulation(self) -> bool:
        """Whether steps add gradients to the state only, and leave parameters as they are. False at first.

        A step that accumulates updates state and step counters as any step does, on gradients without weight decay.
        Gradients are not divided by the number of such steps. Setting it to True raises ValueError where no part of
        the state carries a gradient on to a later step.
        """
        return self._options.accumulate

    @optimizer_accumulation.setter
    def optimizer_accumulation(self, value: bool) -> None:
        check_group(type(self).__name__, {"optimizer_accumulation": value}, {"optimizer_accumulation": boolean})
        if value:
            check_accumulates(self)
        self._options = replace(self._options, accumulate=bool(value))

    @torch.no_grad()
    def rewrite(self, stage: Update, names: tuple[str, ...], scalars: Mapping[int, Any]) -> None:
        """Rewrite the parameters of some groups from their state, see :func:`oput_dist.engine.rewrite.rewrite`."""
        reshard_fsdp2(p for group in self.param_groups for p in group["params"])
        if self._model is not None:
            self._model.reshard()
        rewrite(self._current_plan(), self.state, self._options.backends, stage, names, scalars)

    def _state_names(self) -> set[str]:
        """Of state in the shape of parameters; empty ones, which ranks may hold, tell nothing."""
        shapes = {(i, p.shape) for i, group in enumerate(self.param_groups) for p in group["params"]}
        return {name for i, shape in shapes for name in self.recipe(self.param_groups[i], shape).state}

    def _spread(self) -> Spread:
        model, data = self._model_group, self._data_group
        if data is None and dist.is_initialized():
            data = GroupHandle(dist.group.WORLD)  # type: ignore[arg-type]
        return Spread(() if model is None else (model.group,), () if data is None else (data.group,))

    def _current_plan(self) -> Plan:
        if self._plan is None or self._plan.stale(self.param_groups):
            group = self._shard_group.group if self._shard_group is not None else None
            if self._model is not None:
                self._model.refresh()
            self._plan = Plan.of(self.param_groups, self.state, group, self._sums, self._model)
            self._plan.owners_known = self._owners_known
        return self._plan

    def _sums(self, group: Group, shape: Shape) -> bool:
        """Whether the update of a parameter of a shape needs sums over it."""
        return self._options.max_grad_norm is not None or self.recipe_of(group, shape).exchanges > 0

    def state_dict(self) -> dict[str, Any]:
        """torch's state dict. A parameter without state has an empty entry, so that it shows if one was lost."""
        return completed(self, super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, of this class under any layout: whole tensors are cut to this rank's pieces.

        State keeps its dtype. Missing, unknown or wrongly shaped state raises ValueError before anything is changed.
        """
        load_state_dict(self, state_dict, self._current_plan())
        self._plan = None
        self._begun = True

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        names = (
            "_options",
            "_shard_group",
            "_model_group",
            "_data_group",
            "_model",
            "_begun",
            "gradient_release",
            "skipped",
            "outcome",
            *self.carried,
        )
        return {**kept, **{name: getattr(self, name) for name in names}, "_plan": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = self.state if isinstance(self.state, defaultdict) else defaultdict(dict, self.state)
        self._plan, self._release = None, None
        self.__dict__.setdefault("gradient_release", False)
        self.__dict__.setdefault("_owners_known", {})


def _model(owner: str, params: Params, common: Common, shares: bool) -> Model | None:
    module = common.get("module")
    if module is not None and not isinstance(module, nn.Module):
        raise TypeError(f"{owner}: module={module!r}: must be the nn.Module that holds the parameters")
    if module is None and isinstance(params, nn.Module):
        module = params
    return None if module is None else Model(module, shares)
