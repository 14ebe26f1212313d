"""Loading a state dict: checked whole before the first change, cut to this rank's pieces, dtypes kept."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any

import torch

from oput_dist.layout import LayoutError

from .plan import Plan
from .recipe import Group, vector_shape
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
    for group in saved:
        if group.get("optimizer", owner) != owner:
            raise ValueError(f"{owner}: the state dict was saved by {group['optimizer']}: make the same optimizer")
    groups = [_merged(old, new) for old, new in zip(optimizer.param_groups, saved, strict=True)]
    keys = [key for group in saved for key in group["params"]]
    slots: dict[Any, list[Slot]] = {key: [] for key in keys}
    by_parameter = dict(zip((slot.counter for slot in plan.owners), keys, strict=True))
    for slot in plan.slots:
        slots[by_parameter[slot.counter]].append(slot)
    state: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
    for key, entries in state_dict["state"].items():
        if key not in slots:
            raise ValueError(f"{owner}: the state dict holds state for an unknown parameter {key!r}")
        owner_slot = slots[key][0]
        own = "optimizer" in saved[owner_slot.group]
        state[owner_slot.parameter] = _adopted(optimizer, slots[key], entries, groups[owner_slot.group], own)
    for group in groups:
        optimizer.validate(group)
    optimizer.__setstate__({"state": state, "param_groups": groups})
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)


def _merged(group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
    """The saved hyperparameters with this optimizer's parameters; what the saved group lacks keeps its value."""
    # Names are this optimizer's: wrappers rename parameters, and torch takes no account of them either.
    return {**group, **{key: deepcopy(value) for key, value in saved.items() if key not in ("params", "param_names")}}


def _adopted(optimizer: Any, slots: list[Slot], entries: dict[str, Any], group: Group, own: bool) -> dict[str, Any]:
    """The state of one parameter as this rank keeps it; ``own`` if this class saved it, options as they then were."""
    slot, owner = slots[0], type(optimizer).__name__
    recipes = [optimizer.recipe(group, each.layout.shape) for each in slots]
    shaped = {name for recipe in recipes for name in recipe.state}
    vectors = {
        each.key(name): (each, vector_shape(each.layout.shape, axes))
        for each, recipe in zip(slots, recipes, strict=True)
        for name, axes in recipe.vectors
    }
    names = [*shaped, *vectors]
    entries = {name: value for name, value in entries.items() if value is not None}
    if not own:  # from elsewhere: only what fits exactly
        for name in entries:
            if name not in names and name != "step":
                raise ValueError(f"{owner}: the state of {slot.name} has {name!r}, which this optimizer does not keep")
        for name in names if entries else ():
            if name not in entries:
                raise ValueError(f"{owner}: the state of {slot.name} lacks {name!r}: it was saved by another optimizer")
    result: dict[str, Any] = {}
    for name, value in entries.items():
        if name not in names:  # of an option that was switched off since
            continue
        try:
            if name in vectors:
                each, shape = vectors[name]
                result[name] = each.layout.adopt_vector(value, shape)
            else:
                result[name] = slot.layout.adopt(value)
        except LayoutError as error:
            raise ValueError(f"{owner}: {name!r} of {slot.name}: {error}") from None
    if entries:
        result["step"] = torch.tensor(_step(optimizer, slot, entries, group), dtype=torch.float32)
    return result


def _step(optimizer: Any, slot: Slot, entries: dict[str, Any], group: Group) -> float:
    """The counter. torch's SGD keeps none: where all steps after the first are alike, one will do."""
    if "step" in entries:
        return float(entries["step"])
    if optimizer.scalars(group, 2) == optimizer.scalars(group, 3):
        return 1.0
    raise ValueError(
        f"{type(optimizer).__name__}: the state of {slot.name} lacks 'step': it was saved by another optimizer"
    )
