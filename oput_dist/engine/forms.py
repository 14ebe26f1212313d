"""State in the shape of parameters, in whatever form it is kept: for a step, for checkpoints, and for reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from oput_dist.kernels.codes import Format
from oput_dist.layout import flat

from .cell import Cell, State, found_in
from .code_cell import CodeCell, piece_of
from .coded import Coded, decoded
from .host_cell import HostCell, HostCodeCell, hosted_numbers
from .hosted import HOST, Hosted
from .options import Options
from .slot import Slot
from .storage import codable
from .writing import COMPENSATION

__all__ = [
    "drop_joint",
    "dtype_of",
    "flats_of",
    "kept_state",
    "lost_of",
    "numbers_of",
    "put_away",
    "value_of",
    "with_tensors",
]


def kept_state(slot: Slot, state: State, names: tuple[str, ...], options: Options) -> tuple[torch.Tensor | Cell, ...]:
    """This rank's pieces of the state, made where they are missing: flat tensors, or cells of what must be opened.

    Args:
        slot: the slot.
        state: of its parameter.
        names: of the state, in order; what rounding lost is in the parameter's own dtype whatever the options say.
        options: in what form it is kept, and where.
    """
    if not options.opens:
        return slot.flat_state(state, names, options.state_dtype)
    hosted = options.home is not None and options.home.serves(slot.device)
    if not hosted and any(isinstance(value, Hosted) for value in state.values()):
        _merge(slot, state, names, None)  # the parameter was moved to where its state need not travel
    found: list[torch.Tensor | Cell] = []
    for name in names:
        form = None if name == COMPENSATION else options.form(name, slot)
        if isinstance(form, Format):
            found.append((HostCodeCell if hosted else CodeCell)(slot, name, form, state))
        elif hosted:
            found.append(HostCell(slot, name, form or slot.dtype, state))
        elif options.storage is not None and slot.shared and name != COMPENSATION and codable(name) is not None:
            found.append(_own_piece(slot, state, name, form))
        else:
            if isinstance(state.get(name), Coded):
                _merge(slot, state, (name,), None)
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
        value = state[slot.key(name)] = made if loaded is None else piece_of(slot, loaded).to(slot.device, copy=True)
    if value.device != slot.device:
        value = state[slot.key(name)] = value.to(slot.device)
    assert isinstance(value, torch.Tensor)
    return value


def put_away(slot: Slot, state: State, names: Iterable[str], options: Options) -> None:
    """Bring loaded state of a slot to host memory, where it lives there."""
    if options.home is not None and options.home.serves(slot.device) and not slot.shared:
        for name in names:
            hosted = hosted_numbers(slot, found_in(slot, state, name))
            if hosted is not None:
                state[slot.key(name)] = hosted


# --------------------------------------------------------------------------------------------------------- for reading


def _plain(slot: Slot, value: Any) -> torch.Tensor:
    """The numbers of codes, on the device, or of what is on the host, there: flat."""
    if isinstance(value, Hosted):
        kept = value.value
        return kept if isinstance(kept, torch.Tensor) else decoded(slot, kept).to(HOST)
    return decoded(slot, value) if isinstance(value, Coded) else value


def value_of(slot: Slot, state: Mapping[str, Any], name: str) -> torch.Tensor | None:
    """A state in the shape of the parameter, as :meth:`Layout.piece_of_state` takes it; None if there is none.

    What lives on the host is on the CPU.
    """
    value = found_in(slot, state, name)
    if isinstance(value, (Coded, Hosted)):
        return _plain(slot, value).as_strided(slot.piece.shape, slot.strides)
    known: torch.Tensor | None = value
    return known


def dtype_of(slot: Slot, state: Mapping[str, Any], name: str) -> torch.dtype | None:
    """The dtype of what :func:`value_of` returns."""
    value = found_in(slot, state, name)
    return torch.float32 if isinstance(value, Coded) else None if value is None else value.dtype


def numbers_of(slot: Slot, state: Mapping[str, Any], name: str) -> torch.Tensor | Hosted:
    """This rank's piece of a state that is there, for a sweep: flat; itself, or what its codes stand for."""
    value = found_in(slot, state, name)
    if isinstance(value, Hosted):
        return value
    return decoded(slot, value) if isinstance(value, Coded) else flat(slot.layout.piece_of_state(value), slot.strides)


def flats_of(slot: Slot, state: State, names: tuple[str, ...]) -> tuple[torch.Tensor | Hosted, ...]:
    """This rank's pieces of state that is there, for a sweep that writes them: none has codes."""
    if any(isinstance(found_in(slot, state, name), Hosted) for name in names):
        return tuple(numbers_of(slot, state, name) for name in names)
    return slot.flat_state(state, names, None)


def lost_of(slot: Slot, state: State) -> torch.Tensor | Hosted | None:
    """What rounding this rank's piece of the parameter lost, for a sweep, where that is kept."""
    found = found_in(slot, state, COMPENSATION)
    return found if isinstance(found, Hosted) else slot.lost(state)


# ----------------------------------------------------------------------------------------------------- for checkpoints


def with_tensors(slots: Sequence[Slot], state: State, names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The state of a parameter as checkpoints hold it: tensors in place of codes, and of what its originals keep apart.

    What lives on the host stays on the CPU.

    Args:
        slots: of the parameter.
        state: of the parameter.
        names: for each slot, of state in the shape of the parameter: the same name may be other state of another.
    """
    result = dict(state)
    for slot, own in zip(slots, names, strict=True):
        _merge(slot, result, own, HOST)
    return result


def _merge(slot: Slot, state: State, names: Iterable[str], device: torch.device | None) -> None:
    """Put tensors as layouts keep them in place of codes, and of what originals keep apart.

    Args:
        slot: the slot.
        state: of its parameter.
        names: of the state.
        device: for tensors in place of what lives on the host; None for the parameter's.
    """
    for name in names:
        value = state.get(slot.key(name))
        if not isinstance(value, (Coded, Hosted)) and (value is None or not slot.shared):
            continue
        where = device if isinstance(value, Hosted) else None
        numbers = _plain(slot, value)
        del state[slot.key(name)]
        if name not in state:
            state[name] = slot.layout.zeros(numbers.dtype, where)
        flat(slot.layout.piece_of_state(state[name]), slot.strides).copy_(numbers)


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
