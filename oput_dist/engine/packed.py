"""What an owner keeps of its blocks under one name: their numbers, or the bytes that stand for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from oput_dist.matrix.work import Kept

__all__ = ["Packed", "as_kept", "memory_of", "numbers_of", "with_memory"]


@dataclass(eq=False)
class Packed:
    """State of blocks as bytes.

    Attributes:
        blocks: what is kept of each.
        memory: uint8, flat, one block after the other.
    """

    blocks: tuple[Kept, ...]
    memory: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Of all blocks."""
        return self.memory.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.blocks[0].dtype


def as_kept(value: torch.Tensor | Packed | None, blocks: Sequence[Kept], device: torch.device) -> torch.Tensor | Packed:
    """A state in the form in which it is to be kept: itself, if it is that; zeros if there is none.

    Args:
        value: the state of blocks of these shapes, in any form.
        blocks: what is to be kept of each.
        device: where.
    """
    packed = blocks[0].packing is not None
    if value is None:
        size, dtype = sum(one.form[0] for one in blocks), blocks[0].form[1]
        made = torch.zeros(size, dtype=dtype, device=device)
        return Packed(tuple(blocks), made) if packed else made
    if isinstance(value, Packed) and value.blocks == tuple(blocks):
        return value if value.memory.device == device else Packed(value.blocks, value.memory.to(device))
    if not packed and isinstance(value, torch.Tensor) and value.dtype == blocks[0].dtype and value.device == device:
        return value
    numbers = numbers_of(value).to(device)
    if not packed:
        return numbers.to(blocks[0].dtype)
    parts = numbers.split([prod(one.shape) for one in blocks])  # type: ignore[no-untyped-call]
    codes = [one.kept(part.view(1, *one.shape).to(one.dtype))[0] for one, part in zip(blocks, parts, strict=True)]
    return Packed(tuple(blocks), torch.cat(codes))


def numbers_of(value: torch.Tensor | Packed) -> torch.Tensor:
    """The numbers of a state, flat."""
    if isinstance(value, torch.Tensor):
        return value
    parts = value.memory.split([one.form[0] for one in value.blocks])  # type: ignore[no-untyped-call]
    found = [one.numbers(part.unsqueeze(0), one.dtype).flatten() for one, part in zip(value.blocks, parts, strict=True)]
    return torch.cat(found)


def memory_of(value: torch.Tensor | Packed) -> torch.Tensor:
    """The memory of a state."""
    return value if isinstance(value, torch.Tensor) else value.memory


def with_memory(value: torch.Tensor | Packed, memory: torch.Tensor) -> torch.Tensor | Packed:
    """A state of the same form in other memory."""
    return memory if isinstance(value, torch.Tensor) else Packed(value.blocks, memory)
