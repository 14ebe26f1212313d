"""Options of a whole optimizer: checked, and brought into the form that steps take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from oput_dist.backends import BACKENDS, check_backend
from oput_dist.kernels.codes import Format
from oput_dist.kernels.stage import Write
from oput_dist.layout import whole_or_local

from .hosted import Home
from .hyper import boolean, check_group, nearest, optional, positive
from .slot import Slot
from .storage import Storage, storage_of
from .writing import write_of

__all__ = ["GroupHandle", "Options", "check_home", "check_rounded", "group_handle", "options_of", "releases"]


@dataclass(frozen=True)
class Options:
    """What holds for a whole optimizer."""

    backends: tuple[str, ...] = BACKENDS
    state_dtype: torch.dtype | None = None
    """Of all state, where :attr:`storage` is None."""
    storage: Storage | None = None
    """In what form each state is kept, where that differs."""
    write: Write = Write.KAHAN
    """How parameters of 16 bits are written."""
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    accumulate: bool = False
    """Whether gradients, without weight decay, go into the state only, and parameters stay as they are."""
    home: Home | None = None
    """Where state lives away from the parameters."""

    @property
    def opens(self) -> bool:
        """Whether steps open and close state, for it is kept in another form or in another place than they need."""
        return self.storage is not None or self.home is not None

    def form(self, name: str, slot: Slot) -> torch.dtype | Format | None:
        """The form of a state of a parameter; None for the parameter's own dtype."""
        return self.state_dtype if self.storage is None else self.storage.of(name, slot)


class GroupHandle:
    """Holds a process group, which can be neither copied nor pickled, inside an optimizer that can."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> GroupHandle:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimizer with shard_group= cannot be pickled, since a process group cannot: save its state_dict()"
        )


def options_of(owner: str, common: Mapping[str, Any]) -> Options:
    """The options that every step needs.

    Raises:
        ValueError: for one that is out of range, or that goes with no other that was given.
    """
    kept = storage_of(owner, common.get("state_dtype"), common.get("state_overrides"))
    return Options(
        _backends(owner, common),
        None if isinstance(kept, Storage) else kept,
        kept if isinstance(kept, Storage) else None,
        _write(owner, common),
        _max_grad_norm(owner, common),
        _skip_nonfinite(owner, common),
        home=_home(owner, common.get("state_device")),
    )


def releases(owner: str, common: Mapping[str, Any], options: Options) -> bool:
    """Whether gradients are to be released in the backward pass.

    Raises:
        ValueError: together with what needs all gradients at once.
    """
    value = common.get("gradient_release", False)
    check_group(owner, {"gradient_release": value}, {"gradient_release": boolean})
    for name, given in (("max_grad_norm", options.max_grad_norm), ("skip_nonfinite", options.skip_nonfinite)):
        if value and given:
            raise ValueError(
                f"{owner}: gradient_release=True and {name}={given} cannot go together: {name} must see all gradients "
                "at once, and gradient release frees each before the next is there; leave one of them out"
            )
    return bool(value)


def _backends(owner: str, common: Mapping[str, Any]) -> tuple[str, ...]:
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


def _write(owner: str, common: Mapping[str, Any]) -> Write:
    kahan, stochastic = common.get("kahan_sum"), common.get("stochastic_rounding", False)
    check_group(owner, {"kahan_sum": kahan}, {"kahan_sum": optional(boolean)})
    check_group(owner, {"stochastic_rounding": stochastic}, {"stochastic_rounding": boolean})
    if kahan and stochastic:
        raise ValueError(
            f"{owner}: kahan_sum=True and stochastic_rounding=True cannot go together: each is a way "
            "to lose nothing in rounding; leave one of them out"
        )
    if stochastic:
        return Write.STOCHASTIC
    return Write.NEAREST if kahan is False else Write.KAHAN


def check_rounded(owner: str, options: Options, params: Iterable[torch.Tensor]) -> None:
    """Raise ValueError for stochastic rounding where no parameter is rounded."""
    if options.write is Write.STOCHASTIC and all(write_of(options.write, p.dtype) is Write.NEAREST for p in params):
        raise ValueError(
            f"{owner}: stochastic_rounding=True, but no parameter is bfloat16 or float16, and others are not rounded: "
            "leave it out, or cast the model first: oput.to_low_precision(model)"
        )


def _home(owner: str, given: Any) -> Home | None:
    if given is None or isinstance(given, Home):
        return given
    if str(given) != "cpu":
        raise ValueError(
            f"{owner}: state_device={given!r} is not allowed: must be None, for state beside the parameters, or 'cpu', "
            f"for state in host memory{nearest(str(given), ('cpu',))}"
        )
    return Home("cuda")


def check_home(owner: str, options: Options, params: Iterable[torch.Tensor]) -> None:
    """Raise ValueError for state in host memory where no parameter is on a device that would bring it from there."""
    found = {whole_or_local(p).device for p in params}
    if options.home is not None and not any(options.home.serves(device) for device in found):
        places = " and ".join(sorted(map(str, found)))
        raise ValueError(
            f"{owner}: state_device='cpu' is for parameters on a GPU, but these are on {places}, and so is their "
            "state: leave state_device out, or move the module to the GPU before the optimizer is made"
        )


def _max_grad_norm(owner: str, common: Mapping[str, Any]) -> float | None:
    value: float | None = common.get("max_grad_norm")
    check_group(owner, {"max_grad_norm": value}, {"max_grad_norm": optional(positive)})
    return value


def _skip_nonfinite(owner: str, common: Mapping[str, Any]) -> bool:
    value: bool = common.get("skip_nonfinite", False)
    check_group(owner, {"skip_nonfinite": value}, {"skip_nonfinite": boolean})
    return value


def group_handle(owner: str, common: Mapping[str, Any], name: str) -> GroupHandle | None:
    group: Any = common.get(name)
    if group is None:
        return None
    if not isinstance(group, dist.ProcessGroup) or dist.get_rank(group) < 0:
        raise TypeError(f"{owner}: {name}={group!r}: must be a process group that this rank belongs to")
    return GroupHandle(group)
