"""Parameters that are worked on whole: which ranks share them, and so which one works on each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
import torch.distributed as dist

from oput_dist.backends import compute_dtype
from oput_dist.collectives import Matrix, Owners
from oput_dist.layout import Layout, LayoutError

from .recipe import Recipe
from .slot import Slot

__all__ = ["Matrices", "sharing_group"]


class Matrices:
    """Slots whose recipe has work on whole matrices. Static: made from metadata only, by all ranks.

    Args:
        slots: that have such work and take part in the step.
        recipe_of: the recipe of a slot.
        known: plans of owners that were made before, by what they were made from. To make one, ranks exchange what they
            hold; one rank alone may come here again, as after its parameters moved in memory, and must find it here.
    """

    def __init__(self, slots: Sequence[Slot], recipe_of: Callable[[Slot], Recipe], known: dict[object, Owners]) -> None:
        self._slots = slots
        families: dict[object, list[Slot]] = {}
        groups: dict[object, dist.ProcessGroup | None] = {}
        for slot in slots:
            group = sharing_group(slot.name, slot.layout)
            ranks = None if group is None else tuple(dist.get_process_group_ranks(group))
            key: object = (ranks, compute_dtype(slot.dtype), slot.device if group is None else slot.device.type)
            families.setdefault(key, []).append(slot)
            groups.setdefault(key, group)
        self._families: list[tuple[list[Slot], Owners]] = []
        for key, members in families.items():
            matrices = [_matrix(slot, recipe_of(slot)) for slot in members]
            made_from = (key, tuple(_facts(matrix) for matrix in matrices))
            if made_from not in known:
                known[made_from] = Owners(matrices, groups[key], _width(members[0]))
            self._families.append((members, known[made_from]))

    def scratch(self) -> dict[int, tuple[torch.Tensor]]:
        """Memory for this rank's pieces of what is worked on, by number of the slot: zeros, where no gradient is."""
        return {
            slot.index: (torch.zeros(slot.numel, dtype=compute_dtype(slot.dtype), device=slot.device),)
            for slot in self._slots
        }

    def run(self, memory: Mapping[int, torch.Tensor]) -> None:
        """Replace what every slot has by its piece of what is made of the whole. Every rank must call it.

        Args:
            memory: this rank's pieces, flat, by number of the slot.
        """
        for slots, owners in self._families:
            owners.run([memory[slot.index] for slot in slots])


def _matrix(slot: Slot, recipe: Recipe) -> Matrix:
    assert recipe.whole is not None
    shape = tuple(slot.layout.shape)
    return Matrix(shape, recipe.whole.cost(shape), slot.boxes, slot.numel, recipe.whole)


def _facts(matrix: Matrix) -> tuple[object, ...]:
    """What a plan of owners is made from, as plain values."""
    places = [(box.start, box.shape, box.strides, [str(part) for part in box.index]) for box in matrix.boxes]
    return matrix.shape, matrix.cost, matrix.numel, matrix.work, repr(places)


def _width(slot: Slot) -> int:
    return compute_dtype(slot.dtype).itemsize


def sharing_group(name: str, layout: Layout) -> dist.ProcessGroup | None:
    """The ranks that hold a parameter together, replicas among them; None for this one alone.

    Raises:
        LayoutError: for a mesh of several dimensions that is not all ranks, whose ranks have no group in common.
    """
    groups = [*layout.groups, *layout.partial_groups]
    if len(groups) <= 1:
        return groups[0] if groups else None
    if prod(dist.get_world_size(group) for group in groups) == dist.get_world_size():
        return dist.group.WORLD
    raise LayoutError(
        f"{name} is spread over {len(groups)} dimensions of a mesh that does not have all ranks: its ranks have no "
        "process group in common, in which one of them could work on the whole; use a mesh of all ranks, or of one "
        "dimension"
    )
