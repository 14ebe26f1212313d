"""Buckets: slots that one launch serves. Where state must be opened, as much as a scratch of bounded size takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from oput_dist.backends import Backend, Batch, Carrier, Codes, decode, encode
from oput_dist.kernels.stage import Prologue, Stage, Write

from .blocks import begin_of
from .cell import Cell, Part
from .host_cell import HostCell, Lent
from .hosted import Remote
from .noise import bits_for, bits_in, check_places
from .recipe import Recipe
from .slot import Slot

__all__ = [
    "Away",
    "Bucket",
    "Member",
    "Open",
    "Scratch",
    "Tossed",
    "key_of",
    "set_apart",
    "written",
]


@dataclass(frozen=True)
class Tossed:
    """The random bits that a slot is rounded by at a step: drawn when they are needed, 2 bytes an element."""

    slot: Slot
    step: int
    dtype = torch.int16

    def of(self, start: int, stop: int) -> torch.Tensor:
        """Those of a range of the piece."""
        if stop - start == self.slot.numel:
            return bits_for(self.slot, self.step)
        begin = begin_of(self.slot)
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
        """The states that must be opened."""
        return [each for each in self.state if isinstance(each, Cell)]

    @property
    def codes(self) -> tuple[torch.Tensor | Codes, ...] | None:
        """The state as it is, if its codes are of whole blocks, and random bits are not drawn later; else None."""
        found = [_direct(each, self) for each in self.state]
        return None if any(each is None for each in found) else tuple(found)  # type: ignore[arg-type]


@dataclass
class Bucket:
    """What one launch serves."""

    members: Sequence[Member]
    recipe: Recipe
    batch: Batch
    """Without state where that must be opened, while it is closed."""
    steps: list[int]
    total: int
    """Elements of all parameters that are updated alike, whole: what the backend is chosen by."""
    slots: list[Slot] = field(init=False)
    numels: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.slots = [member.slot for member in self.members]
        self.numels = [member.numel for member in self.members]

    @property
    def cells(self) -> list[Cell]:
        """The states that must be opened."""
        return [cell for member in self.members for cell in member.cells]

    @property
    def away(self) -> bool:
        """Whether its state is on the host, where all of it is if any."""
        return any(isinstance(cell, Remote) for cell in self.members[0].cells)

    @property
    def divided(self) -> bool:
        """Whether a slot may be in other buckets too."""
        return any(member.numel < member.slot.numel for member in self.members)


class Scratch:
    """Memory for the numbers of the state of one bucket at a time, as large as the largest."""

    def __init__(self) -> None:
        self._memory: dict[torch.device, torch.Tensor] = {}

    def of(self, device: torch.device, size: int) -> torch.Tensor:
        """At least so many bytes: what was there before is lost."""
        if device not in self._memory or self._memory[device].numel() < size:
            self._memory.pop(device, None)
            self._memory[device] = torch.empty(size, dtype=torch.uint8, device=device)
        return self._memory[device]


class Open:
    """A bucket whose state is there as numbers, from :meth:`begin` on until it is closed.

    Args:
        bucket: the bucket; its batch gets the state.
        memory: where they are written: so many bytes as :meth:`room` says.
        backend: what runs it.
    """

    def __init__(self, bucket: Bucket, memory: torch.Tensor, backend: Backend) -> None:
        self._bucket, self._backend, self.parts = bucket, backend, list[Part]()
        self._aside: set[Part] = set()
        at = 0
        for member in bucket.members:
            for number, cell in enumerate(member.state):
                if isinstance(cell, Cell):
                    size = cell.room(member.start, member.stop)
                    self.parts.append(cell.open(member.start, member.stop, memory[at : at + size]))
                    at += size
                    if number < bucket.batch.prologue.aside:
                        self._aside.add(self.parts[-1])

    @staticmethod
    def room(bucket: Bucket) -> int:
        """Bytes that the state of a bucket takes."""
        return sum(cell.room(member.start, member.stop) for member in bucket.members for cell in member.cells)

    def begin(self) -> None:
        """Give the batch its state."""
        decode(self._backend, [part.job for part in self.parts if part.job is not None and part.decodes])
        for part in self.parts:
            part.fill()
        parts = iter(self.parts)
        self._bucket.batch.state = [
            tuple(_numbers(each, member, parts) for each in member.state) for member in self._bucket.members
        ]

    def close(self, stage: Stage) -> list[Part]:
        """Keep what a stage wrote, which are the parts that this returns."""
        self._bucket.batch.state = []
        kept = {True: stage.writes_parameter, False: stage.writes_state}
        parts = [part for part in self.parts if kept[part in self._aside]]
        for part in parts:
            part.gather()
        encode(self._backend, [part.job for part in parts if part.job is not None])
        return parts


class Away(Open):
    """A bucket whose state comes from the host: the copies begin at once.

    Args:
        bucket: the bucket.
        carrier: what copies.
        backend: what runs it.
    """

    def __init__(self, bucket: Bucket, carrier: Carrier, backend: Backend) -> None:
        self._carrier, self._space = carrier, carrier.reserve(self.room(bucket))
        super().__init__(bucket, self._space.memory, backend)
        last = [part.cell.source.last for part in self.parts if isinstance(part.cell, Remote)]
        carrier.bring(self._space, [move for part in self.parts for move in part.inward], last)

    def begin(self) -> None:
        self._carrier.arrive(self._space)
        super().begin()

    def close(self, stage: Stage) -> list[Part]:
        """Also begin to copy to the host."""
        parts = super().close(stage)
        done = self._carrier.take(self._space, [move for part in parts for move in part.outward])
        for part in parts:
            if part.outward and isinstance(part.cell, Remote):
                part.cell.target.last = done
        return parts


def _numbers(state: torch.Tensor | Cell | Tossed, member: Member, parts: Iterator[Part]) -> torch.Tensor:
    """One state of a member as a launch takes it; of a cell, the numbers of the next part."""
    if isinstance(state, Cell):
        return next(parts).values
    return state.of(member.start, member.stop) if isinstance(state, Tossed) else member.part(state)


def _direct(state: torch.Tensor | Cell | Tossed, member: Member) -> torch.Tensor | Codes | None:
    """One state of a member as it is in memory; None where it must be opened."""
    if isinstance(state, Cell):
        return state.direct(member.start, member.stop)
    return None if isinstance(state, Tossed) else member.part(state)


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
        check_places(slot)
        tossed = Tossed(slot, step)
        return (tossed if any(isinstance(each, Cell) for each in state) else tossed.of(0, slot.numel), *state)
    if accumulate:
        lost = (Lent(each) if isinstance(each, HostCell) else each.clone() for each in state[: prologue.aside])
        return (*lost, *state[prologue.aside :])
    return state


def key_of(state: Sequence[torch.Tensor | Cell | Tossed]) -> tuple[Any, ...]:
    """Equal for state that one launch can take."""
    return tuple(each.kind if isinstance(each, Cell) else each.dtype for each in state)
