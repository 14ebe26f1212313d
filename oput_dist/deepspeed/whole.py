"""Weights and state of an engine as whole tensors, for any other stage and number of ranks; state of every kind."""

from __future__ import annotations

from typing import Any

import torch

from oput_dist.engine.match import qualified_names
from oput_dist.engine.whole import full_state_dict as optimizer_state_dict
from oput_dist.engine.whole import put_together
from oput_dist.layout import Fragment

from .checks import check_whole_state
from .joined import joined_of

__all__ = ["full_state_dict", "load_full_state_dict"]

WEIGHTS = "weights"


@torch.no_grad()
def full_state_dict(engine: Any, *, keep: bool = True) -> dict[str, Any]:
    """The fp32 weights and the optimizer's state with whole tensors, on the CPU, by qualified names.

    Universal checkpoints hold ``exp_avg`` and ``exp_avg_sq`` only; this holds everything. Every rank must call it.

    Args:
        engine: of DeepSpeed, at any stage, with an optimizer of this library.
        keep: whether this rank wants the result: ``keep=dist.get_rank() == 0`` for a ``torch.save``.

    Returns:
        what :func:`load_full_state_dict` takes; ``{}`` with ``keep=False``.

    Raises:
        TypeError: for an engine with another optimizer.
    """
    joined, optimizer = joined_of(engine), engine.basic_optimizer
    check_whole_state(engine)
    with joined.filled():
        saved = optimizer_state_dict(optimizer, keep=keep)
        slots, scratch = optimizer._current_plan().slots, {}  # type: ignore[var-annotated]
        weights = [put_together(slot, slot.parameter.detach(), slot.dtype, scratch, keep) for slot in slots]
        names = qualified_names(optimizer, slots)
    return {**saved, WEIGHTS: dict(zip(names, weights, strict=True))} if keep else {}


@torch.no_grad()
def load_full_state_dict(engine: Any, saved: dict[str, Any]) -> None:
    """Go on from what :func:`full_state_dict` returned, at any stage and on any number of ranks. All ranks call it.

    Step counts of the engine and its scheduler are not in it.

    Raises:
        TypeError: for an engine with another optimizer.
        ValueError: for the state of another model or optimizer, before anything is changed.
    """
    joined, optimizer = joined_of(engine), engine.basic_optimizer
    check_whole_state(engine)
    weights = saved.get(WEIGHTS, {})
    with joined.filled():
        slots = optimizer._current_plan().slots
        names = qualified_names(optimizer, slots)
        shapes = {name: tuple(slot.layout.shape) for name, slot in zip(names, slots, strict=True)}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != shapes:
        odd = sorted(str(name) for name in found.keys() ^ shapes.keys()) or [
            f"{name}: {found[name]} and not {shape}" for name, shape in shapes.items() if found[name] != shape
        ]
        raise ValueError(f"{type(optimizer).__name__}: the weights are of another model: {odd[0]}")
    joined.load({key: value for key, value in saved.items() if key != WEIGHTS})
    for name, slot in zip(names, slots, strict=True):
        if isinstance(slot.layout, Fragment):
            slot.layout.put(slot.parameter.detach(), weights[name])
        else:
            slot.parameter.detach().copy_(weights[name])
    joined.publish_all()
