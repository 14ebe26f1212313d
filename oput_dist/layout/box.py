"""Boxes: a piece of a parameter as dense rectangles of the global tensor, for what must see its axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

__all__ = ["Box", "Index", "boxes_of_range", "in_order", "one_box", "whole_index", "within"]

Index = slice | torch.Tensor
"""Global indices along one dimension, in the order of the piece: a range, or an int64 CPU tensor."""


@dataclass(frozen=True, eq=False)
class Box:
    """A rectangle of the global tensor that lies dense in the flat local piece.

    ``piece_flat.as_strided(box.shape, box.strides, offset + box.start)`` is ``whole[box.index]``, where ``offset`` is
    the storage offset of the flat piece.
    """

    start: int
    """Where it begins in the flat local piece."""
    shape: tuple[int, ...]
    """Local sizes; as many dimensions as the global shape has."""
    index: tuple[Index, ...]
    """For each dimension the global indices. At most one of them is a tensor, so that it indexes as slices do."""
    strides: tuple[int, ...]
    """Of the box in the flat local piece."""


def whole_index(shape: Sequence[int]) -> tuple[slice, ...]:
    """The index of everything."""
    return tuple(slice(0, size) for size in shape)


def one_box(index: tuple[Index, ...], shape: Sequence[int], strides: tuple[int, ...]) -> tuple[Box, ...]:
    """A piece that is one rectangle; none if it is empty."""
    return (Box(0, tuple(shape), index, strides),) if prod(shape) else ()


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
    """The range ``start:stop`` of a tensor in row-major order, as rectangles in the order of the range.

    At most ``2 * ndim - 1`` of them (one for a 0-d tensor): the rest of a row, whole rows, the beginning of a row, and
    so for each dimension.

    Args:
        shape: of the tensor.
        start: first element, ``0 <= start``.
        stop: one past the last; not above the number of elements.

    Raises:
        ValueError: for a range that is not within the tensor.
    """
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"range {start}:{stop} of a tensor of shape {tuple(shape)} with {prod(shape)} elements")
    boxes, at = [], 0
    for index in _ranges(tuple(shape), start, stop) if start < stop else ():
        sizes = tuple(part.stop - part.start for part in index)
        boxes.append(Box(at, sizes, index, tuple(prod(sizes[dim + 1 :]) for dim in range(len(sizes)))))
        at += prod(sizes)
    return tuple(boxes)


def _ranges(shape: tuple[int, ...], start: int, stop: int) -> list[tuple[slice, ...]]:
    """The slices of each rectangle of a range that is not empty."""
    if not shape:
        return [()]
    inner = prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # the whole rows are first:last
    if first > last:  # within one row
        row = last
        return [(slice(row, row + 1), *rest) for rest in _ranges(shape[1:], start - row * inner, stop - row * inner)]
    found: list[tuple[slice, ...]] = []
    if start < first * inner:
        row = first - 1
        found += [(slice(row, first), *rest) for rest in _ranges(shape[1:], start - row * inner, inner)]
    if first < last:
        found.append((slice(first, last), *whole_index(shape[1:])))
    if last * inner < stop:
        found += [(slice(last, last + 1), *rest) for rest in _ranges(shape[1:], 0, stop - last * inner)]
    return found


def in_order(boxes: tuple[Box, ...], order: Sequence[int]) -> tuple[Box, ...]:
    """Boxes of a tensor whose dimension ``i`` is dimension ``order[i]`` of another, as boxes of that other."""
    back = sorted(range(len(order)), key=lambda i: order[i])
    return tuple(
        Box(
            box.start,
            tuple(box.shape[i] for i in back),
            tuple(box.index[i] for i in back),
            tuple(box.strides[i] for i in back),
        )
        for box in boxes
    )


def within(box: Box, rectangle: Sequence[slice]) -> tuple[Box, ...]:
    """What a box has of a rectangle of the global tensor, with indices from the rectangle's corner.

    Nothing if they do not meet; several where a strided shard meets it more than once.
    """
    for own, part in zip(box.index, rectangle, strict=True):
        if isinstance(own, slice) and (own.stop <= part.start or part.stop <= own.start):
            return ()  # mostly, where ranks are many
    found = [box]
    for dim, part in enumerate(rectangle):
        found = [cut for one in found for cut in _cut(one, dim, part)]
    return tuple(found)


def _cut(box: Box, dim: int, part: slice) -> list[Box]:
    """A box without what lies outside of ``part`` along one dimension."""
    index = box.index[dim]
    if isinstance(index, slice):
        first, last = max(index.start, part.start), min(index.stop, part.stop)
        runs = [(first - index.start, last - first, first - part.start)] if first < last else []
    else:
        runs = _runs(index, part)
    return [
        Box(
            box.start + at * box.strides[dim],
            (*box.shape[:dim], size, *box.shape[dim + 1 :]),
            (*box.index[:dim], slice(begin, begin + size), *box.index[dim + 1 :]),
            box.strides,
        )
        for at, size, begin in runs
    ]


def _runs(index: torch.Tensor, part: slice) -> list[tuple[int, int, int]]:
    """Where consecutive indices within ``part`` are: their place in the box, how many, and the first from its start."""
    runs: list[tuple[int, int, int]] = []
    for at, i in enumerate(index.tolist()):
        if part.start <= i < part.stop:
            begin = i - part.start
            if runs and runs[-1][0] + runs[-1][1] == at and runs[-1][2] + runs[-1][1] == begin:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, runs[-1][2])
            else:
                runs.append((at, 1, begin))
    return runs
