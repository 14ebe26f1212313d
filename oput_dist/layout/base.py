"""What a layout tells: which piece of a parameter this rank holds, and who holds the others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from .box import Box

__all__ = ["Layout", "LayoutError"]


class LayoutError(ValueError):
    """A tensor is laid out in a way that cannot be used here."""


class Layout(ABC):
    """Where the elements of one parameter live.

    Attributes:
        name: the qualified name, where the layout knows it; None otherwise.
        shape: the global shape.
        device: where this rank's piece is.
        groups: the process groups over which the pieces are spread, one after the other: summing a value over all of
            them gives the sum over the whole parameter, replicas counted once. Empty if every rank holds all of it.
        gather_group: the group over which updated pieces must be exchanged because every rank keeps the whole
            parameter but updates only its piece; None otherwise.
        partial_groups: the process groups over which a gradient may come as partial sums, for all ranks of them alike;
            decided by metadata only. See :meth:`partial`.
        replica_groups: the process groups, beside those of a mesh, over which wrappers keep copies of this rank's piece
            equal by averaging gradients: DDP's, and those of FSDP1's replicas, where they are known.
        why_no_sums: why sums over the whole parameter cannot be taken here, and what to do; None if they can.
    """

    name: str | None = None
    shape: torch.Size
    device: torch.device
    groups: tuple[dist.ProcessGroup, ...] = ()
    gather_group: dist.ProcessGroup | None = None
    partial_groups: tuple[dist.ProcessGroup, ...] = ()
    replica_groups: tuple[dist.ProcessGroup, ...] = ()
    why_no_sums: str | None = None

    @property
    def sharers(self) -> tuple[dist.ProcessGroup, ...]:
        """The process groups that connect all ranks that hold a piece or a replica: one, or one along each dimension of
        a mesh. Empty for this rank alone.

        Raises:
            LayoutError: for ranks that nothing connects in order.
        """
        groups = (*self.groups, *self.partial_groups, *self.replica_groups)
        if len(groups) <= 1:
            return groups
        if prod(dist.get_world_size(group) for group in groups) == dist.get_world_size():
            return (dist.group.WORLD,)  # type: ignore[return-value]
        return (*self.groups, *self.partial_groups)  # replicas may be numbered in any way

    @property
    @abstractmethod
    def boxes(self) -> tuple[Box, ...]:
        """This rank's piece as boxes of the global tensor, in the order of memory; none for an empty piece."""

    @abstractmethod
    def piece(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's piece of the parameter, or of a tensor like it (its gradient)."""

    def piece_of_state(self, value: torch.Tensor) -> torch.Tensor:
        """This rank's memory of a state value that :meth:`zeros` or :meth:`adopt` made."""
        return value

    @abstractmethod
    def zeros(self, dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
        """State for the piece, as it is kept in ``optimizer.state`` and in checkpoints; on another device if given."""

    @abstractmethod
    def adopt(self, value: torch.Tensor) -> torch.Tensor:
        """A loaded state value, given whole or as :meth:`zeros` makes it, as :meth:`zeros` would place it."""

    def vector(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Zeros for state that is not parameter-shaped: the same on every rank that holds a piece or a replica."""
        return torch.zeros(tuple(shape), dtype=dtype, device=self.device)

    def adopt_vector(self, value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """A loaded value of such state, as :meth:`vector` would place it; its dtype is kept.

        Raises:
            LayoutError: for another shape.
        """
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if tuple(whole.shape) != tuple(shape):
            raise LayoutError(f"state of shape {tuple(whole.shape)} where {tuple(shape)} is needed")
        result = self.vector(shape, whole.dtype)
        self.memory_of_vector(result).copy_(whole)
        return result

    def memory_of_vector(self, value: torch.Tensor) -> torch.Tensor:
        """The local memory of what :meth:`vector` made: all of it."""
        return value

    def spread(self, length: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, int] | None:
        """Zeros for a vector of which every rank that holds a piece or a replica has a part, as checkpoints reshard it.

        Returns:
            the tensor, the memory of this rank's part, and where that begins; None where no mesh can say so.
        """
        return None

    def fault_of(self, gradient: torch.Tensor) -> str | None:
        """How a gradient is laid out so that its piece cannot be taken, and what to do; None if it can."""
        return None

    def partial(self, gradient: torch.Tensor) -> tuple[float, ...]:
        """For each of :attr:`partial_groups`, what this rank's value counts for in the sum over it; 0: it is no sum."""
        return (0.0,) * len(self.partial_groups)

    def partial_piece(self, gradient: torch.Tensor) -> torch.Tensor:
        """This rank's terms of a gradient that is a partial sum, in the shape of its piece."""
        raise NotImplementedError

    def placed(self, local: torch.Tensor) -> torch.Tensor:
        """A tensor laid out like the parameter, of which this rank holds ``local``."""
        return local

    def pieces(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """The pieces of all ranks of :attr:`gather_group`, in rank order, as views of the whole parameter."""
        raise NotImplementedError
