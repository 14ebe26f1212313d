"""State dicts with whole tensors, for a plain ``torch.save`` and for any other layout."""

from __future__ import annotations

from collections.abc import Container, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist

from oput_dist.layout import LayoutError, flat

from .agree import gathered, joint_groups
from .forms import dtype_of, value_of
from .match import qualified_names
from .matrices import matrices_of
from .owned import kept_by
from .plan import Plan
from .recipe import Recipe
from .saved import WHOLE_KEY
from .slot import Slot
from .wrapper import Own, check_own
from .writing import COMPENSATION

__all__ = ["full_state_dict", "put_together"]

_Found = dict[str, torch.dtype]
"""The state of a slot that exists on some rank; empty where none does."""


@torch.no_grad()
def full_state_dict(optimizer: Own, *, keep: bool = True) -> dict[str, Any]:
    """The state dict with whole tensors in global shapes, on the CPU, whatever the layout.

    What ``torch.save`` writes of it, ``load_state_dict`` takes under any layout and number of ranks, on every rank, and
    training goes on along the same trajectory. Its form is torch's, with one entry for each original parameter, also
    where FSDP1 made one flat parameter of several.

    Every rank that holds a part of the parameters must call this; where ``Shampoo`` or ``SOAP`` got a module under
    ``DistributedDataParallel`` all its ranks, since each has a part of the state. Beyond the
    result, no rank holds more than one whole state tensor at a time.

    Args:
        optimizer: the optimizer.
        keep: whether this rank wants the result. Example: ``full_state_dict(optimizer, keep=dist.get_rank() == 0)``.

    Returns:
        the state dict; ``{}`` with ``keep=False``.

    Raises:
        TypeError: if the optimizer is none of oput_dist's.
        LayoutError: for parameters that FSDP1 flattened, if the optimizer was not given the module.
    """
    check_own("full_state_dict", optimizer)
    plan = optimizer._current_plan()
    for slot in plan.slots:
        if slot.layout.why_no_sums is not None:
            raise LayoutError(f"{slot.name}: its whole state cannot be put together. {slot.layout.why_no_sums}")
    recipes = [optimizer.recipe(optimizer.param_groups[slot.group], slot.layout.shape) for slot in plan.slots]
    owning = {slot for slot, recipe in zip(plan.slots, recipes, strict=True) if kept_by(recipe.whole, slot)}
    matrices = matrices_of(plan, recipes) if owning else None
    found, steps = _everywhere(optimizer, plan, recipes, owning)
    scratch: dict[torch.device, torch.Tensor] = {}
    state: dict[int, dict[str, Any]] = {}
    for i, slot in enumerate(plan.slots):
        own = optimizer.state.get(slot.parameter, {})
        state[i] = {}
        for name in _shaped(recipes[i]):
            if name in found[i]:
                whole = put_together(slot, value_of(slot, own, name), found[i][name], scratch, keep)
                if whole is not None:
                    state[i][name] = whole
        state[i] |= {name: _copy(value) for name, value in _vectors(slot, own, recipes[i]).items()}
        owned = None if matrices is None else matrices.owned(slot)
        if owned is not None:
            state[i] |= {name: _copy(owned.whole(own, name)) for name in owned.names if name in found[i]}
        if steps[i] is not None:
            state[i]["step"] = torch.tensor(steps[i], dtype=torch.float32, device="cpu")
    if not keep:
        return {}
    kept_state = state if any(state.values()) else {}
    return {"state": kept_state, "param_groups": _groups(optimizer, plan), WHOLE_KEY: True}


def _shaped(recipe: Recipe) -> tuple[str, ...]:
    """State that may be there in the shape of the parameter."""
    return (*recipe.state, COMPENSATION)


def _everywhere(
    optimizer: Own, plan: Plan, recipes: Sequence[Recipe], owning: Container[Slot]
) -> tuple[list[_Found], list[float | None]]:
    """What state each slot has on any rank, and its step count: the largest, as a rank without gradient lags behind."""
    found: list[tuple[_Found, float | None]] = []
    for slot, recipe in zip(plan.slots, recipes, strict=True):
        own = optimizer.state.get(slot.parameter, {})
        dtypes = {name: form for name in _shaped(recipe) if (form := dtype_of(slot, own, name)) is not None}
        kept = [name for name in kept_by(recipe.whole, slot) if own.get(slot.key(name)) is not None]
        dtypes |= {name: own[slot.key(name)].dtype for name in kept}
        found.append((dtypes, float(own["step"]) if "step" in own else None))
    found = gathered(found, _merged, joint_groups(plan.slots, owning))
    return [dtypes for dtypes, _ in found], [step for _, step in found]


def _merged(ranks: Sequence[list[tuple[_Found, float | None]]]) -> list[tuple[_Found, float | None]]:
    merged: list[tuple[_Found, float | None]] = []
    for rows in zip(*ranks, strict=True):
        dtypes = {name: dtype for row, _ in reversed(rows) for name, dtype in row.items()}
        merged.append((dtypes, max((step for _, step in rows if step is not None), default=None)))
    return merged


def put_together(
    slot: Slot, value: torch.Tensor | None, dtype: torch.dtype, scratch: dict[torch.device, torch.Tensor], keep: bool
) -> torch.Tensor | None:
    """A state tensor put together from the pieces of all ranks; None if not kept.

    Bits are added up, not numbers: every element has one owner, and 0 + x would turn -0.0 into 0.0.

    Args:
        slot: the slot.
        value: what this rank holds.
        dtype: of the tensor.
        scratch: memory for one whole tensor on each device; it grows to the largest.
        keep: whether this rank wants the result.
    """
    layout = slot.layout
    if not layout.groups:
        return _copy(layout.piece_of_state(value)).contiguous() if keep and value is not None else None
    size = layout.shape.numel() * dtype.itemsize
    if slot.device not in scratch or scratch[slot.device].numel() < size:
        scratch.pop(slot.device, None)  # before there is another
        scratch[slot.device] = torch.empty(size, dtype=torch.uint8, device=slot.device)
    bits = scratch[slot.device][:size].zero_()
    whole = bits.view(dtype).view(layout.shape)
    if value is not None:
        piece = flat(layout.piece_of_state(value), slot.strides).to(slot.device)
        for box, part in zip(slot.boxes, slot.views(piece), strict=True):
            whole[box.index] = part
    for group in layout.groups:
        dist.all_reduce(bits, group=group)
    return _copy(whole) if keep else None


def _vectors(slot: Slot, own: dict[str, Any], recipe: Recipe) -> dict[str, torch.Tensor]:
    """State that is not parameter-shaped: replicated, so this rank has it whole."""
    held = {name: own.get(slot.key(name)) for name, _ in recipe.vectors}
    return {name: slot.layout.memory_of_vector(value) for name, value in held.items() if value is not None}


def _groups(optimizer: Own, plan: Plan) -> list[dict[str, Any]]:
    """The parameter groups, which list the slots."""
    names = qualified_names(optimizer, plan.slots)
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        own = [i for i, slot in enumerate(plan.slots) if slot.group == number]
        packed = {key: _copy(value) for key, value in group.items() if key not in ("params", "param_names")}
        if None not in (known := [names[i] for i in own]):
            packed["param_names"] = known
        groups.append({**packed, "params": own})
    return groups


def _copy(value: Any) -> Any:
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else deepcopy(value)
