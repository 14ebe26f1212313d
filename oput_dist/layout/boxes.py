"""Boxes: a piece of a tensor as parts of it that have the tensor's axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Box", "Index", "box_of", "boxes_of_range"]

Index = slice | torch.Tensor
"""Global indices along one axis: a range, or int64 on the CPU where a shard is strided."""


@dataclass(frozen=True)
class Box:
    """A part of a piece that is a product of indices of each axis."""

    start: int
    """Where it begins in the piece, seen as flat memory."""
    shape: tuple[int, ...]
    """Its own shape: as many axes as the whole tensor."""
    index: tuple[Index, ...]
    """For each axis, the global indices."""


def box_of(index: Sequence[Index]) -> tuple[Box, ...]:
    """The one box of a piece that is itself a product of indices; none if it is empty."""
    shape = tuple(len(i) if isinstance(i, torch.Tensor) else i.stop - i.start for i in index)
    return () if 0 in shape else (Box(0, shape, tuple(index)),)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
    """A range of the row-major order of a tensor as boxes, each contiguous in the range, in order.

    At most ``2 * ndim - 1``: a range that begins and ends within rows has the rest of the first row, whole rows, and
    the beginning of the last one, and so on for every axis.

    Args:
        shape: of the whole tensor.
        start, stop: ``0 <= start <= stop <= numel``.
    """
    boxes: list[Box] = []

    def add(prefix: tuple[int, ...], start: int, stop: int) -> None:
        """The range within the sub-tensor at ``prefix``."""
        if start >= stop:
            return
        if len(prefix) == len(shape):
            return put(prefix, None)
        inner = 1
        for size in shape[len(prefix) + 1 :]:
            inner *= size
        first, last = -(-start // inner), stop // inner  # whole rows
        if first > last:  # within one row
            row = start // inner
            return add((*prefix, row), start - row * inner, stop - row * inner)
        if start < first * inner:
            add((*prefix, first - 1), start - (first - 1) * inner, inner)
        if first < last:
            put(prefix, slice(first, last))
        add((*prefix, last), 0, stop - last * inner)

    def put(prefix: tuple[int, ...], rows: slice | None) -> None:
        index = [slice(i, i + 1) for i in prefix]
        index += [] if rows is None else [rows]
        index += [slice(0, size) for size in shape[len(index) :]]
        own = tuple(i.stop - i.start for i in index)
        begin = boxes[-1].start + torch.Size(boxes[-1].shape).numel() if boxes else 0
        boxes.append(Box(begin, own, tuple(index)))

    add((), start, stop)
    return tuple(boxes)
