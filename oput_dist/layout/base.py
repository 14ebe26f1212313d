"""What a layout tells: which piece of a parameter this rank holds, and who holds the others."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist

__all__ = ["Layout", "LayoutError"]


class LayoutError(ValueError):
    """A tensor is laid out in a way that cannot be used here."""


class Layout(ABC):
    """Where the elements of one parameter live.

    Attributes:
        shape: the global shape.
        groups: the process groups over which the pieces are spread, one after the other: summing a value over all of
            them gives the sum over the whole parameter, replicas counted once. Empty if every rank holds all of it.
        gather_group: the group over which updated pieces must be exchanged because every rank keeps the whole
            parameter but updates only its piece; None otherwise.
        why_no_sums: why sums over the whole parameter cannot be taken here, and what to do; None if they can.
    """

    shape: torch.Size
    groups: tuple[dist.ProcessGroup, ...] = ()
    gather_group: dist.ProcessGroup | None = None
    why_no_sums: str | None = None

    @abstractmethod
    def piece(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's piece of the parameter, or of a tensor like it (gradient, state as :meth:`zeros` makes it)."""

    @abstractmethod
    def zeros(self, dtype: torch.dtype) -> torch.Tensor:
        """State for the piece, as it is kept in ``optimizer.state`` and in checkpoints."""

    @abstractmethod
    def adopt(self, value: torch.Tensor) -> torch.Tensor:
        """A loaded state value, given whole or as :meth:`zeros` makes it, as :meth:`zeros` would place it."""

    def pieces(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """The pieces of all ranks of :attr:`gather_group`, in rank order, as views of the whole parameter."""
        raise NotImplementedError
