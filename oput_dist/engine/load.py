"""Loading a state dict: checked whole before the first change, cut to this rank's pieces, dtypes kept."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch

from oput_dist.layout import LayoutError

from .plan import Plan
from .slot import Slot

__all__ = ["load_state_dict"]


def load_state_dict(optimizer: Any, state_dict: dict[str, Any], plan: Plan) -> None:
    """Load ``state_dict`` into ``optimizer``, whose current plan is given.

    torch's own method casts every state tensor to its parameter's dtype, so fp32 moments of bf16 parameters would not
    survive; and it knows nothing of pieces.
    """
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    owner = type(optimizer).__name__
    saved = state_dict["param_groups"]
    sizes, given = [len(g["params"]) for g in optimizer.param_groups], [len(g["params"]) for g in saved]
    if sizes != given:
        raise ValueError(
            f"{owner}: the state dict is of another model: its parameter groups hold {given} parameters, "
            f"but this optimizer's hold {sizes}"
        )
    groups = [_merged(old, new) for old, new in zip(optimizer.param_groups, saved, strict=True)]
    keys = [key for group in saved for key in group["params"]]
    slots = dict(zip(keys, plan.slots, strict=True))
    state: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
    for key, entries in state_dict["state"].items():
        slot = slots.get(key)
        if slot is None:
            raise ValueError(f"{owner}: the state dict holds state for an unknown parameter {key!r}")
        names = optimizer.recipe(groups[slot.group]).state
        state[slot.parameter] = _adopted(owner, slot, entries, names)
    optimizer.__setstate__({"state": state, "param_groups": groups})
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)


def _merged(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The saved hyperparameters with this optimizer's parameters; what the saved group lacks keeps its value."""
    # Names are this optimizer's: wrappers rename parameters, and torch takes no account of them either.
    return {**group, **{key: deepcopy(value) for key, value in saved.items() if key not in ("params", "param_names")}}


def _adopted(owner: str, slot: Slot, entries: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The state of one parameter as this rank keeps it."""
    missing = [name for name in names if name not in entries]
    unknown = [name for name in entries if name not in names and name != "step"]
    if entries and (missing or "step" not in entries):
        raise ValueError(
            f"{owner}: the state of {slot.name} lacks {(missing or ['step'])[0]!r}: it was saved by another optimizer"
        )
    if unknown:
        raise ValueError(f"{owner}: the state of {slot.name} has {unknown[0]!r}, which this optimizer does not keep")
    result: dict[str, Any] = {}
    for name, value in entries.items():
        if name == "step":
            result[name] = torch.tensor(float(value), dtype=torch.float32)
            continue
        try:
            result[name] = slot.layout.adopt(value)
        except LayoutError as error:
            raise ValueError(f"{owner}: {name!r} of {slot.name}: {error}") from None
    return result
