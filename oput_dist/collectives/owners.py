"""Whole matrices, each put together and worked on by one rank: pieces travel to owners, results back."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from .balance import assigned
from .gather import Gathering
from .nearness import nearest
from .ranks import Exchange, Ranks, Traffic
from .routes import WAVE_BYTES, Share, rows, senders, share_of, waves

__all__ = ["Matrix", "Owners", "Wholes", "WorkOn"]

Wholes = dict[int, torch.Tensor]
"""Matrices by their numbers."""
WorkOn = Callable[[Wholes, bool], Wholes]
"""Makes, of matrices that this rank owns, others of the same numbers and shapes. Whether those given lie in this rank's
pieces: then the others may be written there, and be the same tensors."""


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
    """The plan for the matrices that some ranks hold together. Made once, by all of them.

    Where several ranks hold the same piece, one of them sends it, in the owner's own replica (:func:`senders`), and all
    receive the result. What every rank holds whole is not sent to owners at all: they tell the others what they made.

    Args:
        matrices: the same on all ranks, but for what each holds.
        ranks: who they are; None for this one alone.
        itemsize: of an element that travels.
        settled: matrices that have an owner already, the same on all ranks.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        ranks: Ranks | None,
        itemsize: int,
        settled: Mapping[int, int] | None = None,
    ) -> None:
        self._matrices, self._ranks = matrices, ranks
        self.rank = 0 if ranks is None else ranks.rank
        own = [share_of(matrix.boxes) for matrix in matrices]
        held = [own] if ranks is None else ranks.gathered(own)
        self._held: list[list[Share]] = held
        owners = assigned([m.cost for m in matrices], self.ranks, settled, [m.kept for m in matrices])
        sizes = [[rank[i].numel for rank in held] for i in range(len(matrices))]
        self.owners = nearest(owners, [(m.cost, m.kept) for m in matrices], sizes, settled or {})
        self._senders = [senders([rank[i] for rank in held], owner) for i, owner in enumerate(self.owners)]
        self._waves = waves([m.shape for m in matrices], self.owners, self.ranks, itemsize, WAVE_BYTES)
        self._routes: dict[int, tuple[tuple[int, ...], _Route]] = {}
        self._copies = ranks is None or (len(ranks.groups) == 1 and all(self._whole(i) for i in range(len(matrices))))

    @property
    def ranks(self) -> int:
        """How many ranks share the work."""
        return len(self._held)

    def _whole(self, i: int) -> bool:
        """Whether every rank holds all of a matrix, in one piece."""
        return all([shape for shape, _ in rank[i].parts] == [self._matrices[i].shape] for rank in self._held)

    def run(self, pieces: Sequence[torch.Tensor], work: WorkOn, active: Collection[int] | None = None) -> None:
        """Replace every piece by that of what is made of the whole matrix. All ranks must call it.

        The next wave's pieces travel while a wave is worked on.

        Args:
            pieces: this rank's, flat, of one dtype and device.
            work: see :data:`WorkOn`.
            active: the matrices to work on, the same on all ranks; None for all.
        """
        waves = [wave if active is None else [i for i in wave if i in active] for wave in self._waves]
        if self._copies:
            self._run_here(waves, pieces, work)
            return
        routes = [self._route(w, tuple(wave)) for w, wave in enumerate(waves)]
        coming = [_Gather(self, route, pieces) for route in routes[:1]]
        leaving: list[_Scatter] = []
        for w, route in enumerate(routes):  # the same number on all ranks
            coming += [_Gather(self, following, pieces) for following in routes[w + 1 : w + 2]]
            results = work(coming.pop(0).wholes(), False)
            for last in leaving:
                last.finish()
            leaving = [_Scatter(self, route, results, pieces)]
        for last in leaving:
            last.finish()

    def _route(self, w: int, wave: tuple[int, ...]) -> _Route:
        """That of a wave, which is worked out anew when others of its matrices take part."""
        known = self._routes.get(w)
        if known is None or known[0] != wave:
            known = self._routes[w] = (wave, _Route(self, wave))
        return known[1]

    def _run_here(self, waves: Sequence[Sequence[int]], pieces: Sequence[torch.Tensor], work: WorkOn) -> None:
        """Of matrices that every rank holds whole: each works on its own and tells the others."""
        told = None if self._ranks is None else Gathering(self._ranks.groups[0])
        for wave in waves:
            own = sorted(i for i in wave if self.owners[i] == self.rank)
            given = {i: self._local(pieces, i) for i in own}
            for i, result in work(dict(given), True).items():
                if result is not given[i] or not self._is_view(i):  # else it was written in place
                    self.write(pieces, i, self._cut(result, self.rank, i))
            if told is not None:
                told.add(self._rows(wave, pieces))
        if told is not None:
            told.finish()

    def _rows(self, wave: Sequence[int], pieces: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
        """The matrices of a wave, one of each owner at a time, as they lie here; nothing where an owner has no more."""
        nothing = pieces[0].new_empty(0)
        return [
            [nothing if i is None else _view(pieces[self._matrices[i].piece], self._matrices[i].boxes[0]) for i in row]
            for row in rows(wave, self.owners, self.ranks)
        ]

    def _local(self, pieces: Sequence[torch.Tensor], i: int) -> torch.Tensor:
        """A matrix that is all here: a view where it can be one, of any strides."""
        matrix = self._matrices[i]
        if self._is_view(i):
            return _view(pieces[matrix.piece], matrix.boxes[0])
        return self.put_together(self.packed(pieces, [i]), 0, i)

    def _is_view(self, i: int) -> bool:
        """Whether :meth:`_local` gives a view."""
        matrix = self._matrices[i]
        return len(matrix.boxes) == 1 and tuple(matrix.boxes[0].shape) == matrix.shape

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


class _Route:
    """Who sends what of one wave to whom, and back: static."""

    def __init__(self, owners: Owners, wave: Sequence[int]) -> None:
        ranks, held = owners._ranks, owners._held
        assert ranks is not None
        sent: dict[tuple[int, int], list[int]] = {}
        for i in wave:
            for source in owners._senders[i]:
                sent.setdefault((source, owners.owners[i]), []).append(i)
        made: dict[int, list[int]] = {}
        for i in sorted(wave):
            made.setdefault(owners.owners[i], []).append(i)
        self.rank, everyone = owners.rank, range(owners.ranks)
        self.sent = [i for to in everyone for i in sent.get((owners.rank, to), ())]
        """What this rank sends to owners, in order."""
        self.to_owners = Traffic(
            ranks, lambda source, to: sum(held[source][i].numel for i in sent.get((source, to), ()))
        )
        self.gathered = [_pieces(held[source], sent.get((source, owners.rank), ())) for source in everyone]
        """What this rank gets of each to work on, and the elements of each."""
        self.made = made.get(owners.rank, [])
        """What this rank makes."""
        self.back = Traffic(ranks, lambda source, to: sum(held[to][i].numel for i in made.get(source, ())))
        own = held[owners.rank]
        self.results = [_pieces(own, [i for i in made.get(source, ()) if own[i].numel]) for source in everyone]
        """What this rank gets back of each, and the elements of each."""


def _pieces(held: Sequence[Share], numbers: Sequence[int]) -> tuple[Sequence[int], list[int]]:
    return numbers, [held[i].numel for i in numbers]


class _Gather:
    """Pieces of one wave on their way to the owners."""

    def __init__(self, owners: Owners, route: _Route, pieces: Sequence[torch.Tensor]) -> None:
        self._owners, self._route = owners, route
        self._exchange = Exchange(route.to_owners, owners.packed(pieces, route.sent))

    def wholes(self) -> Wholes:
        """The matrices of this rank, by number."""
        found: Wholes = {}
        shares = zip(self._route.gathered, self._exchange.wait(), strict=True)
        for source, ((numbers, sizes), share) in enumerate(shares):
            parts = share.split(sizes) if numbers else ()  # type: ignore[no-untyped-call]
            for i, part in zip(numbers, parts, strict=True):
                found[i] = self._owners.put_together(part, source, i, found.get(i))
        return {i: found[i] for i in sorted(found)}


class _Scatter:
    """Results of one wave on their way back."""

    def __init__(self, owners: Owners, route: _Route, results: Wholes, pieces: Sequence[torch.Tensor]) -> None:
        self._owners, self._route, self._pieces = owners, route, pieces
        shares = [owners._cut(results[i], to, i) for to in range(owners.ranks) for i in route.made]
        self._exchange = Exchange(route.back, torch.cat(shares) if shares else pieces[0].new_empty(0))

    def finish(self) -> None:
        """Write them into the pieces."""
        for (numbers, sizes), share in zip(self._route.results, self._exchange.wait(), strict=True):
            parts = share.split(sizes) if numbers else ()  # type: ignore[no-untyped-call]
            for i, part in zip(numbers, parts, strict=True):
                self._owners.write(self._pieces, i, part)


def _view(piece: torch.Tensor, box: Any) -> torch.Tensor:
    return piece.as_strided(tuple(box.shape), tuple(box.strides), piece.storage_offset() + box.start)
