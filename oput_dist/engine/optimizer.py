"""The base class of all optimizers: torch.optim's contract on the outside, the engine inside."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypedDict

import torch
import torch.distributed as dist
from torch import nn

from oput_dist.backends import BACKENDS, check_backend

from .hyper import Check, boolean, check_group, nearest, nonnegative, optional, positive
from .load import load_state_dict
from .plan import Plan
from .recipe import Group, Recipe, Shape
from .step import Options, Step

__all__ = ["Common", "Optimizer", "Params"]

Params = nn.Module | Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]


class Common(TypedDict, total=False):
    """Keywords that every optimizer takes.

    - ``decouple_lr`` (bool, False): decay by ``lr / max_lr * weight_decay``, fully decoupled from the learning rate.
      Typical values of ``weight_decay`` are then 1e-5 to 1e-4.
    - ``max_lr`` (float > 0): the largest learning rate of the schedule; a group's own initial ``lr`` if not given.
    - ``maximize`` (bool, False): ascend.
    - ``max_grad_norm`` (float > 0): clip the global gradient norm inside the update; gradients stay as they are.
    - ``backend`` (str): ``"triton"``, ``"compile"``, ``"foreach"`` or ``"eager"``; by default the fastest.
    - ``foreach``, ``triton`` (bool): True takes that backend, False rules it out.
    - ``shard_group`` (ProcessGroup): partition update and state of replicated parameters over it (ZeRO-1).
    - ``state_dtype`` (torch.dtype): of the state; the parameter's own by default.
    """

    decouple_lr: bool
    max_lr: float | None
    maximize: bool
    max_grad_norm: float | None
    foreach: bool | None
    triton: bool | None
    backend: str | None
    shard_group: dist.ProcessGroup | None
    state_dtype: torch.dtype | None


_GROUP_COMMON: dict[str, Check] = {
    "lr": nonnegative,
    "weight_decay": nonnegative,
    "decouple_lr": boolean,
    "max_lr": optional(positive),
    "maximize": boolean,
}
_STATE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class _GroupHandle:
    """Holds a process group, which can be neither copied nor pickled, inside an optimizer that can."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> _GroupHandle:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimizer with shard_group= cannot be pickled, since a process group cannot: save its state_dict()"
        )


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer whose update is a :class:`Recipe` of rules. Subclasses give the recipe and its scalars.

    Attributes:
        checks: what each hyperparameter of a group must satisfy, beyond the common ones.
    """

    checks: ClassVar[Mapping[str, Check]] = {}

    def __init__(self, params: Params, defaults: dict[str, Any], common: Common) -> None:
        unknown = [name for name in common if name not in Common.__annotations__]
        owner = type(self).__name__
        if unknown:
            known = [*defaults, *Common.__annotations__]
            raise TypeError(f"{owner} has no option {unknown[0]!r}.{nearest(unknown[0], known)}")
        self._options = Options(_backends(owner, common), _state_dtype(owner, common), _max_grad_norm(owner, common))
        group = common.get("shard_group")
        self._shard_group = None if group is None else _GroupHandle(_checked_group(owner, group))
        self._plan: Plan | None = None
        self._begun = False
        every = {
            **defaults,
            "decouple_lr": common.get("decouple_lr", False),
            "max_lr": common.get("max_lr"),
            "maximize": common.get("maximize", False),
            "optimizer": owner,
        }
        self.validate(every)
        if isinstance(params, nn.Module):
            params = list(params.named_parameters())
        super().__init__(params, every)

    @abstractmethod
    def recipe(self, group: Group, shape: Shape) -> Recipe:
        """The stages and state of the parameters of one global shape in a group. Must not depend on the step."""

    def validate(self, group: Group) -> None:
        """Raise ValueError for the first hyperparameter of a group that is out of range."""
        owner = type(self).__name__
        check_group(owner, group, {**_GROUP_COMMON, **self.checks})
        self.check(group)
        if group["decouple_lr"] and group["max_lr"] is None and float(group["lr"]) == 0:
            raise ValueError(f"{owner}: decouple_lr=True with lr=0: give max_lr, the largest rate of the schedule")

    def check(self, group: Group) -> None:
        """Raise ValueError if the hyperparameters of a group do not go together."""

    @abstractmethod
    def scalars(self, group: Group, step: int) -> Any:
        """The NamedTuple ``h`` that the rules see, for a group at step ``1, 2, ...``, computed in float64."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its hyperparameters and parameters are checked first."""
        if isinstance(param_group, dict):
            self._check_new_group(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["decouple_lr"] and group["max_lr"] is None:
            group["max_lr"] = float(group["lr"])
        self._plan = None

    def _check_new_group(self, param_group: dict[str, Any]) -> None:
        owner = type(self).__name__
        if not isinstance(param_group.get("params"), (torch.Tensor, set)):
            param_group["params"] = list(param_group["params"])
        self.validate({**self.defaults, **param_group})
        for name in param_group:
            if name not in self.defaults and (near := nearest(name, self.defaults, cutoff=0.85)):
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

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.validate(group)
        plan, first = self._current_plan(), not self._begun
        Step(plan, self.param_groups, self.state, self.recipe, self.scalars, self._options, first).run()
        self._begun = True
        return loss

    def _current_plan(self) -> Plan:
        if self._plan is None or self._plan.stale(self.param_groups):
            group = self._shard_group.group if self._shard_group is not None else None
            clip = self._options.max_grad_norm is not None
            sums = [clip or any(self.recipe(g, p.shape).measures for p in g["params"]) for g in self.param_groups]
            self._plan = Plan.of(self.param_groups, self.state, group, sums)
        return self._plan

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, of this class under any layout: whole tensors are cut to this rank's pieces.

        State keeps its dtype. Missing, unknown or wrongly shaped state raises ValueError before anything is changed.
        """
        load_state_dict(self, state_dict, self._current_plan())
        self._plan = None
        self._begun = True

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        own = {"_options": self._options, "_shard_group": self._shard_group, "_begun": self._begun}
        return {**kept, **own, "_plan": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.state = self.state if isinstance(self.state, defaultdict) else defaultdict(dict, self.state)
        self._plan = None


def _backends(owner: str, common: Common) -> tuple[str, ...]:
    """The backends that ``backend``, ``triton`` and ``foreach`` together leave to choose from."""
    asked = {name for name in ("triton", "foreach") if common.get(name)}
    if common.get("backend") is not None:
        asked.add(str(common["backend"]))
    if len(asked) > 1:
        raise ValueError(f"{owner}: {' and '.join(sorted(asked))} are both asked for; give backend= alone")
    for name in asked:
        check_backend(name)
    refused = {name for name in ("triton", "foreach") if common.get(name) is False}
    return tuple(asked) or tuple(name for name in BACKENDS if name not in refused)


def _state_dtype(owner: str, common: Common) -> torch.dtype | None:
    dtype = common.get("state_dtype")
    if dtype is not None and dtype not in _STATE_DTYPES:
        raise ValueError(
            f"{owner}: state_dtype={dtype!r} is not allowed: must be None or one of "
            f"{', '.join(map(str, _STATE_DTYPES))}"
        )
    return dtype


def _max_grad_norm(owner: str, common: Common) -> float | None:
    value = common.get("max_grad_norm")
    check_group(owner, {"max_grad_norm": value}, {"max_grad_norm": optional(positive)})
    return value


def _checked_group(owner: str, group: Any) -> dist.ProcessGroup:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{owner}: shard_group={group!r}: must be a process group that this rank belongs to")
    return group
