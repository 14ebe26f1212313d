"""State that a step opens, a range at a time, and closes: it is kept in another form, or in another place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch

from oput_dist.backends import Codes, Job, Move
from oput_dist.kernels.codes import Format

from .slot import Slot

__all__ = ["Cell", "Part", "State", "found_in", "rounded"]

State = MutableMapping[str, Any]
"""The state of one parameter."""


class Part:
    """A range of one state whose numbers a step has in memory.

    Args:
        cell: of which state.
        values: the elements, flat; of a piece that is not consecutive they may be set by :meth:`fill` only.
    """

    inward: Sequence[Move] = ()
    """What is copied from the host before it is open."""
    outward: Sequence[Move] = ()
    """What is copied there once it is closed, if it was written."""
    job: Job | None = None
    """To decode or code it all."""

    def __init__(self, cell: Cell, values: torch.Tensor) -> None:
        self.cell, self.values = cell, values

    @property
    def decodes(self) -> bool:
        """Whether its numbers are in codes now."""
        return False

    def fill(self) -> None:
        """Set what is not decoded."""

    def gather(self) -> None:
        """Put numbers in their blocks where they are apart."""


class Cell(ABC):
    """One state of one slot in a step.

    Attributes:
        slot: the slot.
        name: of the state.
        dtype: of the numbers.
        code: the format, where it has codes.
        grid: where the first range may begin and in steps of how many elements others, in the whole parameter; no
            beginning, where the piece cannot be divided; None, where it may be divided anywhere.
    """

    code: Format | None = None
    grid: tuple[int | None, int] | None = None

    def __init__(self, slot: Slot, name: str, dtype: torch.dtype) -> None:
        self.slot, self.name, self.dtype = slot, name, dtype

    @property
    def kind(self) -> tuple[Any, ...]:
        """Equal for cells that one launch can take."""
        return self.dtype, self.code

    @abstractmethod
    def room(self, start: int, stop: int) -> int:
        """Bytes that elements ``start:stop`` take while they are open: a multiple of 16."""

    @abstractmethod
    def open(self, start: int, stop: int, memory: torch.Tensor) -> Part:
        """Elements ``start:stop``, in memory of so many bytes: they are there once the part is filled."""

    def direct(self, start: int, stop: int) -> Codes | None:
        """Elements ``start:stop`` as codes that a backend may work on; None where they must be opened."""
        return None

    def finish(self) -> None:  # noqa: B027  # not all have to
        """Keep what was written, once all parts are closed."""


def rounded(size: int) -> int:
    """The next multiple of 16 bytes, so that whatever follows begins as the first does."""
    return -(-size // 16) * 16


def found_in(slot: Slot, state: Mapping[str, Any], name: str) -> Any:
    """A state in the shape of the parameter, as it is: under its name, or by itself of one original of several."""
    own = state.get(slot.key(name))
    return state.get(name) if own is None and slot.shared else own
