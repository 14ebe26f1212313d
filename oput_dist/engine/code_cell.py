"""State kept as codes, in a step: blocks are decoded when they are opened, and coded when they are closed."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from oput_dist.backends import Codes, Job
from oput_dist.kernels.codes import Format
from oput_dist.layout import LayoutError, flat

from .blocks import Range, blocks_of
from .cell import Cell, Part, State, found_in
from .coded import Coded
from .slot import Slot

__all__ = ["CodeCell", "CodePart", "piece_of"]


class CodePart(Part):
    """Blocks of one state whose numbers a step has in memory.

    Args:
        cell: of which state.
        range: the blocks.
        memory: float32, ``[blocks, size]``; zero where the piece has no element.
        values: the elements of the piece, flat: a part of ``memory``, if the piece is consecutive.
    """

    cell: CodeCell

    def __init__(self, cell: CodeCell, range: Range, memory: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(cell, values)
        self.range, self.memory = range, memory

    @property
    def own(self) -> slice:
        """The blocks among those of this rank."""
        return slice(self.range.first, self.range.first + self.range.count)

    @cached_property
    def job(self) -> Job:  # type: ignore[override]
        """To decode or code it all. Blocks that are cut get the scale of this rank's elements, for now."""
        coded = self.cell.coded
        return self.cell.code, coded.codes[self.own], coded.scales[self.own], self.memory

    @property
    def decodes(self) -> bool:
        """Whether its numbers are in codes: not those that were loaded."""
        return self.cell.loaded is None

    def fill(self) -> None:
        loaded, blocks = self.cell.loaded, self.cell.blocks
        if blocks.begin is None:
            if loaded is None:
                self.values = self.memory.view(-1)[self._places()]
            else:
                self.values = loaded.to(device=self.memory.device, dtype=torch.float32, copy=True)
            return
        if loaded is not None:
            self.values.copy_(loaded[self.range.start : self.range.stop])
        lead, used = self.range.lead, self.range.lead + len(self.values)
        if lead:
            self.memory.view(-1)[:lead] = 0  # codes of some formats have no zero
        if used < self.memory.numel():
            self.memory.view(-1)[used:] = 0

    def gather(self) -> None:
        if self.cell.blocks.begin is None:
            self.memory.zero_().view(-1)[self._places()] = self.values

    def cut(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The numbers of its cut blocks among this rank's, on the CPU, and the numbers and scales in them."""
        cut = self.cell.blocks.cut
        cut = cut[(cut >= self.range.first) & (cut < self.range.first + self.range.count)]
        rows = (cut - self.range.first).to(self.memory.device)
        return cut, self.memory[rows], self.job[2][rows]

    def _places(self) -> torch.Tensor:
        return self.cell.blocks.places(self.cell.slot)


class CodeCell(Cell):
    """One state of one slot in a step: codes, or numbers that were loaded and become codes in it.

    Args:
        slot: the slot.
        name: of the state.
        code: the format.
        state: of the slot's parameter.
    """

    code: Format

    def __init__(self, slot: Slot, name: str, code: Format, state: State) -> None:
        if slot.layout.why_no_sums is not None:
            raise LayoutError(
                f"{slot.name}: state in {code.name} must know places in the whole. {slot.layout.why_no_sums}"
            )
        super().__init__(slot, name, torch.float32)
        self.code, self._state = code, state
        self.blocks = blocks_of(slot, code.block)
        self.grid = self.blocks.begin, code.block
        self._coded: Coded | None = None
        self.loaded: torch.Tensor | None = None
        self._adopt(found_in(slot, state, name))
        if self._coded is not None and len(self._coded.codes) != self.blocks.count:
            raise ValueError(
                f"state {name!r} of {slot.name} has {len(self._coded.codes)} blocks, but this rank's piece has "
                f"{self.blocks.count}: if the parameter was sharded after this optimizer was made, make the optimizer "
                "anew"
            )

    def _adopt(self, found: Any) -> None:
        """Set codes, or numbers, from what is there."""
        slot, state = self.slot, self._state
        if isinstance(found, torch.Tensor):
            self.loaded = piece_of(slot, found).to(slot.device)
        elif found is None or found.code != self.code:
            self._coded = state[slot.key(self.name)] = Coded.zeros(self.code, self.blocks.count, slot.device)
        else:
            self._coded = found
            if found.codes.device != slot.device:
                found.codes, found.scales = found.codes.to(slot.device), found.scales.to(slot.device)

    @property
    def coded(self) -> Coded:
        """The codes; made anew where there were numbers."""
        if self._coded is None:
            self._coded = Coded.zeros(self.code, self.blocks.count, self.slot.device)
        return self._coded

    def direct(self, start: int, stop: int) -> Codes | None:
        """The codes of elements ``start:stop``, if they are those of whole blocks that are here alone."""
        blocks, cut = self.blocks.range(start, stop), self.blocks.cut
        if self._coded is None or self.loaded is not None or self.blocks.begin is None or blocks.lead:
            return None
        if len(cut) and bool(((cut >= blocks.first) & (cut < blocks.first + blocks.count)).any()):
            return None
        own = slice(blocks.first, blocks.first + blocks.count)
        return Codes(self.code, self._coded.codes[own], self._coded.scales[own])

    def room(self, start: int, stop: int) -> int:
        return self.blocks.range(start, stop).count * self.code.block * 4

    def open(self, start: int, stop: int, memory: torch.Tensor) -> CodePart:
        return CodePart(self, *self.laid_out(start, stop, memory))

    def laid_out(self, start: int, stop: int, memory: torch.Tensor) -> tuple[Range, torch.Tensor, torch.Tensor]:
        """The blocks of elements ``start:stop``, their numbers at the beginning of memory, and those of the piece."""
        blocks, size = self.blocks.range(start, stop), self.code.block
        numbers = memory[: blocks.count * size * 4].view(torch.float32)
        return blocks, numbers.view(blocks.count, size), numbers[blocks.lead : blocks.lead + stop - start]

    def put(self, rows: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Set the codes and scales of some blocks, whose numbers among this rank's are given."""
        rows = rows.to(codes.device)
        self.coded.codes[rows], self.coded.scales[rows] = codes, scales

    def finish(self) -> None:
        self._state[self.slot.key(self.name)], self.loaded = self.coded, None


def piece_of(slot: Slot, value: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a loaded state, flat, in the order of the parameter's."""
    piece = slot.layout.piece_of_state(value)
    if piece.numel() != slot.numel:
        raise ValueError(f"state of {slot.name} has {piece.numel()} elements here, but its piece {slot.numel}")
    return flat(piece, slot.strides)
