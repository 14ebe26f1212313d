"""State in host memory, in a step: a range is copied to the device when it is opened, and back when it is closed."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from oput_dist.backends import Job, Move

from .blocks import Range
from .cell import Cell, Part, State, found_in, rounded
from .code_cell import CodeCell, CodePart, piece_of
from .coded import Coded, decoded
from .hosted import HOST, Hosted, Remote
from .slot import Slot

__all__ = ["HostCell", "HostCodeCell", "HostPart", "Lent", "hosted_numbers"]


class HostPart(Part):
    """A range of numbers.

    Args:
        cell: of which state.
        values: the numbers on the device.
        there: those on the host.
    """

    cell: HostCell

    def __init__(self, cell: HostCell, values: torch.Tensor, there: torch.Tensor) -> None:
        super().__init__(cell, values)
        self.inward = self.outward = [(there, values)]


class HostCell(Cell, Remote):
    """Numbers, copied as they are.

    Args:
        slot: the slot.
        name: of the state.
        dtype: of what is made where it is missing; what is found keeps its own.
        state: of the slot's parameter.
    """

    def __init__(self, slot: Slot, name: str, dtype: torch.dtype, state: State) -> None:
        found = hosted_numbers(slot, found_in(slot, state, name))
        if found is None:
            found = Hosted.zeros(slot.numel, dtype, slot.device)
        state[slot.key(name)] = self.source = self.target = found
        super().__init__(slot, name, found.dtype)
        assert isinstance(found.memory, torch.Tensor)
        self._numbers = found.memory

    def room(self, start: int, stop: int) -> int:
        return rounded((stop - start) * self.dtype.itemsize)

    def open(self, start: int, stop: int, memory: torch.Tensor) -> HostPart:
        values = memory[: (stop - start) * self.dtype.itemsize].view(self.dtype)
        return HostPart(self, values, self._numbers[start:stop])


class Lent(HostCell):
    """A copy of a cell from which nothing is copied back."""

    def __init__(self, cell: HostCell) -> None:
        self.__dict__.update(cell.__dict__)

    def open(self, start: int, stop: int, memory: torch.Tensor) -> HostPart:
        part = super().open(start, stop, memory)
        part.outward = []
        return part


class HostCodePart(CodePart):
    """Blocks whose codes are copied. Loaded numbers are copied in their place."""

    cell: HostCodeCell

    def __init__(self, cell: HostCodeCell, range: Range, memory: torch.Tensor, values: torch.Tensor, beyond: Any):
        super().__init__(cell, range, memory, values)
        count, width = range.count, cell.code.width
        self._codes = beyond[: count * width].view(count, width)
        self._scales = beyond[rounded(count * width) :][: count * 4].view(torch.float32)

    @cached_property
    def job(self) -> Job:  # type: ignore[override]
        return self.cell.code, self._codes, self._scales, self.memory

    @property
    def inward(self) -> list[Move]:  # type: ignore[override]
        return self.outward if self.cell.loaded is None else []

    @property
    def outward(self) -> list[Move]:  # type: ignore[override]
        coded = self.cell.coded
        return [(coded.codes[self.own], self._codes), (coded.scales[self.own], self._scales)]


class HostCodeCell(CodeCell, Remote):
    """Codes in host memory, decoded and coded on the device."""

    def _adopt(self, found: Any) -> None:
        slot, known = self.slot, found.memory if isinstance(found, Hosted) else found
        if known is None or (isinstance(known, Coded) and known.code != self.code):
            found = self._zeros()
        elif not isinstance(found, Hosted):
            found = Hosted.of(found if isinstance(found, Coded) else piece_of(slot, found), slot.device)
        elif found.device != slot.device:
            found = Hosted.of(found.value, slot.device)
        self._state[slot.key(self.name)] = self.source = self.target = found
        if isinstance(found.memory, Coded):
            self._coded = found.memory
        else:
            self.loaded = found.memory

    def _zeros(self) -> Hosted:
        device = self.slot.device
        where = device if device.type == "meta" else HOST
        return Hosted.of(Coded.zeros(self.code, self.blocks.count, where), device)

    @property
    def coded(self) -> Coded:
        """The codes on the host."""
        if self._coded is None:
            self.target = self._zeros()
            assert isinstance(self.target.memory, Coded)
            self._coded = self.target.memory
        return self._coded

    def direct(self, start: int, stop: int) -> None:
        return None

    def room(self, start: int, stop: int) -> int:
        count = self.blocks.range(start, stop).count
        return super().room(start, stop) + rounded(count * self.code.width) + rounded(count * 4)

    def open(self, start: int, stop: int, memory: torch.Tensor) -> HostCodePart:
        return HostCodePart(self, *self.laid_out(start, stop, memory), memory[super().room(start, stop) :])

    def put(self, rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """As of any cell; the host waits for the device."""
        coded = self.coded
        if self.target.last is not None:
            self.target.last.synchronize()
        coded.codes[rows], coded.scales[rows] = codes.to(HOST), scales.to(HOST)

    def finish(self) -> None:
        self._state[self.slot.key(self.name)] = self.source = self.target
        self.loaded = None


def hosted_numbers(slot: Slot, found: Any) -> Hosted | None:
    """A state as numbers in host memory, whatever was found of it; None for nothing."""
    if found is None:
        return None
    if not (isinstance(found, Hosted) and found.device == slot.device and isinstance(found.memory, torch.Tensor)):
        value = found.value if isinstance(found, Hosted) else found
        if isinstance(value, Coded):
            value = decoded(slot, value)
        elif not isinstance(found, Hosted):
            value = piece_of(slot, value)
        found = Hosted.of(value, slot.device)
    assert isinstance(found, Hosted)
    assert isinstance(found.memory, torch.Tensor)
    if len(found.memory) != slot.numel:
        raise ValueError(
            f"state of {slot.name} has {len(found.memory)} elements here, but its piece {slot.numel}: if the "
            "parameter was sharded after this optimizer was made, make the optimizer anew"
        )
    return found
