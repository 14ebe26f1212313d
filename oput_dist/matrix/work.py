"""What is done with whole matrices, and what their owners keep of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Held", "Kept", "Turn", "Work"]

Shape = Sequence[int]


@dataclass(frozen=True)
class Kept:
    """One state of a matrix that its owner keeps from step to step: zeros at first."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Turn:
    """Which step of which matrices work is done for: the same in any layout, on any number of ranks."""

    step: int
    """Of the parameter group, from 1."""
    numbers: tuple[int, ...]
    """Of the matrices in their group, in the order of the stack: tells apart what is not to fall due together."""


class Held:
    """The state of stacked matrices.

    Args:
        shapes: of the state of one matrix, by name.
        memory: for each name one flat tensor for each matrix, where it is kept.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], memory: Mapping[str, Sequence[torch.Tensor]]) -> None:
        self._shapes, self._memory = shapes, memory

    @property
    def names(self) -> list[str]:
        """Of the states."""
        return list(self._shapes)

    def get(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """``[n, *shape]``, to be read only, and no longer once anything is put under the name: it may be a view."""
        parts = [part.view(self._shapes[name]) for part in self._memory[name]]
        stacked = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
        return stacked if dtype is None else stacked.to(dtype)

    def put(self, name: str, stacked: torch.Tensor) -> None:
        """Keep ``[n, *shape]`` for the next step."""
        torch._foreach_copy_([part.view(self._shapes[name]) for part in self._memory[name]], list(stacked.unbind()))


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

    @abstractmethod
    def __call__(self, stacked: torch.Tensor, held: Held, turn: Turn) -> torch.Tensor:
        """``[n, *shape]`` of some matrices, which must not be written to, to the same shape, each by itself."""
