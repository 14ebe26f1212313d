"""Stacks of boxes for the boxed Triton kernel: how their axes become three dimensions, and its partial sums totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from oput_dist.kernels.boxed import COLUMN_MAX, COLUMN_SUM, ROW_MAX, ROW_SUM
from oput_dist.kernels.stage import Axes, Stage

from .batch import Stack

__all__ = ["View", "fits", "view_of"]

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class View:
    """A box as ``[batch, rows, columns]``.

    Attributes:
        shape: of the box.
        groups: its axes in the order of memory, those that nothing tells apart together; those of one element are in
            none. The last group is the columns, the one before it the rows, all others the batch.
    """

    shape: tuple[int, ...]
    groups: Groups

    @property
    def batch(self) -> int:
        """How many matrices there are."""
        return prod(self._size(group) for group in self.groups[:-2])

    @property
    def rows(self) -> int:
        """Of each."""
        return self._size(self.groups[-2]) if len(self.groups) > 1 else 1

    @property
    def columns(self) -> int:
        """Of each: next to each other in memory."""
        return self._size(self.groups[-1]) if self.groups else 1

    def _size(self, group: tuple[int, ...]) -> int:
        return prod(self.shape[axis] for axis in group)

    def _keeps(self, axes: Axes) -> tuple[bool, bool, bool]:
        """Whether any of the batch, the rows and the columns are kept."""
        kept = [bool(set(group) & set(axes)) for group in self.groups]
        padded = [False] * (2 - len(kept)) + kept
        return any(padded[:-2]), padded[-2], padded[-1]

    def counts(self, tile: tuple[int, int]) -> tuple[int, int, int]:
        """How many matrices, and tiles of rows and of columns in each."""
        return self.batch, -(-self.rows // tile[0]), -(-self.columns // tile[1])

    def mode(self, axes: Axes, maximum: bool) -> int:
        """How a term that keeps some axes leaves a tile."""
        by_column = self._keeps(axes)[2]
        return (COLUMN_MAX if by_column else ROW_MAX) if maximum else (COLUMN_SUM if by_column else ROW_SUM)

    def fits(self, axes: Axes) -> bool:
        """Whether a term can leave a tile: it does not keep both rows and columns."""
        _, rows, columns = self._keeps(axes)
        return not (rows and columns)

    def partial_shape(self, axes: Axes, tile: tuple[int, int]) -> tuple[int, int, int]:
        """Of the partial results of one box: ``[batch, rows, tiles]`` or ``[batch, tiles, columns]``."""
        if self._keeps(axes)[2]:
            return self.batch, -(-self.rows // tile[0]), self.columns
        return self.batch, self.rows, -(-self.columns // tile[1])

    def total(self, partial: torch.Tensor, axes: Axes, maximum: bool) -> torch.Tensor:
        """``[boxes, *axes]`` from the partial results of all boxes, ``[boxes, *partial_shape]``."""
        by_column = self._keeps(axes)[2]
        along = 2 if by_column else 3
        made = partial.amax(along) if maximum else partial.sum(along)
        groups = (*self.groups[:-2], self.groups[-1]) if by_column else self.groups[:-1]
        order = [axis for group in groups for axis in group]
        boxes = len(made)
        made = made.reshape(boxes, *[self.shape[axis] for axis in order])
        gone = [1 + i for i, axis in enumerate(order) if axis not in axes]
        if gone:
            made = made.amax(gone) if maximum else made.sum(gone)
        kept = [axis for axis in order if axis in axes]
        made = made.permute(0, *[1 + kept.index(axis) for axis in sorted(kept)])
        return made.reshape(boxes, *[size if axis in axes else 1 for axis, size in enumerate(self.shape)])

    def factor(self, factor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """``[boxes, batch, rows, columns]``, each 1 where it does not vary, and its strides within a box."""
        sizes = factor.shape[1:]
        dimensions: list[int] = []
        parts = [self.groups[:-2], self.groups[-2:-1], self.groups[-1:]]
        wanted = list(factor.shape[:1])
        order = [axis for group in self.groups for axis in group]
        rest = [axis for axis in range(len(self.shape)) if axis not in order]
        for part in parts:
            axes = [axis for group in part for axis in group]
            varies = any(sizes[axis] > 1 for axis in axes)
            wanted += [self.shape[axis] if varies else 1 for axis in axes]
            dimensions.append(prod(self.shape[axis] for axis in axes) if varies else 1)
        moved = factor.permute(0, *[1 + axis for axis in (*order, *rest)])
        made = moved.expand(*wanted, *[1] * len(rest)).reshape(len(factor), *dimensions).contiguous()
        batch, rows, columns = dimensions
        strides = (rows * columns * (batch > 1), columns * (rows > 1), int(columns > 1))
        return made, strides


def view_of(stage: Stage, stack: Stack) -> View:
    """The view of the boxes of a stack: as few groups as the sums of the stage and its factors allow."""
    order = sorted(range(len(stack.shape)), key=lambda axis: -stack.strides[axis])
    kept = [*stage.sums, *stage.maxima, *[_varying(factor) for factor in stack.factors]]
    groups: list[list[int]] = []
    for axis in (axis for axis in order if stack.shape[axis] > 1):
        alike = groups and all((groups[-1][-1] in axes) == (axis in axes) for axes in kept)
        if alike:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return View(stack.shape, tuple(tuple(group) for group in groups))


def _varying(factor: torch.Tensor) -> Axes:
    return tuple(axis for axis, size in enumerate(factor.shape[1:]) if size > 1)


def fits(view: View, stage: Stage) -> bool:
    """Whether the kernel can run it; see :meth:`View.fits`."""
    terms: Sequence[Axes] = (*stage.sums, *stage.maxima)
    return all(view.fits(axes) for axes in terms)


class BoxedStack:
    """A stack as the kernel sees it, with the memory for its partial results.

    Args:
        stage: the stage.
        stack: the boxes.
        view: see :func:`view_of`.
        tile: rows and columns of a tile.
        device: of everything.
    """

    def __init__(self, stage: Stage, stack: Stack, view: View, tile: tuple[int, int], device: torch.device) -> None:
        self.stack, self.view, self.tile = stack, view, tile
        self._terms = [(axes, False) for axes in stage.sums] + [(axes, True) for axes in stage.maxima]
        self.modes = tuple(view.mode(axes, maximum) for axes, maximum in self._terms)
        n = len(stack.which)
        self._factors = [view.factor(factor) for factor in stack.factors]
        self._partial = [
            torch.empty(n, *view.partial_shape(axes, tile), dtype=torch.float64, device=device)
            for axes, _ in self._terms
        ]

    def rows(self) -> list[tuple[int, ...]]:
        """A row of the kernel's table for each box."""
        made = []
        for i, tensors in enumerate(zip(*self.stack.tensors, strict=True)):
            pointers = [tensor.data_ptr() for tensor in tensors]
            aligned = self.view.columns % 16 == 0 and all(pointer % 16 == 0 for pointer in pointers)
            factors = [x for factor, strides in self._factors for x in (factor[i].data_ptr(), *strides)]
            partial = [results[i].data_ptr() for results in self._partial]
            made.append((self.view.rows, self.view.columns, int(aligned), *pointers, *factors, *partial))
        return made

    def totals(self) -> tuple[torch.Tensor, ...]:
        """Each term of the stage, ``[boxes, *axes]``."""
        return tuple(
            self.view.total(partial, axes, maximum)
            for partial, (axes, maximum) in zip(self._partial, self._terms, strict=True)
        )
