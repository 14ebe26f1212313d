"""What is done with whole matrices, and what their owners keep of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from .packing import Packing

__all__ = ["Held", "Kept", "Turn", "Work", "as_stack", "at"]

Shape = Sequence[int]


@dataclass(frozen=True)
class Kept:
    """One state of a matrix that its owner keeps from step to step: zeros at first."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """Of the numbers, as checkpoints hold them."""
    optional: bool = False
    """Whether a checkpoint may lack it: then it is zeros."""
    packing: Packing | None = None
    """How it is kept where it is not as the numbers themselves: then as bytes."""

    @property
    def form(self) -> tuple[int, torch.dtype]:
        """How many elements are kept, and of which dtype."""
        if self.packing is None:
            return prod(self.shape), self.dtype
        return self.packing.size(self.shape), torch.uint8

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        size, dtype = self.form
        return size * dtype.itemsize

    def numbers(self, kept: torch.Tensor, dtype: torch.dtype, whole: bool = True) -> torch.Tensor:
        """``[n, *shape]`` of some matrices, as :class:`Held` has them: the same tensor, if it is in this dtype."""
        return kept.to(dtype) if self.packing is None else self.packing.unpack(kept, self.shape, dtype, whole)

    def kept(self, numbers: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`numbers`."""
        return numbers.to(self.dtype) if self.packing is None else self.packing.pack(numbers)


@dataclass(frozen=True)
class Turn:
    """Which step of which matrices work is done for: the same in any layout, on any number of ranks."""

    step: int
    """Of the parameter group, from 1."""
    phases: tuple[tuple[int, ...], ...]
    """For each matrix of the stack, when each of its :meth:`Work.recurring` falls due: from 0 to the period, less one.
    """


class Held:
    """The state of stacked matrices: ``held[name]`` is ``[n, *shape]``, and what is written there is kept.

    Of what is packed it is the bytes, ``[n, size]``: see :meth:`numbers` and :meth:`replace`.

    Where the parts lie one after the other in memory it is a view of them; else a copy, which :meth:`finish` writes
    back.

    Args:
        kept: the state of one matrix, by name.
        memory: for each name one flat tensor for each matrix, where it is kept.

    Attributes:
        begun: by step, what threads are at work on; what is lost with this is found again.
    """

    def __init__(self, kept: Mapping[str, Kept], memory: Mapping[str, Sequence[torch.Tensor]]) -> None:
        self._kept, self._memory = kept, memory
        self._stacked: dict[str, torch.Tensor] = {}
        self.begun: dict[int, object] = {}
        self._views = {name: as_stack(parts) for name, parts in memory.items()}

    @property
    def names(self) -> list[str]:
        """Of the states."""
        return list(self._kept)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._stacked:
            parts, kept, view = self._memory[name], self._kept[name], self._views[name]
            stacked = torch.stack(list(parts)) if view is None else view
            self._stacked[name] = stacked if kept.packing is not None else stacked.view(len(parts), *kept.shape)
        return self._stacked[name]

    def numbers(
        self, name: str, dtype: torch.dtype, places: Sequence[int] | None = None, whole: bool = True
    ) -> torch.Tensor:
        """``[n, *shape]`` in a dtype, of all or some places in rising order: what is kept itself, if it is that.

        If it need not be the ``whole`` of them, what lies above the diagonal of symmetric ones may be missing.
        """
        return self._kept[name].numbers(self[name] if places is None else at(self[name], places), dtype, whole)

    def replace(self, name: str, new: torch.Tensor, places: Sequence[int], which: torch.Tensor | None = None) -> None:
        """Keep something new at some places in rising order; where there is a mask ``[n]``, only at those in it."""
        kept, made = self[name], self._kept[name].kept(new)
        old = at(kept, places)
        if which is not None:
            made = torch.where(which.view(-1, *[1] * (made.dim() - 1)), made, old)
        if old.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr():
            old.copy_(made)
        else:
            kept[list(places)] = made

    def only(self, places: Sequence[int]) -> Held:
        """Of some of the matrices."""
        return Held(self._kept, {name: [parts[i] for i in places] for name, parts in self._memory.items()})

    @property
    def in_place(self) -> bool:
        """Whether all of it are views, so that it can serve again while the memory stays."""
        return None not in self._views.values()

    def finish(self) -> None:
        """Write back what is not a view."""
        for name, stacked in self._stacked.items():
            if self._views[name] is None:
                torch._foreach_copy_(list(self._memory[name]), list(stacked.flatten(1).unbind()))


def at(stacked: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """Some of a stack, in rising order: a view where they follow each other."""
    first, last = places[0], places[-1]
    return stacked[first : last + 1] if last - first + 1 == len(places) else stacked[list(places)]


def as_stack(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """``[n, *shape]`` as a view of dense tensors that follow each other in one storage; None if they do not."""
    first = parts[0]
    start, size, storage = first.data_ptr(), first.numel() * first.element_size(), first.untyped_storage().data_ptr()
    for i, part in enumerate(parts):
        there = part.data_ptr() == start + i * size and part.untyped_storage().data_ptr() == storage
        if not (there and part.is_contiguous()):
            return None
    return first.as_strided((len(parts), *first.shape), (first.numel(), *first.stride()), first.storage_offset())


class Work(ABC):
    """Work on whole matrices. Equal, and of one hash, for matrices that may be worked on together.

    A parameter may be cut into blocks, each of which is then a matrix by itself.
    """

    def blocks(self, shape: Shape) -> list[tuple[slice, ...]]:
        """The rectangles that a parameter is cut into. By default it is one."""
        return [tuple(slice(0, size) for size in shape)]

    @abstractmethod
    def cost(self, shape: Shape) -> float:
        """Estimated time of a step for one matrix, in floating-point operations."""

    def kept(self, shape: Shape, dtype: torch.dtype) -> dict[str, Kept]:
        """What the owner of a matrix keeps, by name; ``dtype`` is that of the computation. By default nothing."""
        return {}

    def recurring(self, shape: Shape) -> tuple[int, tuple[float, ...]]:
        """Steps of a period, and the costs of what is done for a matrix once in it. By default nothing is.

        What recurs in all matrices is spread over the steps of the period, so that they take about the same time.
        """
        return 1, ()

    def load(self, shape: Shape, turn: Turn) -> float:
        """Estimated time of this step for some matrices of a shape, as :meth:`cost` counts it."""
        return self.cost(shape) * len(turn.phases)

    @abstractmethod
    def __call__(self, stacked: torch.Tensor, held: Held, turn: Turn) -> torch.Tensor:
        """``[n, *shape]`` of some matrices, which may be written to, to the same shape, each by itself."""
