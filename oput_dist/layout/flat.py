"""Flat views: a piece of a tensor as one dense range of memory, whatever its strides."""

from __future__ import annotations

import torch

__all__ = ["dense_strides", "flat", "same_order"]


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of a dense tensor of this shape that keeps the dimension order of ``tensor``."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()


def same_order(tensor: torch.Tensor, strides: tuple[int, ...]) -> bool:
    """Whether ``tensor`` is dense and lies in memory as ``strides`` say (dimensions of size one do not matter)."""
    actual = tensor.stride()
    return actual == strides or all(
        size == 1 or a == b for size, a, b in zip(tensor.shape, actual, strides, strict=True)
    )


def flat(tensor: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """The elements of ``tensor`` in the order of ``strides``, 1-d: a view where they lie so already, else a copy."""
    if not same_order(tensor, strides):
        ordered = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)
        tensor = ordered.copy_(tensor)
    return tensor if strides == (1,) else tensor.as_strided((tensor.numel(),), (1,))
