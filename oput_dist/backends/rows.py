"""Pieces that lie one after the other, in rows of one length: for stages that sum over pieces, or scale each by itself.

One loop over memory takes a run of pieces whatever their number: it sums rows, and the rows of a piece are added up
afterwards. A row in which one piece ends and another begins is an edge: it is copied before the loop, run element by
element, and written over what the loop made of it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from .adjacent import runs_of
from .batch import Batch

__all__ = ["ROW", "Rows", "parted"]

ROW = 2048
"""Elements of a row."""
FEWEST = 16
"""Rows of the shortest run that is worth it."""
EDGES = 1 / 8
"""The largest share of rows that may be edges: what is in them is run twice."""


class Rows:
    """How a run of pieces is cut into rows. It knows sizes only, and lasts as long as they do.

    Args:
        indices: the pieces, by their numbers in a batch.
        sizes: elements of each.
    """

    def __init__(self, indices: Sequence[int], sizes: Sequence[int]) -> None:
        self.indices = list(indices)
        self._starts = [0, *accumulate(sizes)]
        self.count, rest = divmod(self._starts[-1], ROW)
        ends = self._starts[1:-1]
        cut = sorted({end // ROW for end in ends if end % ROW and end < self.count * ROW})
        owners = [bisect.bisect_right(self._starts, row * ROW) - 1 for row in range(self.count)]
        parts = [part for row in cut for part in self._of(row * ROW, row * ROW + ROW)]
        parts += self._of(self.count * ROW, self.count * ROW + rest)
        self._owners = _indices(owners)
        self._cut = _indices(cut)
        self._whole = _indices(sorted(set(range(self.count)) - set(cut)))
        self._lengths = torch.bincount(self._owners[self._whole], minlength=len(sizes))
        self.pieces = _indices([self.indices[piece] for piece, _ in parts])
        """The piece of each part of the edges, as a number in the batch."""
        self.lengths = _indices([length for _, length in parts])
        """Elements of each of these parts."""
        self.worthwhile = len(sizes) > 1 and self.count >= FEWEST and len(cut) <= EDGES * self.count

    def _of(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of a range: the piece, and how many elements."""
        piece = bisect.bisect_right(self._starts, start) - 1
        while start < stop:
            end = min(stop, self._starts[piece + 1])
            yield piece, end - start
            start, piece = end, piece + 1

    def matrix(self, column: Sequence[torch.Tensor]) -> torch.Tensor:
        """The rows of a column of a batch: ``[rows, ROW]``, a view."""
        return column[self.indices[0]].as_strided((self.count, ROW), (ROW, 1))

    def by_row(self, values: torch.Tensor) -> torch.Tensor:
        """What each row is given of what the pieces of the run are given: ``[n, pieces]`` to ``[n, rows, 1]``."""
        return values.index_select(1, self._owners).unsqueeze(2)

    def by_piece(self, sums: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sums of rows, each ``[rows, 1]``, added up in order, without edges: ``[pieces, terms]``."""
        whole = torch.cat(list(sums), 1)[self._whole]
        return torch.segment_reduce(whole, "sum", lengths=self._lengths, axis=0)

    def edges(self, column: Sequence[torch.Tensor]) -> torch.Tensor:
        """A copy of the edges of a column, part after part, 1-d."""
        return torch.cat([self.matrix(column)[self._cut].view(-1), self._tail(column)])

    def put_edges(self, column: Sequence[torch.Tensor], values: torch.Tensor) -> None:
        """Write back what :meth:`edges` copied."""
        split = len(self._cut) * ROW
        self.matrix(column)[self._cut] = values[:split].view(-1, ROW)
        self._tail(column).copy_(values[split:])

    def _tail(self, column: Sequence[torch.Tensor]) -> torch.Tensor:
        first, start = column[self.indices[0]], self.count * ROW
        return first.as_strided((self._starts[-1] - start,), (1,), first.storage_offset() + start)


def _indices(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def parted(batch: Batch) -> tuple[list[Rows], Batch | None, list[int]]:
    """The runs of a batch that go by rows, each of one row of scalars; and the rest, with its numbers in the batch."""
    sizes = [p.numel() for p in batch.p]
    found: list[Rows] = []
    rest: list[int] = []
    for run in runs_of(batch):
        key = ("rows", run.start, run.stop)
        if key not in batch.cache:
            batch.cache[key] = Rows(run, sizes[run.start : run.stop])
        if batch.cache[key].worthwhile:
            found.append(batch.cache[key])
        else:
            rest += run
    if not found:
        return [], batch, rest
    return found, _only(batch, rest) if rest else None, rest


def _only(batch: Batch, indices: Sequence[int]) -> Batch:
    """A batch of some of the tensors."""
    p, g, state = ([column[i] for i in indices] for column in (batch.p, batch.g, batch.state))
    cache = batch.cache.setdefault(("rest", *indices), {})
    return Batch(p, g, state, batch.scalars.of(indices), batch.prologue, batch.scale, cache, batch.lasting)  # type: ignore[arg-type]
