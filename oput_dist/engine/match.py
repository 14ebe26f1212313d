"""Which saved state is whose: by qualified names where both sides know them, else by place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oput_dist.layout import clean_name

from .recipe import Group
from .slot import Slot

__all__ = ["matched", "owner_of", "qualified_names"]


def owner_of(optimizer: Any) -> str:
    """What messages call it."""
    return str(getattr(optimizer, "owner", type(optimizer).__name__))


def matched(optimizer: Any, saved: Sequence[Group], slots: Sequence[Slot]) -> dict[Any, list[Slot]]:
    """For each key of the saved state the slots that it is for: by name where both sides know names, else by place.

    A key stands for one slot, or, in what torch's own FSDP1 functions cut, for all slots of a flat parameter.

    Raises:
        ValueError: if the groups hold other parameters.
    """
    owner, groups = owner_of(optimizer), optimizer.param_groups
    each = [[[slot] for slot in slots if slot.group == number] for number in range(len(groups))]
    flat = [
        [[s for s in slots if s.parameter is p and s.group == n] for p in g["params"]] for n, g in enumerate(groups)
    ]
    given = [len(group["params"]) for group in saved]
    names = qualified_names(optimizer, slots)
    if given == [len(group) for group in each]:
        theirs = [name for group in saved for name in _names(group)]
        named = dict(zip(names, slots, strict=True))
        if None not in named and len(named) == len(names) == len(theirs) and named.keys() == set(theirs):
            return _by_name(owner, saved, named)
        flat = each
    elif given != [len(group) for group in flat]:
        raise ValueError(_other_model(owner, saved, [len(group) for group in each], names))
    return {
        key: own
        for group, own_slots in zip(saved, flat, strict=True)
        for key, own in zip(group["params"], own_slots, strict=True)
    }


def _by_name(owner: str, saved: Sequence[Group], slots: Mapping[str | None, Slot]) -> dict[Any, list[Slot]]:
    result = {}
    for number, group in enumerate(saved):
        for key, name in zip(group["params"], _names(group), strict=True):
            if slots[name].group != number:
                raise ValueError(
                    f"{owner}: {slots[name].name} is in group {slots[name].group} of this optimizer, but in group "
                    f"{number} of the state dict: make the groups as they were"
                )
            result[key] = [slots[name]]
    return result


def qualified_names(optimizer: Any, slots: Sequence[Slot]) -> list[str | None]:
    """The name of each slot in its model, without what wrappers add to it; None where it is not known."""
    given = [dict(zip(map(id, g["params"]), g.get("param_names", ()), strict=False)) for g in optimizer.param_groups]
    names = [
        slot.layout.name
        or (optimizer._model and optimizer._model.name_of(slot.parameter))
        or given[slot.group].get(id(slot.parameter))
        for slot in slots
    ]
    return [_plain(name) if name else None for name in names]


def _names(group: Group) -> list[str | None]:
    """The names in a saved group, in the order of its parameters."""
    keys = group["params"]  # torch.distributed.checkpoint puts names here, and may leave param_names in another order
    names = keys if all(isinstance(key, str) for key in keys) else group.get("param_names", ())
    return [_plain(name) for name in names] if len(names) == len(keys) else [None] * len(keys)


def _plain(name: str) -> str:
    """A parameter's name without what wrappers add to it, DDP among them."""
    return ".".join(word for word in clean_name(name).split(".") if word != "module")


def _other_model(owner: str, saved: Sequence[Group], sizes: Sequence[int], names: Sequence[str | None]) -> str:
    given = [len(group["params"]) for group in saved]
    text = (
        f"{owner}: the state dict is of another model or other groups: its parameter groups hold {given} parameters, "
        f"but this optimizer's hold {list(sizes)}"
    )
    theirs, ours = {name for group in saved for name in _names(group) if name}, {name for name in names if name}
    if theirs & ours:
        parts = (("it lacks", sorted(ours - theirs)), ("only it has", sorted(theirs - ours)))
        text += "".join(f"; {verb} {_listed(which)}" for verb, which in parts if which)
    return text


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
