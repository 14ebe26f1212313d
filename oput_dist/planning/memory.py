"""Bytes that each rank holds: of parameters, gradients and state, made as the engine makes it, without memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from oput_dist.engine.forms import kept_state
from oput_dist.engine.size import bytes_of, host_bytes_of
from oput_dist.engine.slot import Slot, vectors_of
from oput_dist.engine.writing import names_of

from .given import Given
from .world import World

__all__ = ["Held", "held"]


@dataclass(frozen=True)
class Held:
    """Bytes of one rank, or of what it holds of one parameter."""

    parameters: int = 0
    gradients: int = 0
    state: int = 0
    """On the device. Without what owners of matrices keep."""
    traffic: int = 0
    """Read and written in a step: each stage reads parameter, gradient and state, and writes what it changes."""
    host: int = 0
    """Of state in host memory."""
    fetched: int = 0
    """Copied from there in a step, once for each stage; at most as many bytes are copied back at the same time."""

    def plus(self, other: Held, times: int) -> Held:
        """With so many others."""
        return Held(*(a + times * b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def held(given: Given, world: World) -> list[Held]:
    """The bytes of each rank."""
    alike = Counter((number, p.shape, p.dtype) for number, p in given.entries)
    frozen = Counter((None, p.shape, p.dtype) for p in given.frozen)
    known: dict[Any, Held] = {}
    ranks = []
    for rank in range(1 if world.replicated else world.ranks):
        total = Held()
        for (number, shape, dtype), count in (*alike.items(), *frozen.items()):
            layout = world.layout_of(shape, rank)
            key = (number, shape, dtype, tuple(box.shape for box in layout.boxes))
            if key not in known:
                whole = torch.empty(shape, dtype=dtype, device="meta")
                slot = Slot(whole, "", layout, number or 0, 0, 0, False)
                known[key] = _of(given, world, slot, trained=number is not None)
            total = total.plus(known[key], count)
        ranks.append(total)
    return ranks * (world.ranks // len(ranks))


def _of(given: Given, world: World, slot: Slot, trained: bool) -> Held:
    numel = slot.parameter.numel() if world.layout in ("ddp", "zero1") else slot.numel
    own = numel * slot.dtype.itemsize
    if not trained:
        return Held(own)
    recipe, options = given.recipe(slot), given.optimizer.options
    state: dict[str, Any] = {"step": torch.empty((), dtype=torch.float32, device="meta")}
    names = names_of(recipe.state, options.write, slot.dtype)
    kept_state(slot, state, names, options)
    stored = bytes_of(state) - bytes_of({"step": state["step"]})
    vectors_of(slot, recipe, state)
    scratch = 4 * slot.numel if recipe.whole is not None else 0
    piece, moved = slot.numel * slot.dtype.itemsize, 0
    lost = slot.numel * slot.dtype.itemsize * (len(names) - len(recipe.state))
    stored += scratch - lost
    for stage in recipe.stages:
        moved += 2 * piece + lost + stored + (piece + lost) * stage.writes_parameter + stored * stage.writes_state
    host = host_bytes_of(state)
    return Held(own, own, bytes_of(state) - host, moved, host, host * len(recipe.stages))
