"""State kept as codes: on this rank only; a step works on its numbers, and so do checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from oput_dist.backends import Codes, Job, backend, decode, encode
from oput_dist.kernels.codes import Format
from oput_dist.layout import LayoutError, flat

from .blocks import Range, blocks_of
from .options import Options
from .slot import Slot
from .storage import codable
from .writing import COMPENSATION

__all__ = [
    "Cell",
    "Coded",
    "Part",
    "State",
    "as_tensor",
    "decoded",
    "drop_joint",
    "dtype_of",
    "kept_state",
    "numbers_of",
    "value_of",
    "with_tensors",
]

State = MutableMapping[str, Any]
"""The state of one parameter."""


@dataclass(eq=False)
class Coded:
    """One state of this rank's piece of a parameter. The piece of a whole block lies in a block of its own size.

    Attributes:
        code: the format.
        codes: uint8, ``[blocks, code.width]``.
        scales: float32, ``[blocks]``: the largest magnitude in each block, also of what other ranks have of it.
    """

    code: Format
    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def zeros(cls, code: Format, count: int, device: torch.device) -> Coded:
        """Blocks of zeros."""
        made = cls(
            code,
            torch.empty(count, code.width, dtype=torch.uint8, device=device),
            torch.zeros(count, dtype=torch.float32, device=device),
        )
        if count and device.type != "meta":
            zero = torch.empty(1, code.width, dtype=torch.uint8, device="cpu")
            scale = torch.zeros(1, dtype=torch.float32, device="cpu")
            encode(backend("eager"), [(code, zero, scale, torch.zeros(1, code.block, device="cpu"))])
            made.codes.copy_(zero.to(device))
        return made

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


@dataclass(eq=False)
class Part:
    """Blocks of one state whose numbers a step has in memory."""

    cell: Cell
    range: Range
    memory: torch.Tensor
    """float32, ``[blocks, size]``; zero where the piece has no element."""
    values: torch.Tensor
    """The elements of the piece, flat: a part of :attr:`memory`, if the piece is consecutive."""

    @cached_property
    def job(self) -> Job:
        """To decode or code it all. Blocks that are cut get the scale of this rank's elements, for now."""
        coded, own = self.cell.coded, slice(self.range.first, self.range.first + self.range.count)
        return self.cell.code, coded.codes[own], coded.scales[own], self.memory

    @property
    def decodes(self) -> bool:
        """Whether its numbers are in codes: not those that were loaded."""
        return self.cell.loaded is None

    def fill(self) -> None:
        """Set what is not decoded."""
        loaded, blocks = self.cell.loaded, self.cell.blocks
        if blocks.begin is None:
            flat = self.memory.view(-1)
            self.values = flat[self._places()] if loaded is None else loaded.to(torch.float32, copy=True)
            return
        if loaded is not None:
            self.values.copy_(loaded[self.range.start : self.range.stop])
        lead, used = self.range.lead, self.range.lead + len(self.values)
        if lead:
            self.memory.view(-1)[:lead] = 0  # codes of some formats have no zero
        if used < self.memory.numel():
            self.memory.view(-1)[used:] = 0

    def gather(self) -> None:
        """Put numbers in their blocks where they are apart."""
        if self.cell.blocks.begin is None:
            self.memory.zero_().view(-1)[self._places()] = self.values

    def _places(self) -> torch.Tensor:
        return self.cell.blocks.places(self.cell.slot)


class Cell:
    """One state of one slot in a step: codes, or numbers that were loaded and become codes in it.

    Args:
        slot: the slot.
        name: of the state.
        code: the format.
        state: of the slot's parameter.
    """

    dtype = torch.float32

    def __init__(self, slot: Slot, name: str, code: Format, state: State) -> None:
        if slot.layout.why_no_sums is not None:
            raise LayoutError(
                f"{slot.name}: state in {code.name} must know places in the whole. {slot.layout.why_no_sums}"
            )
        self.slot, self.name, self.code, self._state = slot, name, code, state
        self.blocks = blocks_of(slot, code.block)
        found = _found(slot, state, name)
        self._coded = found if isinstance(found, Coded) else None
        self.loaded: torch.Tensor | None = None
        if isinstance(found, torch.Tensor):
            self.loaded = _numbers(slot, found)
        elif self._coded is None or self._coded.code != code:
            self._coded = Coded.zeros(code, self.blocks.count, slot.device)
            state[slot.key(name)] = self._coded
        elif self._coded.codes.device != slot.device:
            self._coded.codes, self._coded.scales = (
                self._coded.codes.to(slot.device),
                self._coded.scales.to(slot.device),
            )
        if self._coded is not None and len(self._coded.codes) != self.blocks.count:
            raise ValueError(
                f"state {name!r} of {slot.name} has {len(self._coded.codes)} blocks, but this rank's piece has "
                f"{self.blocks.count}: if the parameter was sharded after this optimizer was made, make the optimizer "
                "anew"
            )

    @property
    def coded(self) -> Coded:
        """The codes; made anew where there were numbers."""
        if self._coded is None:
            self._coded = Coded.zeros(self.code, self.blocks.count, self.slot.device)
        return self._coded

    def open(self, start: int, stop: int, memory: torch.Tensor) -> Part:
        """Elements ``start:stop``, in memory of enough of them: once it is decoded, :meth:`Part.fill` sets the rest."""
        blocks, size = self.blocks.range(start, stop), self.code.block
        memory = memory[: blocks.count * size].view(blocks.count, size)
        return Part(self, blocks, memory, memory.view(-1)[blocks.lead : blocks.lead + stop - start])

    def direct(self, start: int, stop: int) -> Codes | None:
        """The codes of elements ``start:stop``, if they are those of whole blocks that are here alone."""
        blocks = self.blocks.range(start, stop)
        cut = self.blocks.cut
        if self._coded is None or self.loaded is not None or self.blocks.begin is None or blocks.lead:
            return None
        if len(cut) and bool(((cut >= blocks.first) & (cut < blocks.first + blocks.count)).any()):
            return None
        own = slice(blocks.first, blocks.first + blocks.count)
        return Codes(self.code, self._coded.codes[own], self._coded.scales[own])

    def finish(self) -> None:
        """Keep the codes, once all parts are coded."""
        self._state[self.slot.key(self.name)], self.loaded = self.coded, None

    def cut_in(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """The numbers of the cut blocks of a part among this rank's, and the numbers in them."""
        cut = self.blocks.cut
        cut = cut[(cut >= part.range.first) & (cut < part.range.first + part.range.count)]
        return cut, part.memory[(cut - part.range.first).to(part.memory.device)]


def _numbers(slot: Slot, value: torch.Tensor) -> torch.Tensor:
    """This rank's piece of a loaded state, flat, in the order of the parameter's."""
    piece = slot.layout.piece_of_state(value)
    if piece.numel() != slot.numel:
        raise ValueError(f"state of {slot.name} has {piece.numel()} elements here, but its piece {slot.numel}")
    return flat(piece.to(slot.device), slot.strides)


def kept_state(slot: Slot, state: State, names: tuple[str, ...], options: Options) -> tuple[torch.Tensor | Cell, ...]:
    """This rank's pieces of the state, made where they are missing: flat tensors, or cells of what has codes.

    Args:
        slot: the slot.
        state: of its parameter.
        names: of the state, in order; what rounding lost is in the parameter's own dtype whatever the options say.
        options: in what form it is kept.
    """
    if options.storage is None:
        return slot.flat_state(state, names, options.state_dtype)
    found: list[torch.Tensor | Cell] = []
    for name in names:
        form = None if name == COMPENSATION else options.storage.of(name, slot)
        if isinstance(form, Format):
            found.append(Cell(slot, name, form, state))
        elif slot.shared and name != COMPENSATION and codable(name) is not None:
            found.append(_own_piece(slot, state, name, form))
        else:
            if isinstance(state.get(name), Coded):
                state[name] = as_tensor(slot, state[name])
            found.append(slot.flat_state(state, (name,), form)[0])
    return tuple(found)


def _own_piece(slot: Slot, state: State, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    """State of one original of a flat parameter, by itself, so that the others need no memory beside their codes."""
    value = state.get(slot.key(name))
    if isinstance(value, Coded):
        value = state[slot.key(name)] = decoded(slot, value)
    if value is None:
        loaded = state.get(name)
        made = torch.zeros(slot.numel, dtype=dtype or slot.dtype, device=slot.device)
        value = state[slot.key(name)] = made if loaded is None else _numbers(slot, loaded).clone()
    if value.device != slot.device:
        value = state[slot.key(name)] = value.to(slot.device)
    assert isinstance(value, torch.Tensor)
    return value


def decoded(slot: Slot, coded: Coded) -> torch.Tensor:
    """The numbers of this rank's piece, flat, float32."""
    blocks = blocks_of(slot, coded.code.block)
    memory = torch.empty(blocks.count, coded.code.block, dtype=torch.float32, device=coded.codes.device)
    run = backend("triton" if memory.device.type == "cuda" else "eager")
    decode(run, [(coded.code, coded.codes, coded.scales, memory)])
    if blocks.begin is None:
        return memory.view(-1)[blocks.places(slot)]
    lead = blocks.range(0, slot.numel).lead
    return memory.view(-1)[lead : lead + slot.numel]


def as_tensor(slot: Slot, coded: Coded) -> torch.Tensor:
    """A state tensor as layouts keep it, with the numbers of codes."""
    made = slot.layout.zeros(torch.float32)
    flat(slot.layout.piece_of_state(made), slot.strides).copy_(decoded(slot, coded))
    return made


def _found(slot: Slot, state: Mapping[str, Any], name: str) -> torch.Tensor | Coded | None:
    """A state in the shape of the parameter, as it is: under its name, or by itself of one original of several."""
    own: torch.Tensor | Coded | None = state.get(slot.key(name))
    if own is None and slot.shared:
        own = state.get(name)
    return own


def value_of(slot: Slot, state: Mapping[str, Any], name: str) -> torch.Tensor | None:
    """A state in the shape of the parameter, as :meth:`Layout.piece_of_state` takes it; None if there is none."""
    value = _found(slot, state, name)
    return decoded(slot, value).as_strided(slot.piece.shape, slot.strides) if isinstance(value, Coded) else value


def numbers_of(slot: Slot, state: Mapping[str, Any], name: str) -> torch.Tensor:
    """This rank's piece of a state that is there, flat: itself, or what its codes stand for."""
    value = value_of(slot, state, name)
    assert value is not None
    return flat(slot.layout.piece_of_state(value), slot.strides)


def dtype_of(slot: Slot, state: Mapping[str, Any], name: str) -> torch.dtype | None:
    """The dtype of what :func:`value_of` returns."""
    value = _found(slot, state, name)
    return torch.float32 if isinstance(value, Coded) else None if value is None else value.dtype


def with_tensors(slots: Sequence[Slot], state: State, names: Sequence[str]) -> dict[str, Any]:
    """The state of a parameter as checkpoints hold it: tensors in place of codes, and of what its originals keep apart.

    Args:
        slots: of the parameter.
        state: of the parameter.
        names: of state in the shape of the parameter.
    """
    result = dict(state)
    for name in names:
        for slot in slots:
            value = result.get(slot.key(name))
            if isinstance(value, Coded):
                value = decoded(slot, value)
            elif value is None or not slot.shared:
                continue
            result.pop(slot.key(name))
            if name not in result:
                result[name] = slot.layout.zeros(value.dtype)
            flat(slot.layout.piece_of_state(result[name]), slot.strides).copy_(value)
    return result


def drop_joint(
    slots: Sequence[Slot],
    state: Mapping[torch.Tensor, State],
    names_of: Callable[[Slot], Sequence[str]],
) -> None:
    """Free what was loaded for a flat parameter, once each of its originals has its own."""
    left: set[tuple[torch.Tensor, str]] = set()
    joint: dict[tuple[torch.Tensor, str], None] = {}
    for slot in slots:
        for name in names_of(slot) if slot.shared else ():
            kept = state.get(slot.parameter, {})
            if kept.get(name) is not None:
                joint[slot.parameter, name] = None
                if kept.get(slot.key(name)) is None:
                    left.add((slot.parameter, name))
    for parameter, name in joint.keys() - left:
        del state[parameter][name]
