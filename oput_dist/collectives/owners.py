"""Whole matrices, each put together and worked on by one rank: pieces travel to owners, results back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from .balance import assigned
from .nearness import nearest
from .routes import WAVE_BYTES, Share, first_holders, share_of, waves

__all__ = ["Matrix", "Owners", "Wholes"]

_all_to_all = dist.all_to_all_single

Wholes = dict[int, torch.Tensor]
"""Matrices by their numbers."""


@dataclass(frozen=True)
class Matrix:
    """What is known of a matrix before there is any data."""

    shape: tuple[int, ...]
    """Of the whole."""
    cost: float
    """The time that it takes its owner, in any unit."""
    kept: float
    """Bytes that its owner keeps from step to step."""
    boxes: Sequence[Any]
    """What this rank holds of it, as rectangles in the flat piece that it is a part of: each with ``start``, ``shape``,
    ``strides``, and ``index`` in the matrix. Nothing if this rank has nothing of it."""
    piece: int
    """Number of that flat piece."""


class Owners:
    """The plan for the matrices that the ranks of one group hold together. Made once, by all of them.

    Where several ranks hold the same piece, the lowest of them sends it, and all receive the result.

    Args:
        matrices: the same on all ranks, but for what each holds.
        group: the ranks; None for this one alone.
        itemsize: of an element that travels.
        settled: matrices that have an owner already, the same on all ranks.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        group: dist.ProcessGroup | None,
        itemsize: int,
        settled: Mapping[int, int] | None = None,
    ) -> None:
        self._matrices, self._group = matrices, group
        self.rank = 0 if group is None else dist.get_rank(group)
        ranks = 1 if group is None else dist.get_world_size(group)
        own = [share_of(matrix.boxes) for matrix in matrices]
        held: list[Any] = [own]
        if group is not None:
            held = [None] * ranks
            dist.all_gather_object(held, own, group=group)
        self._held: list[list[Share]] = held
        owners = assigned([m.cost for m in matrices], ranks, settled, [m.kept for m in matrices])
        sizes = [[rank[i].numel for rank in held] for i in range(len(matrices))]
        self.owners = nearest(owners, [(m.cost, m.kept) for m in matrices], sizes, settled or {})
        self._senders = [first_holders([rank[i] for rank in held]) for i in range(len(matrices))]
        self._waves = waves([m.shape for m in matrices], self.owners, ranks, itemsize, WAVE_BYTES)

    @property
    def ranks(self) -> int:
        """How many ranks share the work."""
        return len(self._held)

    def run(
        self, pieces: Sequence[torch.Tensor], work: Callable[[Wholes], Wholes], active: Collection[int] | None = None
    ) -> None:
        """Replace every piece by that of what is made of the whole matrix. All ranks of the group must call it.

        The next wave's pieces travel while a wave is worked on.

        Args:
            pieces: this rank's, flat, of one dtype and device.
            work: makes, of matrices that this rank owns, others of the same numbers and shapes.
            active: the matrices to work on, the same on all ranks; None for all.
        """
        waves = [wave if active is None else [i for i in wave if i in active] for wave in self._waves]
        if self._group is None:
            for wave in waves:
                for i, result in work({i: self._local(pieces, i) for i in wave}).items():
                    self.write(pieces, i, self._cut(result, 0, i))
            return
        coming = [_Gather(self, wave, pieces) for wave in waves[:1]]
        leaving: list[_Scatter] = []
        for w, wave in enumerate(waves):  # the same number on all ranks
            coming += [_Gather(self, following, pieces) for following in waves[w + 1 : w + 2]]
            results = work(coming.pop(0).wholes())
            for last in leaving:
                last.finish()
            leaving = [_Scatter(self, wave, results, pieces)]
        for last in leaving:
            last.finish()

    def _local(self, pieces: Sequence[torch.Tensor], i: int) -> torch.Tensor:
        """A matrix that is all here: a view where it can be one, of any strides."""
        matrix = self._matrices[i]
        if len(matrix.boxes) == 1 and tuple(matrix.boxes[0].shape) == matrix.shape:
            return _view(pieces[matrix.piece], matrix.boxes[0])
        return self.put_together(self.packed(pieces, [i]), 0, i)

    def packed(self, pieces: Sequence[torch.Tensor], numbers: Sequence[int]) -> torch.Tensor:
        """What this rank holds of some matrices, one after the other."""
        parts = []
        for i in numbers:
            matrix = self._matrices[i]
            parts += [_view(pieces[matrix.piece], box).reshape(-1) for box in matrix.boxes]
        return torch.cat(parts) if parts else pieces[0].new_empty(0)

    def put_together(self, share: torch.Tensor, rank: int, i: int, whole: torch.Tensor | None = None) -> torch.Tensor:
        """A matrix with what a rank sent of it filled in."""
        whole = share.new_empty(self._matrices[i].shape) if whole is None else whole
        at = 0
        for shape, index in self._held[rank][i].parts:
            whole[index] = share[at : at + prod(shape)].view(shape)
            at += prod(shape)
        return whole

    def _cut(self, whole: torch.Tensor, rank: int, i: int) -> torch.Tensor:
        """What a rank is to have of a matrix, flat."""
        parts = [whole[index].reshape(-1) for _, index in self._held[rank][i].parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else whole.new_empty(0)

    def write(self, pieces: Sequence[torch.Tensor], i: int, share: torch.Tensor) -> None:
        """Write what this rank is to have of a matrix to its piece."""
        at, matrix = 0, self._matrices[i]
        for box in matrix.boxes:
            size = prod(box.shape)
            place, new = _view(pieces[matrix.piece], box), share[at : at + size]
            if place.data_ptr() != new.data_ptr():  # else it was worked on in place
                place.copy_(new.view(box.shape))
            at += size


class _Gather:
    """Pieces of one wave on their way to the owners."""

    def __init__(self, owners: Owners, wave: Sequence[int], pieces: Sequence[torch.Tensor]) -> None:
        self._owners = owners
        rank, held = owners.rank, owners._held
        sent = [
            [i for i in wave if owners.owners[i] == to and rank in owners._senders[i]] for to in range(owners.ranks)
        ]
        self._coming = [
            [i for i in wave if owners.owners[i] == rank and source in owners._senders[i]]
            for source in range(owners.ranks)
        ]
        self._sizes = [sum(held[source][i].numel for i in numbers) for source, numbers in enumerate(self._coming)]
        self._packed = owners.packed(pieces, [i for numbers in sent for i in numbers])  # until it has been sent
        self._received = self._packed.new_empty(sum(self._sizes))
        self._work = _all_to_all(
            self._received,
            self._packed,
            self._sizes,
            [sum(held[rank][i].numel for i in numbers) for numbers in sent],
            group=owners._group,
            async_op=True,
        )

    def wholes(self) -> Wholes:
        """The matrices of this rank, by number."""
        self._work.wait()
        found: Wholes = {}
        for source, (share, numbers) in enumerate(
            zip(self._received.split(self._sizes), self._coming, strict=True)  # type: ignore[no-untyped-call]
        ):
            at = 0
            for i in numbers:
                numel = self._owners._held[source][i].numel
                found[i] = self._owners.put_together(share[at : at + numel], source, i, found.get(i))
                at += numel
        return {i: found[i] for i in sorted(found)}


class _Scatter:
    """Results of one wave on their way back."""

    def __init__(self, owners: Owners, wave: Sequence[int], results: Wholes, pieces: Sequence[torch.Tensor]) -> None:
        self._owners, self._pieces = owners, pieces
        rank, held = owners.rank, owners._held
        numbers = sorted(results)
        shares = [owners._cut(results[i], to, i) for to in range(owners.ranks) for i in numbers]
        sent = [sum(held[to][i].numel for i in numbers) for to in range(owners.ranks)]
        self._coming = [
            sorted(i for i in wave if owners.owners[i] == source and held[rank][i].numel)
            for source in range(owners.ranks)
        ]
        sizes = [sum(held[rank][i].numel for i in coming) for coming in self._coming]
        self._packed = torch.cat(shares) if shares else pieces[0].new_empty(0)
        self._received = self._packed.new_empty(sum(sizes))
        self._work = _all_to_all(self._received, self._packed, sizes, sent, group=owners._group, async_op=True)

    def finish(self) -> None:
        """Write them into the pieces."""
        self._work.wait()
        at = 0
        for numbers in self._coming:
            for i in numbers:
                numel = self._owners._held[self._owners.rank][i].numel
                self._owners.write(self._pieces, i, self._received[at : at + numel])
                at += numel


def _view(piece: torch.Tensor, box: Any) -> torch.Tensor:
    return piece.as_strided(tuple(box.shape), tuple(box.strides), piece.storage_offset() + box.start)
