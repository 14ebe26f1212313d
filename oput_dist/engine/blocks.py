"""Blocks of a parameter's elements that are coded together: consecutive ones of the whole, whatever a rank holds of it.

So a block may be cut: ranks then hold parts of it, and agree on its scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from oput_dist.layout import Box

from .slot import Slot

__all__ = ["Blocks", "Range", "begin_of", "blocks_of", "global_index"]


@dataclass(frozen=True)
class Range:
    """Consecutive blocks of a rank, and the elements ``start:stop`` of its flat piece that they hold."""

    first: int
    """Number of the first block, among those of this rank."""
    count: int
    lead: int
    """Elements of the first block before the piece's."""
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Blocks:
    """The blocks of which a rank has elements, in order.

    Args:
        size: elements of a block.
        numel: of this rank's piece.
        begin: where the piece begins in the whole, row-major, if it is consecutive there; else None.
        ids: numbers of the blocks in the whole, ascending: int64, on the CPU.
        cut: which of these blocks this rank has not all elements of: int64, on the CPU.
    """

    size: int
    numel: int
    begin: int | None
    ids: torch.Tensor
    cut: torch.Tensor

    @property
    def count(self) -> int:
        """How many."""
        return len(self.ids)

    def range(self, start: int, stop: int) -> Range:
        """The blocks of elements ``start:stop`` of a piece that is consecutive; of others all."""
        if self.begin is None:
            return Range(0, self.count, 0, 0, self.numel)
        low, high = self.begin + start, self.begin + stop
        first, last, own = low // self.size, -(-high // self.size), self.begin // self.size
        return Range(first - own, last - first, low - first * self.size, start, stop)

    def places(self, slot: Slot) -> torch.Tensor:
        """Where each element of a piece that is not consecutive lies in its blocks, one after the other; int64."""
        index = global_index(slot)
        block = torch.div(index, self.size, rounding_mode="floor")
        return torch.searchsorted(self.ids.to(slot.device), block) * self.size + index % self.size


def blocks_of(slot: Slot, size: int) -> Blocks:
    """The blocks of a slot, worked out once; its layout must know places."""
    key = ("blocks", size)
    if key not in slot.facts:
        slot.facts[key] = _blocks(slot, size)
    known: Blocks = slot.facts[key]
    return known


def _blocks(slot: Slot, size: int) -> Blocks:
    numel, total = slot.numel, slot.layout.shape.numel()
    begin = begin_of(slot)
    if begin is not None:
        stop = begin + numel
        ids = torch.arange(begin // size, -(-stop // size) if numel else begin // size, device="cpu")
        ends = torch.clamp((ids + 1) * size, max=total)
        cut = ((ids * size < begin) | (ends > stop)).nonzero().squeeze(1)
        return Blocks(size, numel, begin, ids, cut)
    block = torch.div(global_index(slot), size, rounding_mode="floor").cpu()
    ids, counts = torch.unique(block, return_counts=True)
    cut = (counts < torch.clamp(total - ids * size, max=size)).nonzero().squeeze(1)
    return Blocks(size, numel, None, ids, cut)


def global_index(slot: Slot) -> torch.Tensor:
    """For each element of the flat piece its row-major index in the whole parameter: int64."""
    out = torch.empty(slot.numel, dtype=torch.int64, device=slot.device)
    steps = torch.empty(slot.layout.shape, device="meta").stride()
    for box, view in zip(slot.boxes, slot.views(out), strict=True):
        view.zero_()
        for axis, (index, step) in enumerate(zip(box.index, steps, strict=True)):
            own = torch.arange(index.start, index.stop, device="cpu") if isinstance(index, slice) else index
            view += (own * step).to(slot.device).reshape(-1, *[1] * (len(steps) - axis - 1))
    return out


def begin_of(slot: Slot) -> int | None:
    """Where the piece begins in the whole, if it is consecutive there and lies in that order; else None."""
    if "begin" not in slot.facts:
        slot.facts["begin"] = _begin(slot) if slot.numel else 0
    known: int | None = slot.facts["begin"]
    return known


def _begin(slot: Slot) -> int | None:
    steps = torch.empty(slot.layout.shape, device="meta").stride()
    begin = at = None
    for box in slot.boxes:
        start = _start(box, slot.layout.shape, steps)
        if start is None or (at is not None and start != at):
            return None
        begin = start if begin is None else begin
        at = start + prod(box.shape)
    return begin


def _start(box: Box, shape: torch.Size, steps: tuple[int, ...]) -> int | None:
    inner, start, whole = 1, 0, True  # so far from the last axis on: elements, and whether all of each axis are there
    for axis in reversed(range(len(shape))):
        index, size = box.index[axis], box.shape[axis]
        if not isinstance(index, slice) or (size > 1 and (not whole or box.strides[axis] != inner)):
            return None
        start += index.start * steps[axis]
        inner *= size
        whole = whole and size == shape[axis]
    return start
