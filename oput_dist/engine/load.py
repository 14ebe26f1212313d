"""Loading a state dict: checked whole, on all ranks, before the first change; cut to this rank's pieces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from oput_dist.layout import Fragment
from oput_dist.layout.dtensor import whole_tensor
from oput_dist.layout.flattened import is_flattened

from .agree import agreed, joint_groups
from .forms import put_away
from .match import matched, owner_of
from .matrices import matrices_in, owning_slots
from .owned import kept_by
from .plan import Plan
from .recipe import Group, vector_shape
from .saved import FORMAT, FORMAT_KEY, WHOLE_KEY
from .slot import Slot
from .writing import COMPENSATION, compensated

__all__ = ["adopt", "checked", "load_state_dict"]

_REMEDY = "load a state dict of this model, laid out alike or whole (oput.full_state_dict)"
_IDENTITY = ("params", "param_names", "optimizer", FORMAT_KEY)  # keys of a saved group that are not hyperparameters


@dataclass
class _Entry:
    """The state of one slot, checked: what is to be adopted."""

    slot: Slot
    joint: bool
    """Whether the tensors are a flat parameter's, which other slots share."""
    tensors: dict[str, torch.Tensor]
    vectors: dict[str, tuple[torch.Tensor, tuple[int, ...]]]
    """Each with the shape it must get."""
    owned: dict[str, torch.Tensor]
    """What owners of matrices keep, by key."""
    step: float | None
    """None where nothing of the parameter is on this rank, and so nothing was counted."""


@dataclass(frozen=True)
class _Source:
    """Where the state of a slot comes from."""

    own: bool
    """Whether this library saved it, with options as they then were."""
    whole: bool
    """Whether it is whole, and so every parameter has its own, with a step count."""
    slots: Sequence[Slot]
    """The slots that it is for: several for the state of a flat parameter of FSDP1, in one piece."""


def load_state_dict(optimizer: Any, state_dict: dict[str, Any], plan: Plan) -> None:
    """Load ``state_dict`` into ``optimizer``, whose current plan is given.

    torch's own method casts every state tensor to its parameter's dtype, so fp32 moments of bf16 parameters would not
    survive; and it knows nothing of pieces.
    """
    shared = set(plan.slots) if optimizer.works_on_matrices() else set()
    owner, ranks = owner_of(optimizer), joint_groups(plan.slots, shared)
    groups, entries = agreed(lambda: checked(optimizer, state_dict, plan), ranks, owner)
    state: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
    for entry in entries:
        adopt(entry, state[entry.slot.parameter])
        put_away(entry.slot, state[entry.slot.parameter], entry.tensors, optimizer.options)
    if owning_slots(optimizer, plan, groups):
        _settle(optimizer, plan, groups, entries, state)
    optimizer.__setstate__({"state": state, "param_groups": groups})
    for hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        hook(optimizer)


def _settle(
    optimizer: Any,
    plan: Plan,
    groups: Sequence[Group],
    entries: Sequence[_Entry],
    state: defaultdict[torch.Tensor, dict[str, Any]],
) -> None:
    """Give what owners of matrices keep to the owners. Every rank must call it."""
    matrices = matrices_in(optimizer, plan, groups)
    if matrices is None:
        return
    every = [(entry, owned) for entry in entries if (owned := matrices.owned(entry.slot)) is not None]

    def check() -> tuple[None, str]:
        for entry, owned in every:
            for name in owned.names:
                if entry.owned or entry.step:
                    owned.check(entry.owned.get(entry.slot.key(name)), name)
        return None, ""

    agreed(check, joint_groups(plan.slots, set(plan.slots)), owner_of(optimizer))
    for entry, owned in every:
        for name in owned.names:
            value = entry.owned.get(entry.slot.key(name))
            if value is not None and (mine := owned.adopt(value, name)) is not None:
                state[entry.slot.parameter][entry.slot.key(name)] = mine


def checked(
    optimizer: Any, state_dict: dict[str, Any], plan: Plan
) -> tuple[tuple[list[dict[str, Any]], list[_Entry]], str]:
    """The new parameter groups and what to adopt, all checked; and what must be redistributed, in words.

    Makes no collective and changes nothing.
    """
    state_dict = state_dict.copy()
    for hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = hook(optimizer, state_dict)
        state_dict = state_dict if changed is None else changed
    owner = owner_of(optimizer)
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(f"{owner}: the state dict has no {key!r}: give what state_dict() of an optimizer returned")
    saved = state_dict["param_groups"]
    for number, group in enumerate(saved):
        _check_origin(owner, group, number)
    slots = matched(optimizer, saved, plan.slots)
    groups = [_merged(old, new, optimizer.forms) for old, new in zip(optimizer.param_groups, saved, strict=True)]
    for key in state_dict["state"]:
        if key not in slots:
            raise ValueError(
                f"{owner}: the state dict holds state for {key!r}, a parameter that is in none of its groups"
            )
    entries = []
    for key, own_slots in slots.items():
        found = state_dict["state"].get(key)
        for slot in own_slots:
            group = saved[slot.group]
            if found:
                source = _Source("optimizer" in group, WHOLE_KEY in state_dict, own_slots)
                entries.append(_entry(optimizer, slot, found, groups[slot.group], source))
            elif found is None and state_dict["state"] and FORMAT_KEY in group:
                _check_absence(owner, slot, key, WHOLE_KEY in state_dict)
    _check_counters(owner, entries)
    for group in groups:
        optimizer.validate(group)
    return (groups, entries), _redistributed(entries)


def _check_origin(owner: str, group: Mapping[str, Any], number: int) -> None:
    """Whether this optimizer can read what a group holds."""
    version = group.get(FORMAT_KEY, FORMAT)
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"{owner}: group {number} of the state dict has format {version!r}, but this version of oput_dist reads "
            f"formats up to {FORMAT}: upgrade oput_dist"
        )
    if group.get("optimizer", owner) != owner:
        raise ValueError(f"{owner}: the state dict was saved by {group['optimizer']}: make the same optimizer")


def _check_absence(owner: str, slot: Slot, key: Any, whole: bool) -> None:
    """Own state dicts have an entry for every parameter, but for what FSDP1 cut itself: there is none for no state."""
    if slot.parameter.requires_grad and (whole or not is_flattened(slot.parameter)):
        raise ValueError(
            f"{owner}: the state dict lacks the state of {slot.name}; if it is meant to start anew, give it an empty "
            f"entry: state_dict['state'][{key!r}] = {{}}"
        )


def _merged(group: dict[str, Any], saved: Group, forms: Sequence[str]) -> dict[str, Any]:
    """The saved hyperparameters with this optimizer's parameters, and with its own forms of state; what the saved group
    lacks keeps its value."""
    # Names are this optimizer's: wrappers rename parameters, and torch takes no account of them either.
    values = {key: deepcopy(value) for key, value in saved.items() if key not in (*_IDENTITY, *forms)}
    for key, value in values.items():
        if isinstance(value, list) and isinstance(
            group.get(key), tuple
        ):  # torch's whole state dicts make lists of them
            values[key] = tuple(value)
    return {**group, **values}


# ----------------------------------------------------------------------------------------------- the state of one slot


def _entry(optimizer: Any, slot: Slot, found: Mapping[str, Any], group: Group, source: _Source) -> _Entry:
    """The state of one slot, checked; ``group`` has the hyperparameters as saved."""
    owner, recipe = owner_of(optimizer), optimizer.recipe(group, slot.layout.shape)
    shapes = {name: vector_shape(slot.layout.shape, axes) for name, axes in recipe.vectors}
    found = {name: value for name, value in found.items() if value is not None}
    shaped = recipe.state
    if COMPENSATION in found and _compensates(optimizer, slot):  # what has none begins without
        shaped = (COMPENSATION, *shaped)
    wanted = {name: name for name in shaped} | {name: _key(slot, name, found) for name in shapes}
    joint = len(source.slots) > 1
    # Under the name alone a flat parameter may hold the state of originals that are no matrices.
    owned = kept_by(recipe.whole, slot)
    keys = {slot.key(name) if joint else name: name for name in owned}
    kept = _keys(optimizer, source.slots, group) if joint else {*wanted.values(), *keys}
    for key in found.keys() - kept - {"step"}:
        if not source.own or key not in _once_kept(optimizer, group, slot):
            raise ValueError(f"{owner}: the state of {slot.name} has {key!r}, which this optimizer does not keep")
    for name, key in wanted.items() if found else ():
        if key not in found:
            raise ValueError(f"{owner}: the state of {slot.name} lacks {name!r}: it was saved by another optimizer")
    for name, key in wanted.items():
        shape = shapes.get(name, slot.parameter.shape if joint else slot.layout.shape)
        _check_tensor(owner, slot, name, found[key], tuple(shape), name in shapes)
    for key in keys.keys() & found.keys():
        _check_owned(owner, slot, key, found[key], owned[keys[key]].length)
    return _Entry(
        slot,
        joint,
        {name: found[name].to(slot.dtype) if name == COMPENSATION else found[name] for name in shaped},
        {name: (found[wanted[name]], shape) for name, shape in shapes.items()},
        {slot.key(keys[key]): found[key] for key in keys.keys() & found.keys()},
        _step(optimizer, slot, found, group, source.whole),
    )


def _key(slot: Slot, name: str, found: Mapping[str, Any]) -> str:
    """Where state that is not parameter-shaped is: under its name, or under that of several originals."""
    return slot.key(name) if slot.key(name) in found else name


def _keys(optimizer: Any, slots: Sequence[Slot], group: Group) -> set[str]:
    """The keys of the state that slots keep together in one flat parameter."""
    recipes = [(slot, optimizer.recipe(group, slot.layout.shape)) for slot in slots]
    vectors = {slot.key(name) for slot, recipe in recipes for name, _ in recipe.vectors}
    vectors |= {slot.key(name) for slot, recipe in recipes for name in kept_by(recipe.whole, slot)}
    kept = {COMPENSATION} if _compensates(optimizer, slots[0]) else set()
    return vectors.union(kept, *(recipe.state for _, recipe in recipes))


def _compensates(optimizer: Any, slot: Slot) -> bool:
    """Whether the optimizer, or the one that it wraps, keeps what rounding a parameter loses."""
    options = getattr(getattr(optimizer, "origin", optimizer), "_options", None)
    return options is not None and compensated(options.write, slot.dtype)


def _check_counters(owner: str, entries: Iterable[_Entry]) -> None:
    """A flat parameter of FSDP1 has one step counter for all originals in it."""
    first: dict[torch.Tensor, _Entry] = {}
    for entry in entries:
        other = first.setdefault(entry.slot.parameter, entry)
        if other.step is not None and entry.step is not None and other.step != entry.step:
            raise ValueError(
                f"{owner}: {other.slot.name} has made {other.step:.0f} steps and {entry.slot.name} {entry.step:.0f}, "
                "but FSDP1 keeps them in one flat parameter with one counter: wrap with use_orig_params=True"
            )


def _once_kept(optimizer: Any, group: Group, slot: Slot) -> set[str]:
    """State that this optimizer keeps with other options, which may have been switched off since it was saved."""
    names = {COMPENSATION}
    for key, check in optimizer.ranges().items():
        for value in (True, False, None, 0.5, 1):
            if key in group and check(value) is None:
                recipe = optimizer.recipe({**group, key: value}, slot.layout.shape)
                names.update(recipe.state, (name for name, _ in recipe.vectors))
                names.update(slot.key(name) for name in kept_by(recipe.whole, slot))
    return names


def _check_tensor(owner: str, slot: Slot, name: str, value: Any, shape: tuple[int, ...], vector: bool) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{owner}: {name!r} of {slot.name} is a {type(value).__name__}, but must be a tensor")
    if value.is_complex():
        raise ValueError(f"{owner}: {name!r} of {slot.name} has dtype {value.dtype}, but must be real")
    piece = is_flattened(slot.parameter) and not slot.shared and not vector and value.shape == slot.parameter.shape
    if tuple(value.shape) != shape and not piece:
        raise ValueError(
            f"{owner}: {name!r} of {slot.name}: state of shape {tuple(value.shape)} for a parameter of shape "
            f"{tuple(slot.layout.shape)}{f', where {shape} is needed' if vector else ''}: {_REMEDY}"
        )
    if isinstance(value, DTensor) and isinstance(slot.parameter, DTensor):
        here, there = slot.parameter.device_mesh, value.device_mesh
        if here != there:
            raise ValueError(f"{owner}: {name!r} of {slot.name} is on {there}, but the parameter on {here}: {_REMEDY}")


def _check_owned(owner: str, slot: Slot, name: str, value: Any, length: int) -> None:
    """Whether a value may be what owners of matrices keep: of all blocks, or of those of one rank."""
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.dim() != 1:
        raise ValueError(f"{owner}: {name!r} of {slot.name} must be a real tensor of one axis, but is {value!r:.60}")
    if isinstance(value, DTensor) and value.numel() != length:
        raise ValueError(
            f"{owner}: {name!r} of {slot.name} has {value.numel()} elements where {length} are needed: {_REMEDY}"
        )


def _step(optimizer: Any, slot: Slot, found: Mapping[str, Any], group: Group, whole: bool) -> float | None:
    """The counter. torch's SGD keeps none: where all steps after the first are alike, one will do."""
    owner = owner_of(optimizer)
    if "step" not in found:
        if slot.numel == 0 and is_flattened(slot.parameter) and not whole:
            return None  # FSDP1 gives a rank no gradient for what it has nothing of
        if optimizer.scalars(group, 2) == optimizer.scalars(group, 3):
            return 1.0
        raise ValueError(f"{owner}: the state of {slot.name} lacks 'step': it was saved by another optimizer")
    value = found["step"]
    if isinstance(value, DTensor):
        value = value.to_local()
    try:
        step = float(value)
    except (TypeError, ValueError, RuntimeError):
        step = -1.0
    if not (0 <= step < 2**53 and step == int(step)):
        raise ValueError(f"{owner}: 'step' of {slot.name} is {value!r}, but must be a whole number >= 0")
    return step


def _redistributed(entries: Iterable[_Entry]) -> str:
    """What collectives it will take to adopt the entries: those of other ranks must be the same."""
    return ", ".join(
        f"{name!r} of {entry.slot.name} placed as {value.placements}"
        for entry in entries
        for name, value in entry.tensors.items()
        if isinstance(value, DTensor) and not _in_place(entry.slot, value)
    ) + ", ".join(
        f"{key!r} of {entry.slot.name} spread over ranks"
        for entry in entries
        for key, value in sorted(entry.owned.items())
        if isinstance(value, DTensor)
    )


def _in_place(slot: Slot, value: DTensor) -> bool:
    """Whether a value lies as this layout keeps state, so that no collective is needed to adopt it."""
    parameter, group = slot.parameter, slot.layout.gather_group
    if isinstance(parameter, DTensor):
        return value.placements == parameter.placements
    if group is None or value.device_mesh.ndim != 1:
        return False
    placement = Shard(0) if parameter.dim() else Replicate()
    ranks = dist.get_process_group_ranks(group)
    return value.device_mesh.mesh.tolist() == ranks and value.placements == (placement,)


def adopt(entry: _Entry, state: dict[str, Any]) -> None:
    layout = entry.slot.layout
    for name, value in entry.tensors.items():
        if isinstance(layout, Fragment) and entry.slot.shared and not entry.joint:
            if name not in state:
                state[name] = layout.zeros(value.dtype)
            layout.put(state[name], whole_tensor(value) if isinstance(value, DTensor) else value)
        else:
            state[name] = layout.adopt(value)
    for name, (value, shape) in entry.vectors.items():
        state[entry.slot.key(name)] = layout.adopt_vector(value, shape)
    if entry.step is not None:
        state["step"] = torch.tensor(entry.step, dtype=torch.float32, device="cpu")
