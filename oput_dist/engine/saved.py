"""The form of the state dicts that are written here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from oput_dist.layout import LayoutError
from oput_dist.layout.flattened import is_flattened

from .agree import gathered, joint_groups
from .forms import with_tensors
from .matrices import matrices_in, owning_slots
from .owned import kept_by
from .slot import Slot
from .writing import COMPENSATION

__all__ = ["FORMAT", "FORMAT_KEY", "WHOLE_KEY", "completed"]

FORMAT = 1
"""The version of the state dicts. Later ones are refused."""
FORMAT_KEY = "oput_format"
"""The key of a parameter group that holds it: torch.distributed.checkpoint carries keys of groups, and no others."""
WHOLE_KEY = "oput_whole"
"""Is set in what :func:`oput_dist.full_state_dict` returns: every parameter has an entry there, FSDP1's too."""


def completed(optimizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
    """What ``torch.optim.Optimizer.state_dict`` returned, in the form of this library.

    Parameters without state get an empty entry, so that it shows if one was lost; but not those that FSDP1 flattened,
    whose own functions take an entry for state. Tensors in groups are copies: what loads fills them in place.

    Raises:
        LayoutError: if torch's own functions for FSDP1 ask, and there is state that they cannot carry.
    """
    for group in saved["param_groups"]:
        group.update({key: value.clone() for key, value in group.items() if isinstance(value, torch.Tensor)})
    _decode(optimizer, saved)
    spread_owned(optimizer, saved)
    flattened = False
    for group, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, key in zip(group["params"], packed["params"], strict=True):
            if is_flattened(parameter):
                flattened = True
            elif saved["state"]:
                saved["state"].setdefault(key, {})
    if flattened and _asked_by_torch():
        _check_shapes(optimizer)
    return saved


def _check_shapes(optimizer: Any) -> None:
    """torch's functions for FSDP1 cut all state as the parameter is cut, and fail in the midst of it where it is not.

    Decided by metadata only, so that all ranks raise.
    """
    for slot in optimizer._current_plan().slots:
        recipe = optimizer.recipe(optimizer.param_groups[slot.group], slot.layout.shape)
        others = [*(name for name, _ in recipe.vectors), *kept_by(recipe.whole, slot)]
        if is_flattened(slot.parameter) and others:
            raise LayoutError(
                f"{type(optimizer).__name__}: {others[0]!r} of {slot.name} has not the shape of its "
                "parameter, and torch's own state dicts of FSDP1 (FullyShardedDataParallel) carry no such state: save "
                "oput.full_state_dict(optimizer) and load it with optimizer.load_state_dict, or wrap the model with "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )


def _decode(optimizer: Any, saved: dict[str, Any]) -> None:
    """Put tensors in place of what steps open: they reshard, and load under any other form of the state."""
    if not optimizer.options.opens:
        return
    every: dict[torch.Tensor, list[Slot]] = {}
    for slot in optimizer._current_plan().slots:
        every.setdefault(slot.parameter, []).append(slot)
    for group, packed in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, key in zip(group["params"], packed["params"], strict=True):
            if saved["state"].get(key):
                slots = every[parameter]
                names = [(COMPENSATION, *optimizer.recipe(group, slot.layout.shape).state) for slot in slots]
                saved["state"][key] = with_tensors(slots, saved["state"][key], names)


def spread_owned(optimizer: Any, saved: dict[str, Any]) -> None:
    """Put in place of what owners of matrices keep for themselves what checkpoints reshard; all ranks must call it."""
    if not optimizer.works_on_matrices():
        return
    plan, groups = optimizer._current_plan(), optimizer.param_groups
    owning = owning_slots(optimizer, plan, groups)
    if not owning:  # so that replicas of Muon need not meet
        return
    matrices = matrices_in(optimizer, plan, groups)
    keys = {
        p: key
        for group, packed in zip(groups, saved["param_groups"], strict=True)
        for p, key in zip(group["params"], packed["params"], strict=True)
    }
    every = [(slot, owned) for slot in plan.slots if matrices is not None and (owned := matrices.owned(slot))]
    present = [
        [slot.key(name) in optimizer.state.get(slot.parameter, {}) for name in owned.names] for slot, owned in every
    ]
    present = gathered(present, _anywhere, joint_groups(plan.slots, owning))
    for (slot, owned), row in zip(every, present, strict=True):
        state = optimizer.state.get(slot.parameter, {})
        made = {slot.key(n): owned.spread(state, n) for n, there in zip(owned.names, row, strict=True) if there}
        found = {name: tensor for name, tensor in made.items() if tensor is not None}
        if found:
            saved["state"][keys[slot.parameter]] = {**saved["state"].get(keys[slot.parameter], {}), **found}


def _anywhere(ranks: Sequence[list[list[bool]]]) -> list[list[bool]]:
    return [[any(each) for each in zip(*rows, strict=True)] for rows in zip(*ranks, strict=True)]


def _asked_by_torch() -> bool:
    """Whether a state dict is made for torch.distributed.checkpoint or FSDP1, which do not tell."""
    frame = sys._getframe(2)
    for _ in range(12):  # wrappers stand between
        if frame.f_back is None:
            return False
        frame = frame.f_back
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp.")):
            return True
    return False
