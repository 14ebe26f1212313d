"""What all ranks exchange beside whole matrices: the packed all-reduces, and the gather of ZeRO-1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oput_dist.collectives import Schedule, ranks_of
from oput_dist.collectives.gather import buckets, width
from oput_dist.engine.slot import Slot
from oput_dist.engine.sums import Boundary
from oput_dist.kernels.stage import JointWithLoss

from .given import Given
from .world import World

__all__ = ["Exchange", "all_reduces", "gathers"]

Exchange = tuple[int, int]
"""Of one collective: the ranks that take part, and the bytes that each sends."""


def all_reduces(given: Given, world: World, slots: Sequence[Slot]) -> list[Exchange]:
    """Every packed all-reduce of a step. One of n bytes over P ranks sends ``2 n (P - 1) / P`` from each, as a ring."""
    recipes = {slot.index: given.recipe(slot) for slot in slots}
    exchanged: list[tuple[Any, int]] = []
    options = given.optimizer.options
    if options.max_grad_norm is not None or options.skip_nonfinite:
        schedule = Schedule.of([(slot.layout.groups, 1) for slot in slots])
        exchanged += [(group, sum(b - a for a, b in ranges)) for group, ranges in schedule.ranges]
    for number in range(max(len(recipe.stages) for recipe in recipes.values())):
        with_loss = any(
            isinstance(recipe.stages[number + 1].given, JointWithLoss)
            for recipe in recipes.values()
            if recipe.sums(number)
        )
        over: Any = (world.everyone,) if world.ranks > 1 else ()
        boundary = Boundary(slots, lambda slot: recipes[slot.index], number, over if with_loss else None)
        exchanged += boundary.exchanged
    found = []
    for group, values in exchanged:
        ranks = len(ranks_of(group))
        found.append((ranks, 2 * values * torch.float64.itemsize * (ranks - 1) // ranks))
    return found


def gathers(world: World, slots: Sequence[Slot]) -> list[Exchange]:
    """Every all-gather of updated rows in a step of ZeRO-1. Each rank sends its share, padded, to all others."""
    tensors = [world.pieces(slot.parameter) for slot in slots if slot.layout.gather_group is not None]
    return [
        (world.ranks, (world.ranks - 1) * width(bucket) * bucket[0][0].element_size()) for bucket in buckets(tensors)
    ]
