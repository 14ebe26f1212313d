"""The form of the state dicts that are written here."""

from __future__ import annotations

import sys
from typing import Any

import torch

from oput_dist.layout import LayoutError
from oput_dist.layout.flattened import is_flattened

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
        if is_flattened(slot.parameter) and recipe.vectors:
            raise LayoutError(
                f"{type(optimizer).__name__}: {recipe.vectors[0][0]!r} of {slot.name} has not the shape of its "
                "parameter, and torch's own state dicts of FSDP1 (FullyShardedDataParallel) carry no such state: save "
                "oput.full_state_dict(optimizer) and load it with optimizer.load_state_dict, or wrap the model with "
                "torch.distributed.fsdp.fully_shard (FSDP2)"
            )


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
