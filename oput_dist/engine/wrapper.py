"""The base of optimizers that wrap another: one set of parameter groups, one state dict, one step."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from oput_dist.backends import BACKENDS
from oput_dist.layout import reshard_fsdp2, whole_or_local

from .accumulation import NoAccumulation
from .agree import gathered, joint_groups
from .hyper import Check, check_group, signature_checks
from .kept import Kept
from .model import Model
from .optimizer import Optimizer, Params
from .plan import Plan
from .recipe import Group, Recipe, Shape, as_scalar
from .step import Outcome

__all__ = ["Own", "Wrapper", "check_no_closure", "check_own", "inner_of", "wrappers_of"]


def inner_of(
    owner: str,
    params: torch.optim.Optimizer | Params,
    base: Callable[..., Any] | None,
    options: Mapping[str, Any],
    module: nn.Module | None = None,
) -> tuple[torch.optim.Optimizer, nn.Module | None]:
    """The optimizer to wrap, given as it is or as a class with its options; and the module, if that was given.

    ``module`` may be given beside parameters, for classes of this library too.

    Raises:
        TypeError: showing the right call.
    """
    if isinstance(params, torch.optim.Optimizer):
        if base is not None or options:
            extra = "a second optimizer" if base is not None else f"{next(iter(options))!r}"
            raise TypeError(
                f"{owner}: an optimizer was given, so {extra} cannot be: {owner}(optimizer), or "
                f"{owner}(params, torch.optim.SGD, lr=0.1)"
            )
        return params, module
    if not callable(base):
        raise TypeError(
            f"{owner} wraps an optimizer: give one, {owner}(optimizer), or parameters and a class with its options, "
            f"{owner}(params, torch.optim.SGD, lr=0.1)"
        )
    own = isinstance(base, type) and issubclass(base, Optimizer)
    if isinstance(params, nn.Module):
        module, params = params, params if own else params.parameters()
    elif own and module is not None:
        options = {**options, "module": module}
    inner = base(params, **options)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"{owner}: {base!r} made a {type(inner).__name__}, but must make a torch.optim.Optimizer")
    return inner, module


class Wrapper(NoAccumulation, torch.optim.Optimizer):
    """An optimizer around another, ``inner``: any of this library's, of torch's, or another wrapper.

    Parameter groups are those of ``inner``, so schedulers and users change them in one place. What the wrapper keeps of
    each parameter lies in ``state`` beside the state of ``inner``, and is saved and resharded with it; its own
    settings, and what it counts, lie in the groups, under names that begin with ``prefix``.

    Attributes:
        prefix: begins the names of settings in the groups.
        keeps: names of the state that the wrapper keeps, each of its parameter's shape and layout.
        inner: the optimizer that is wrapped.
        outcome: what became of the last step.
    """

    prefix: ClassVar[str]
    keeps: ClassVar[tuple[str, ...]] = ()
    inner: torch.optim.Optimizer

    def __init__(
        self, inner: torch.optim.Optimizer, settings: Mapping[str, Any], module: nn.Module | None = None
    ) -> None:
        owner = type(self).__name__
        if not isinstance(inner, torch.optim.Optimizer):
            raise TypeError(f"{owner} wraps a torch.optim.Optimizer, but was given a {type(inner).__name__}")
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"{owner}: module={module!r}: must be the nn.Module that holds the parameters")
        if any(type(other).prefix == self.prefix for other in wrappers_of(inner)):
            raise TypeError(f"{owner}: the optimizer is wrapped by {owner} already: wrap it once")
        named = {f"{self.prefix}_{name}": value for name, value in settings.items()}
        self._check(settings)
        for group in inner.param_groups:
            self._check({name: group.get(f"{self.prefix}_{name}", value) for name, value in settings.items()})
        self._model = getattr(inner, "_model", None)  # which tells how the state of ``inner`` is laid out
        if self._model is None and module is not None:
            self._model = Model(module)
        self._settings = named
        self._kept = Kept(owner, self.keeps)
        self._plan: Plan | None = None
        self.outcome: Outcome | None = None
        self._begun = False
        self.__setstate__({"inner": inner, "defaults": inner.defaults})
        for group in inner.param_groups:
            self._complete(group)

    # ------------------------------------------------------------------------------------------------ what is shared

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of ``inner``."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.inner.param_groups = groups

    @property
    def state(self) -> Mapping[torch.Tensor, dict[str, Any]]:  # type: ignore[override]
        """The state of ``inner`` and what the wrapper keeps, by parameter: for reading."""
        merged: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
        for source in (self.inner.state, self._kept.state):
            for parameter, entry in source.items():
                merged[parameter] = {**merged.get(parameter, {}), **entry}
        return merged

    @property
    def origin(self) -> torch.optim.Optimizer:
        """The innermost optimizer."""
        return self.inner.origin if isinstance(self.inner, Wrapper) else self.inner

    @property
    def skipped(self) -> int:
        """Steps that the optimizers inside left out because a gradient was not finite."""
        return int(getattr(self.inner, "skipped", 0))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(getattr(self.inner, "_step_supports_amp_scaling", False))

    def __getattr__(self, name: str) -> Any:
        """What a wrapper has not, its inner optimizer may have: ``refresh``, ``train``, ``eval`` and the like."""
        if name.startswith("_") or name in ("inner", "grad_scale", "found_inf"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(self.inner, name)
        return self._second_step if name == "second_step" else found

    def _second_step(self, zero_grad: bool = False, **extra: Any) -> Any:
        """The second step of a wrapper of the SAM family inside: this one has a part in it, too."""
        result = self.step(**extra)
        if zero_grad:
            self.zero_grad()
        return result

    def recipe(self, group: Group, shape: Shape) -> Recipe:
        """That of ``inner``, with the state that the wrapper keeps."""
        inner: Any = self.inner
        recipe: Recipe = inner.recipe(group, shape)
        return replace(recipe, state=(*recipe.state, *self.keeps))

    # --------------------------------------------------------------------------------------------------- groups

    def setting(self, group: Group, name: str) -> Any:
        """A setting, or a count, of a group."""
        return group[f"{self.prefix}_{name}"]

    def set(self, name: str, value: Any) -> None:
        """Set a setting or count in all groups."""
        for group in self.param_groups:
            group[f"{self.prefix}_{name}"] = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to ``inner``; its settings are checked first."""
        if isinstance(param_group, dict):
            self._check(
                {
                    name.removeprefix(f"{self.prefix}_"): param_group.get(name, value)
                    for name, value in self._settings.items()
                }
            )
        self.inner.add_param_group(param_group)
        self._complete(self.param_groups[-1])
        self._plan = None

    def _complete(self, group: dict[str, Any]) -> None:
        for name, value in self._settings.items():
            group.setdefault(name, value)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise ValueError if the settings of a group do not go together."""

    def _check(self, settings: Mapping[str, Any]) -> None:
        checks: Mapping[str, Check] = signature_checks(type(self))  # type: ignore[arg-type]  # classes are hashable
        check_group(type(self).__name__, settings, checks)
        self.check(settings)

    def check_settings(self) -> None:
        """Raise ValueError for the first setting that someone changed to what is out of range."""
        for group in self.param_groups:
            self._check({name.removeprefix(f"{self.prefix}_"): group[name] for name in self._settings})

    # ------------------------------------------------------------------------------------------------ the inner step

    def step_inner(self, closure: Callable[[], Any] | None = None, **extra: Any) -> Any:
        """One step of ``inner``, with what GradScaler gave. Sets ``outcome``. Returns what ``inner.step`` did."""
        rehearsed = self.rehearsing()
        given = {
            name: value for name in ("grad_scale", "found_inf") if (value := getattr(self, name, None)) is not None
        }
        for name, value in given.items():
            setattr(self.inner, name, value)
        try:
            result = self.inner.step(closure, **extra)
        finally:
            for name in given:
                delattr(self.inner, name)
        own = isinstance(self.inner, (Optimizer, Wrapper))
        if own:
            self.outcome = self.inner.outcome  # type: ignore[attr-defined]
        elif "found_inf" in given and bool(given["found_inf"]):
            self.outcome = Outcome.SKIPPED
        else:
            self.outcome = Outcome.REHEARSED if rehearsed else Outcome.DONE
        self._begun = True
        return result

    def rehearsing(self) -> bool:
        """Whether a step now may only be asked to create state, as torch.distributed.checkpoint does: a first one at
        lr 0, which the optimizers of this library tell from a warm-up."""
        if self._begun or self.inner.state or any(as_scalar(g["lr"]) != 0 for g in self.param_groups):
            return False
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        zero = all(not bool(whole_or_local(gradient).any()) for gradient in gradients)
        slots = self.plan().slots
        return gathered(zero, all, joint_groups(slots, set(slots)))

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that may run."""
        origin = self.origin
        return origin._options.backends if isinstance(origin, Optimizer) else BACKENDS

    def plan(self) -> Plan:
        """The slots of all parameters, laid out as ``inner`` lays out its state."""
        if self._plan is None or self._plan.stale(self.param_groups):
            origin = self.origin
            group = origin._shard_group if isinstance(origin, Optimizer) else None
            if self._model is not None:
                self._model.refresh()
            shard_group = None if group is None else group.group
            self._plan = Plan.of(self.param_groups, self._kept.state, shard_group, self._sums, self._model)
            if isinstance(origin, Optimizer):
                self._plan.owners_known = origin._owners_known
        return self._plan

    _current_plan = plan

    def _sums(self, group: Group, shape: Shape) -> bool:
        """Whether the wrapper needs sums over a parameter."""
        return False

    @property
    def model_groups(self) -> tuple[Any, ...]:
        """The groups over which different ranks hold different parameters."""
        origin = self.origin
        return origin._spread().model if isinstance(origin, Optimizer) else ()

    @property
    def data_groups(self) -> tuple[Any, ...]:
        """The groups over which ranks hold different data; all ranks unless ``inner`` was told."""
        origin = self.origin
        if isinstance(origin, Optimizer):
            return origin._spread().data
        return (torch.distributed.group.WORLD,) if torch.distributed.is_initialized() else ()

    def reshard(self) -> None:
        """Have FSDP gather its parameters anew at the next forward pass, after they were written."""
        reshard_fsdp2(p for group in self.param_groups for p in group["params"])
        if self._model is not None:
            self._model.reshard()

    # ------------------------------------------------------------------------------------------- saving and loading

    def state_dict(self) -> dict[str, Any]:
        """The state dict of ``inner`` with what the wrapper keeps."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        saved = self.save_inner()
        for group, packed in zip(self.param_groups, saved["param_groups"], strict=True):
            for parameter, key in zip(group["params"], packed["params"], strict=True):
                if self._kept.state.get(parameter):
                    saved["state"][key] = {**saved["state"].get(key, {}), **self._kept.state[parameter]}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, saved)
            saved = saved if changed is None else changed
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, of this wrapper around the same optimizer, under any layout.

        Raises:
            ValueError: for missing, unknown or wrongly shaped state, before anything is changed.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._check_origin(state_dict)
        rest = {
            **state_dict,
            "state": {
                key: {name: value for name, value in entry.items() if name not in self.keeps}
                for key, entry in state_dict["state"].items()
            },
        }
        self._kept.load(state_dict, self.param_groups, self.plan(), self._model, lambda: self.load_inner(rest))
        self._plan, self._begun = None, True
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def save_inner(self) -> dict[str, Any]:
        """The state dict of what is inside."""
        return self.inner.state_dict()

    def load_inner(self, state_dict: dict[str, Any]) -> None:
        """Load such a state dict. Names of parameters stay this optimizer's; torch's would take those of FSDP1."""
        names = [group.get("param_names") for group in self.inner.param_groups]
        self.inner.load_state_dict(state_dict)
        for group, own in zip(self.inner.param_groups, names, strict=True):
            group.pop("param_names", None)
            if own is not None:
                group["param_names"] = own

    def _check_origin(self, state_dict: Mapping[str, Any]) -> None:
        owner = type(self).__name__
        for key in ("state", "param_groups"):
            if key not in state_dict:
                raise ValueError(
                    f"{owner}: the state dict has no {key!r}: give what state_dict() of an optimizer returned"
                )
        for entry in state_dict["state"].values():
            for name in entry:
                if name.startswith(f"{self.prefix}_") and name not in self.keeps:
                    raise ValueError(
                        f"{owner}: the state dict has {name!r}, which this {owner} does not keep: it was saved by one "
                        "with other options; make it with the same"
                    )
        for number, group in enumerate(state_dict["param_groups"]):
            for name in self._settings:
                if name not in group:
                    raise ValueError(
                        f"{owner}: group {number} of the state dict has no {name!r}: it was saved without {owner}; "
                        f"load it into the optimizer inside, before it is wrapped: {owner}(optimizer)"
                    )

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if not name.startswith("_optimizer_")}
        kept.pop("step", None)  # as schedulers replace it
        return {**kept, "_plan": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__} around {self.inner!r}"


def check_no_closure(owner: str, optimizer: torch.optim.Optimizer) -> None:
    """Raise TypeError for an optimizer whose step demands a closure: it would go through passes of its own."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{owner} cannot wrap {type(optimizer).__name__}, whose step needs a closure that it calls as it likes: "
            f"wrap an optimizer whose step() takes gradients as they are, as torch.optim.SGD"
        )


def wrappers_of(optimizer: torch.optim.Optimizer) -> list[Wrapper]:
    """An optimizer's wrappers, from the outermost in."""
    found = []
    while isinstance(optimizer, Wrapper):
        found.append(optimizer)
        optimizer = optimizer.inner
    return found


Own = Optimizer | Wrapper
"""What knows its layouts: an optimizer of this library, or a wrapper around one."""


def check_own(asked: str, optimizer: Any) -> None:
    """Raise TypeError for an optimizer whose recipe is not known."""
    origin = optimizer.origin if isinstance(optimizer, Wrapper) else optimizer
    if not isinstance(origin, Optimizer):
        raise TypeError(f"{asked} takes an optimizer of oput_dist, but this is a {type(origin).__name__}")
