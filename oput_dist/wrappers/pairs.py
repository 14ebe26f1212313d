"""Two optimizers of the same parameters: whether they go together, and their state dicts as one."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch

from oput_dist.engine import Group, Optimizer
from oput_dist.engine.plan import parameter_name
from oput_dist.engine.saved import WHOLE_KEY
from oput_dist.engine.wrapper import Wrapper, check_no_closure

from .lookahead import refuse_second_iterate

__all__ = ["PREFIX", "check_decay", "check_pair", "direction_group", "merged", "parted", "prefixed", "settings_of"]

PREFIX = "direction_"
_CALL = "AdaGraft(oput.SGD(model, lr=0.1), oput.AdamW(model, lr=1e-3, weight_decay=0.0), weight_decay=1e-4)"


def prefixed(entry: Mapping[str, Any]) -> dict[str, Any]:
    """State or settings of the direction optimizer as they are called beside the other's."""
    return {f"{PREFIX}{name}": value for name, value in entry.items()}


def settings_of(group: Group) -> dict[str, Any]:
    """A group without its parameters."""
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def direction_group(group: Group) -> dict[str, Any]:
    """What a shared group says of the direction optimizer."""
    return {name.removeprefix(PREFIX): value for name, value in group.items() if name.startswith(PREFIX)}


def merged(magnitude: dict[str, Any], direction: dict[str, Any]) -> dict[str, Any]:
    """Two state dicts as one, which is that of the first with more in it."""
    keys = {
        theirs: ours
        for group, other in zip(magnitude["param_groups"], direction["param_groups"], strict=True)
        for ours, theirs in zip(group["params"], other["params"], strict=True)
    }
    state = dict(magnitude["state"])
    for key, entry in direction["state"].items():
        state[keys[key]] = {**state.get(keys[key], {}), **prefixed(entry)}
    return {**magnitude, "state": state}


def parted(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two state dicts in one that :func:`merged` made."""
    state, groups, whole = state_dict["state"], state_dict["param_groups"], WHOLE_KEY in state_dict
    places = [{name: group[name] for name in ("params", "param_names") if name in group} for group in groups]
    magnitude = {
        **state_dict,
        "state": {key: {n: v for n, v in entry.items() if not n.startswith(PREFIX)} for key, entry in state.items()},
        "param_groups": [{n: v for n, v in group.items() if not n.startswith(PREFIX)} for group in groups],
    }
    direction = {
        **state_dict,
        "state": {key: _counted(entry) if whole else direction_group(entry) for key, entry in state.items()},
        "param_groups": [{**direction_group(group), **place} for group, place in zip(groups, places, strict=True)],
    }
    return magnitude, direction


def _counted(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The direction's state with its step count: whole ones lack it where the rank held nothing of a parameter."""
    own = direction_group(entry)
    return {"step": entry["step"], **own} if own and "step" in entry else own


def check_pair(magnitude: Any, direction: Any) -> None:
    """Raise for two optimizers that AdaGraft cannot combine."""
    for role, optimizer in (("magnitude", magnitude), ("direction", direction)):
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"AdaGraft: the {role} optimizer is a {type(optimizer).__name__}, but must be a torch.optim.Optimizer: "
                f"{_CALL}"
            )
        if isinstance(optimizer, Wrapper):
            kind = type(optimizer).__name__
            raise TypeError(
                f"AdaGraft: the {role} optimizer is wrapped by {kind}, which would see steps that are not made: wrap "
                f"AdaGraft instead: {kind}(AdaGraft(magnitude, direction))"
            )
        check_no_closure("AdaGraft", optimizer)
        refuse_second_iterate("AdaGraft", optimizer)
        check_decay(role, optimizer)
    if magnitude is direction:
        raise ValueError(f"AdaGraft: one optimizer is given for both: make two: {_CALL}")
    _check_same(magnitude, direction)
    _check_alike(magnitude, direction)


def check_decay(role: str, optimizer: torch.optim.Optimizer) -> None:
    """Raise for weight decay, which AdaGraft takes over."""
    for group in optimizer.param_groups:
        if group.get("weight_decay", 0) != 0:
            raise ValueError(
                f"AdaGraft: weight_decay={group['weight_decay']!r} of the {role} optimizer "
                f"({type(optimizer).__name__}) would be part of a step that is scaled: give it weight_decay=0.0, and "
                f"AdaGraft(..., weight_decay={group['weight_decay']!r})"
            )


def _check_same(magnitude: torch.optim.Optimizer, direction: torch.optim.Optimizer) -> None:
    model = getattr(magnitude, "_model", None)
    pairs = enumerate(zip_longest(magnitude.param_groups, direction.param_groups, fillvalue={"params": ()}))
    for number, (group, other) in pairs:
        for i, (p, q) in enumerate(zip_longest(group["params"], other["params"])):
            if p is not q:
                lacking = "magnitude" if p is None else "direction"
                what = f"{parameter_name(other if p is None else group, number, i, model)}"
                text = f"the {lacking} optimizer lacks {what}" if p is None or q is None else f"{what} is another there"
                raise ValueError(
                    f"AdaGraft: mismatched inner parameters: {text}; both optimizers need the same parameters in the "
                    f"same groups and order: {_CALL}"
                )


def _check_alike(magnitude: torch.optim.Optimizer, direction: torch.optim.Optimizer) -> None:
    shards = [getattr(getattr(each, "_shard_group", None), "group", None) for each in (magnitude, direction)]
    if shards[0] is not shards[1]:
        raise ValueError("AdaGraft: give both optimizers the same shard_group, since they share the parameters")
    skips = [isinstance(each, Optimizer) and each._options.skip_nonfinite for each in (magnitude, direction)]
    if skips == [False, True]:
        raise ValueError(
            "AdaGraft: skip_nonfinite=True of the direction optimizer alone would skip only one of the two steps: give "
            "it to the magnitude optimizer, which decides for both"
        )
