"""Stacks: boxes that lie alike in parameters of one shape, run together because a call costs more than small boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from oput_dist.backends import PACK, SMALL, Batch, Stack
from oput_dist.layout import Box

from .slot import Slot

__all__ = ["Alike", "stacks_of"]


@dataclass
class Alike:
    """Boxes that lie alike: of one shape, at the same indices of parameters of one shape and spread."""

    slots: list[Slot]
    box: Box
    tensors: list[list[torch.Tensor]]
    which: list[int]

    @property
    def index(self) -> tuple[Any, ...]:
        """The global indices along each axis."""
        return self.box.index

    def with_factors(self, factors: tuple[torch.Tensor, ...]) -> Stack:
        """What a backend runs."""
        return Stack(self.box.shape, self.box.strides, self.tensors, self.which, factors)


def stacks_of(batch: Batch, slots: Sequence[Slot]) -> list[Alike]:
    """The boxes of all slots of a batch: small ones that lie alike together, up to :data:`PACK` elements."""
    if "alike" not in batch.cache:
        batch.cache["alike"] = _sorted(slots)
    made = []
    for members, box in batch.cache["alike"]:
        start, stop = box.start, box.start + prod(box.shape)
        columns = [
            [batch.p[i] for i in members],
            [batch.g[i] for i in members],
            *[[batch.state[i][k] for i in members] for k in range(len(batch.state[0]))],
        ]
        if start or stop != batch.p[members[0]].numel():
            columns = [[tensor[start:stop] for tensor in column] for column in columns]
        made.append(Alike([slots[i] for i in members], box, columns, members))
    return made


def _sorted(slots: Sequence[Slot]) -> list[tuple[list[int], Box]]:
    groups: dict[Any, tuple[list[int], Box]] = {}
    for i, slot in enumerate(slots):
        for number, box in enumerate(slot.boxes):
            size = prod(box.shape)
            key: Any = (i, number)
            if size <= SMALL:
                where = tuple((ix.start, ix.stop) if isinstance(ix, slice) else tuple(ix.tolist()) for ix in box.index)
                full = size == slot.numel
                key = (slot.layout.shape, slot.layout.groups, box.shape, box.strides, box.start, full, where)
            members, _ = groups.setdefault(key, ([], box))
            members.append(i)
    most = {key: max(1, PACK // prod(box.shape)) for key, (_, box) in groups.items()}
    return [
        (members[at : at + most[key]], box)
        for key, (members, box) in groups.items()
        for at in range(0, len(members), most[key])
    ]
