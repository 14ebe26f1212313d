"""Buckets: slots that one launch serves. Where state has codes, as much of them as a scratch of bounded size takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

import torch

from oput_dist.backends import Backend, Batch, Codes, decode, encode
from oput_dist.kernels.stage import Prologue, Write

from .coded import Cell, Part
from .noise import bits_for, bits_in
from .recipe import Recipe
from .slot import Slot

__all__ = ["WAVE", "Bucket", "Member", "Open", "Scratch", "Tossed", "key_of", "set_apart", "waves", "written"]

WAVE = {"cpu": 2**21, "cuda": 2**22}
"""Elements whose numbers are in memory at once where their state has codes: what stays in caches between two passes."""


@dataclass(frozen=True)
class Tossed:
    """The random bits that a slot is rounded by at a step: drawn when they are needed, 2 bytes an element."""

    slot: Slot
    step: int
    dtype = torch.int16

    def of(self, start: int, stop: int, begin: int | None) -> torch.Tensor:
        """Those of a range of the piece, which begins at ``begin`` in the whole if it is consecutive there."""
        if begin is None or not self.slot.in_place:
            return bits_for(self.slot, self.step)[start:stop]
        return bits_in(self.slot, self.step, begin + start, stop - start)


@dataclass(frozen=True)
class Member:
    """A range of a slot, with the whole slot's gradient and state: first that which is for the write alone."""

    slot: Slot
    start: int
    stop: int
    gradient: torch.Tensor
    state: tuple[torch.Tensor | Cell | Tossed, ...]

    @property
    def numel(self) -> int:
        """Elements of the range."""
        return self.stop - self.start

    def range(self, start: int, stop: int) -> Member:
        """Another range of the slot."""
        return replace(self, start=start, stop=stop)

    def part(self, values: torch.Tensor) -> torch.Tensor:
        """The range of a flat tensor of the whole slot."""
        return values if self.numel == self.slot.numel else values[self.start : self.stop]

    @property
    def cells(self) -> list[Cell]:
        """The states that have codes."""
        return [each for each in self.state if isinstance(each, Cell)]


@dataclass
class Bucket:
    """What one launch serves."""

    members: Sequence[Member]
    recipe: Recipe
    batch: Batch
    """Without state where that has codes, while it is closed."""
    steps: list[int]
    total: int
    """Elements of all parameters that are updated alike, whole: what the backend is chosen by."""
    slots: list[Slot] = field(init=False)
    numels: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [member.slot for member in self.members]
        self.numels = [member.numel for member in self.members]

    @property
    def coded(self) -> bool:
        """Whether some of its state has codes."""
        return bool(self.members[0].cells)

    @property
    def codes(self) -> list[tuple[torch.Tensor | Codes, ...]] | None:
        """The state as it is, if all codes are of whole blocks, and random bits are not drawn later; else None."""
        found = [tuple(_direct(each, member) for each in member.state) for member in self.members]
        return None if any(each is None for state in found for each in state) else found  # type: ignore[return-value]

    @property
    def divided(self) -> bool:
        """Whether a slot may be in other buckets too."""
        return any(member.numel < member.slot.numel for member in self.members)


class Scratch:
    """Memory for the numbers of the state of one bucket at a time, as large as the largest."""

    def __init__(self) -> None:
        self._memory: dict[torch.device, torch.Tensor] = {}

    def of(self, device: torch.device, size: int) -> torch.Tensor:
        """At least so many floats: what was there before is lost."""
        if device not in self._memory or self._memory[device].numel() < size:
            self._memory.pop(device, None)
            self._memory[device] = torch.empty(size, dtype=torch.float32, device=device)
        return self._memory[device]


class Open:
    """A bucket whose state is there as numbers.

    Args:
        bucket: the bucket; its batch gets the state.
        scratch: where they are written.
        backend: what runs it.
    """

    def __init__(self, bucket: Bucket, scratch: Scratch, backend: Backend) -> None:
        self._backend, self.parts = backend, list[Part]()
        sizes = [[_room(cell, member) for cell in member.cells] for member in bucket.members]
        memory, at = scratch.of(bucket.slots[0].device, sum(sum(each) for each in sizes)), 0
        for member, rooms in zip(bucket.members, sizes, strict=True):
            for cell, size in zip(member.cells, rooms, strict=True):
                self.parts.append(cell.open(member.start, member.stop, memory[at : at + size]))
                at += size
        decode(backend, [part.job for part in self.parts if part.decodes])
        for part in self.parts:
            part.fill()
        parts = iter(self.parts)
        bucket.batch.state = [
            tuple(_numbers(each, member, parts) for each in member.state) for member in bucket.members
        ]

    def close(self) -> None:
        """Code what is there now."""
        for part in self.parts:
            part.gather()
        encode(self._backend, [part.job for part in self.parts])


def _numbers(state: torch.Tensor | Cell | Tossed, member: Member, parts: Iterator[Part]) -> torch.Tensor:
    """One state of a member as a launch takes it; of a cell, the numbers of the next part."""
    if isinstance(state, Cell):
        return next(parts).values
    if isinstance(state, Tossed):
        return state.of(member.start, member.stop, member.cells[0].blocks.begin)
    return member.part(state)


def _direct(state: torch.Tensor | Cell | Tossed, member: Member) -> torch.Tensor | Codes | None:
    """One state of a member as it is in memory; None where it must be opened."""
    if isinstance(state, Cell):
        return state.direct(member.start, member.stop)
    return None if isinstance(state, Tossed) else member.part(state)


def _room(cell: Cell, member: Member) -> int:
    """Floats that the blocks of a range take; a multiple of 16 bytes, so that each begins as the first does."""
    return cell.blocks.range(member.start, member.stop).count * cell.code.block


def waves(members: Sequence[Member], divide: bool) -> Iterator[list[Member]]:
    """Members in groups of about :data:`WAVE` elements; all in one where no state has codes.

    Args:
        members: whole slots.
        divide: whether a slot may be in several groups.
    """
    if not members[0].cells:
        yield list(members)
        return
    if members[0].slot.device.type != "cpu":
        yield from _grouped(members, divide, WAVE["cuda"])
        return
    edges, inner = zip(*(_edges(member) if divide else ([member], []) for member in members), strict=True)
    for some in (edges, inner):
        yield from _grouped([part for parts in some for part in parts], divide, WAVE["cpu"])


def _grouped(members: Sequence[Member], divide: bool, most: int) -> Iterator[list[Member]]:
    group: list[Member] = []
    for member in members:
        for part in _divided(member, most) if divide else [member]:
            if group and sum(each.numel for each in group) + part.numel > most:
                yield group
                group = []
            group.append(part)
    if group:
        yield group


def _edges(member: Member) -> tuple[list[Member], list[Member]]:
    """The ends of a member that are parts of blocks, and what is between them, whose codes may be used as they are."""
    begin, block = _aligned(member)
    if begin is None:
        return [member], []
    end = begin + member.slot.numel
    first = min(-begin % block, member.stop)
    last = member.stop if end == member.slot.layout.shape.numel() else max(first, member.stop - end % block)
    ends = [(0, first), (last, member.stop)]
    return [member.range(*each) for each in ends if each[0] < each[1]], [
        member.range(first, last)
    ] if first < last else []


def _divided(member: Member, most: int) -> Iterator[Member]:
    """A member in ranges that end where blocks do; whole, where its piece is not consecutive in the parameter."""
    begin, block = _aligned(member)
    if begin is None or member.numel <= most:
        yield member
        return
    start = member.start
    while start < member.stop:
        stop = min(member.stop, (begin + start + most) // block * block - begin)
        yield member.range(start, stop)
        start = stop


def _aligned(member: Member) -> tuple[int | None, int]:
    """Where the piece begins in the whole, None if not consecutive there; and of how many elements all blocks are."""
    begins = {cell.blocks.begin for cell in member.cells}
    begin = begins.pop() if len(begins) == 1 and member.slot.in_place else None
    return begin, lcm(*(cell.code.block for cell in member.cells))


def written(slot: Slot, accumulate: bool) -> torch.Tensor:
    """What a step writes in a parameter's place: the parameter, or a copy that is thrown away."""
    values = slot.flat_parameter()
    return values.clone() if accumulate else values


def set_apart(
    slot: Slot, prologue: Prologue, state: tuple[Any, ...], step: int, accumulate: bool
) -> tuple[torch.Tensor | Cell | Tossed, ...]:
    """The state of a slot, first what is for its write alone: random bits, or what rounding lost, which is copied where
    the parameter is."""
    if prologue.write is Write.STOCHASTIC:
        tossed = Tossed(slot, step)
        return (tossed if any(isinstance(each, Cell) for each in state) else tossed.of(0, slot.numel, None), *state)
    if accumulate:
        return (*(each.clone() for each in state[: prologue.aside]), *state[prologue.aside :])
    return state


def key_of(state: Sequence[torch.Tensor | Cell | Tossed]) -> tuple[Any, ...]:
    """Equal for state that one launch can take."""
    return tuple((each.dtype, each.code) if isinstance(each, Cell) else each.dtype for each in state)
