"""Whole matrices, each put together and worked on by one rank: pieces travel to owners, results back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["WAVE_BYTES", "Matrix", "Owners", "assigned"]

WAVE_BYTES = 64 * 2**20
"""Bytes of matrices that a rank works on at a time, or one matrix; as much again is sent and received."""

_all_to_all = dist.all_to_all_single


Work = Callable[[torch.Tensor], torch.Tensor]
"""``[n, *shape]`` of some matrices to the same shape."""


@dataclass(frozen=True)
class Matrix:
    """What is known of a matrix before there is any data."""

    shape: tuple[int, ...]
    """Of the whole: two axes, or more."""
    cost: float
    """Estimated time of the work on it, in any unit."""
    boxes: Sequence[Any]
    """What this rank holds of it, as dense rectangles of its flat piece: each with ``start``, ``shape``, ``index`` and
    ``strides``. Nothing for an empty piece."""
    numel: int
    """Elements of this rank's piece."""
    work: Work
    """What is done with it: equal for matrices that may be worked on together."""


def assigned(costs: Sequence[float], ranks: int) -> list[int]:
    """An owner for each matrix: the dearest first, each to the rank that has least to do (the lowest, if several)."""
    load, owners = [0.0] * ranks, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[i] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[i]] += costs[i]
    return owners


class Owners:
    """The plan for the matrices that the ranks of one group hold together. Made once, by all of them.

    Where several ranks hold the same piece, the lowest of them sends it, and all receive the result.

    Args:
        matrices: the same on all ranks, but for what each holds.
        group: the ranks; None for this one alone.
        itemsize: of an element that travels.
    """

    def __init__(self, matrices: Sequence[Matrix], group: dist.ProcessGroup | None, itemsize: int) -> None:
        self._matrices, self._group = matrices, group
        self._rank = 0 if group is None else dist.get_rank(group)
        ranks = 1 if group is None else dist.get_world_size(group)
        own = [(matrix.numel, [_plain(box) for box in matrix.boxes]) for matrix in matrices]
        held: list[Any] = [own]
        if group is not None:
            held = [None] * ranks
            dist.all_gather_object(held, own, group=group)
        self._held: list[list[tuple[int, list[Any]]]] = held
        self.owners = assigned([matrix.cost for matrix in matrices], ranks)
        self._sends = [_first_holders([rank[i] for rank in held]) for i in range(len(matrices))]
        self._waves = self._cut_into_waves(itemsize)

    @property
    def ranks(self) -> int:
        """How many ranks share the work."""
        return len(self._held)

    def _cut_into_waves(self, itemsize: int) -> list[list[int]]:
        """Numbers of matrices, so many at a time that no owner gets more than :data:`WAVE_BYTES`, or one."""
        queues: list[list[list[int]]] = []
        for rank in range(self.ranks):
            own = sorted((i for i, o in enumerate(self.owners) if o == rank), key=lambda i: self._matrices[i].shape)
            parts: list[list[int]] = []
            room = 0
            for i in own:
                size = prod(self._matrices[i].shape) * itemsize
                if not parts or size > room:
                    parts.append([])
                    room = WAVE_BYTES
                parts[-1].append(i)
                room -= size
            queues.append(parts)
        count = max((len(parts) for parts in queues), default=0)
        return [[i for parts in queues if w < len(parts) for i in parts[w]] for w in range(count)]

    def run(self, pieces: Sequence[torch.Tensor]) -> None:
        """Replace every piece by that of what is made of the whole matrix. All ranks of the group must call it.

        The next wave's pieces travel while a wave is worked on.

        Args:
            pieces: this rank's, flat, one for each matrix, of one dtype and device.
        """
        if self._group is None:
            for wave in self._waves:
                wholes = {i: self._whole(pieces[i], self._held[0][i][1], i) for i in wave}
                for i, result in self._worked_on(wholes).items():
                    self._cut(result, self._held[0][i][1], pieces[i])
            return
        coming = [_Gather(self, wave, pieces) for wave in self._waves[:1]]
        leaving: list[_Scatter] = []
        for w, wave in enumerate(self._waves):  # the same number on all ranks
            coming += [_Gather(self, following, pieces) for following in self._waves[w + 1 : w + 2]]
            results = self._worked_on(coming.pop(0).wholes())
            for last in leaving:
                last.finish()
            leaving = [_Scatter(self, wave, results, pieces)]
        for last in leaving:
            last.finish()

    def _worked_on(self, wholes: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The results by number, in the order of the numbers; matrices of one shape and kind are worked on together."""
        alike: dict[Any, list[int]] = {}
        for i in wholes:
            alike.setdefault((tuple(self._matrices[i].shape), self._matrices[i].work), []).append(i)
        found: dict[int, torch.Tensor] = {}
        for (_, work), numbers in alike.items():
            found.update(zip(numbers, work(torch.stack([wholes.pop(i) for i in numbers])), strict=True))
        return {i: found[i] for i in sorted(found)}

    def _whole(
        self, piece: torch.Tensor, boxes: Sequence[Any], i: int, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        whole = piece.new_empty(self._matrices[i].shape) if into is None else into
        for start, shape, index, strides in boxes:
            whole[index] = piece.as_strided(shape, strides, piece.storage_offset() + start)
        return whole

    def _cut(self, whole: torch.Tensor, boxes: Sequence[Any], piece: torch.Tensor) -> None:
        for start, shape, index, strides in boxes:
            piece.as_strided(shape, strides, piece.storage_offset() + start).copy_(whole[index])


class _Gather:
    """Pieces of one wave on their way to the owners."""

    def __init__(self, owners: Owners, wave: Sequence[int], pieces: Sequence[torch.Tensor]) -> None:
        self._owners = owners
        rank, ranks = owners._rank, owners.ranks
        sent = [[i for i in wave if owners.owners[i] == to and rank in owners._sends[i]] for to in range(ranks)]
        self._coming = [
            [i for i in wave if owners.owners[i] == rank and source in owners._sends[i]] for source in range(ranks)
        ]
        sizes = [sum(owners._held[source][i][0] for i in numbers) for source, numbers in enumerate(self._coming)]
        packed = _packed([pieces[i] for numbers in sent for i in numbers], pieces[0])
        self._received = packed.new_empty(sum(sizes))
        self._sizes = sizes
        self._work = _all_to_all(
            self._received,
            packed,
            sizes,
            [sum(pieces[i].numel() for i in numbers) for numbers in sent],
            group=owners._group,
            async_op=True,
        )
        self._packed = packed  # until it has been sent

    def wholes(self) -> dict[int, torch.Tensor]:
        """The matrices of this rank, by number."""
        self._work.wait()
        found: dict[int, torch.Tensor] = {}
        for source, (share, numbers) in enumerate(
            zip(self._received.split(self._sizes), self._coming, strict=True)  # type: ignore[no-untyped-call]
        ):
            at = 0
            for i in numbers:
                numel, boxes = self._owners._held[source][i]
                found[i] = self._owners._whole(share[at : at + numel], boxes, i, found.get(i))
                at += numel
        return found


class _Scatter:
    """Results of one wave on their way back."""

    def __init__(
        self, owners: Owners, wave: Sequence[int], results: dict[int, torch.Tensor], pieces: Sequence[torch.Tensor]
    ) -> None:
        self._pieces = pieces
        rank, ranks, held = owners._rank, owners.ranks, owners._held
        shares, sent = [], []
        for to in range(ranks):
            numbers = [i for i in results if held[to][i][0]]
            for i in numbers:
                shares.append(pieces[0].new_empty(held[to][i][0]))
                owners._cut(results[i], held[to][i][1], shares[-1])
            sent.append(sum(held[to][i][0] for i in numbers))
        self._coming = [
            sorted(i for i in wave if owners.owners[i] == source and held[rank][i][0]) for source in range(ranks)
        ]
        sizes = [sum(held[rank][i][0] for i in numbers) for numbers in self._coming]
        self._packed = _packed(shares, pieces[0])
        self._received = self._packed.new_empty(sum(sizes))
        self._work = _all_to_all(self._received, self._packed, sizes, sent, group=owners._group, async_op=True)

    def finish(self) -> None:
        """Write them into the pieces."""
        self._work.wait()
        at = 0
        for numbers in self._coming:
            for i in numbers:
                self._pieces[i].copy_(self._received[at : at + self._pieces[i].numel()])
                at += self._pieces[i].numel()


def _packed(pieces: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(pieces)) if pieces else like.new_empty(0)


def _plain(box: Any) -> tuple[Any, ...]:
    return box.start, tuple(box.shape), tuple(box.index), tuple(box.strides)


def _first_holders(pieces: Sequence[tuple[int, list[Any]]]) -> set[int]:
    """The ranks that send: of those that hold the same piece, the lowest."""
    seen: set[str] = set()
    found = set()
    for rank, (numel, boxes) in enumerate(pieces):
        place = repr([(shape, [str(part) for part in index]) for _, shape, index, _ in boxes])
        if numel and place not in seen:
            seen.add(place)
            found.add(rank)
    return found
