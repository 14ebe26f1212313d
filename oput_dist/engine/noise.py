"""Random bits for stochastic rounding: they follow from a parameter's name, its step and the place in the whole tensor,
so that no layout, rank or backend changes them."""

from __future__ import annotations

import torch

from oput_dist.layout import Box, LayoutError

from .mixing import key_of
from .slot import Slot

__all__ = ["bits_for", "bits_in", "check_places"]

_CHUNK = {"cpu": 2**16, "cuda": 2**24}
"""Elements at once: what stays in a core's cache, and what keeps a GPU busy."""
_ODD, _FIRST, _SECOND = 0x9E3779B1 - 2**32, 0x7FEB352D, 0x846CA68B - 2**32


def bits_for(slot: Slot, step: int) -> torch.Tensor:
    """Sixteen random bits for each element of this rank's piece of a parameter, int16, flat, in its order.

    Args:
        slot: the parameter.
        step: its step count.

    Raises:
        LayoutError: where it is not known which elements of the whole the piece has.
    """
    first, second = _keys(slot, step)
    out = torch.empty(slot.numel, dtype=torch.int16, device=slot.device)
    chunk = _CHUNK.get(slot.device.type, 2**20)
    for box, view in zip(slot.boxes, slot.views(out), strict=True):
        if not view.ndim:
            view.copy_(_hashed(torch.zeros((), dtype=torch.int32, device=slot.device), first, second))
            continue
        places = _places(box, slot.layout.shape, slot.device)
        rows = max(1, chunk // max(1, view[:1].numel()))
        for start in range(0, view.shape[0], rows):
            index = places[0][start : start + rows]
            for place in places[1:]:
                index = index + place
            view[start : start + rows] = _hashed(index, first, second)
    return out


def bits_in(slot: Slot, step: int, begin: int, numel: int) -> torch.Tensor:
    """The same bits for consecutive elements of the whole parameter, ``begin`` and those that follow, row-major."""
    first, second = _keys(slot, step)
    out = torch.empty(numel, dtype=torch.int16, device=slot.device)
    chunk = _CHUNK.get(slot.device.type, 2**20)
    for start in range(0, numel, chunk):
        stop = min(start + chunk, numel)
        out[start:stop] = _hashed(torch.arange(begin + start, begin + stop, device=slot.device).int(), first, second)
    return out


def _keys(slot: Slot, step: int) -> tuple[int, int]:
    """Of a parameter at a step: 32 bits each, with signs."""
    check_places(slot)
    name = slot.name.replace("'module.", "'").replace(".module.", ".")  # as DDP calls it
    key = key_of("stochastic rounding", name, step)
    return key >> 32, (key & (2**32 - 1)) - 2**31


def check_places(slot: Slot) -> None:
    """Raise LayoutError where it is not known which elements of the whole a piece has."""
    if slot.layout.why_no_sums is not None:
        raise LayoutError(f"{slot.name}: stochastic rounding must know places in the whole. {slot.layout.why_no_sums}")


def _places(box: Box, shape: torch.Size, device: torch.device) -> list[torch.Tensor]:
    """For each axis what it adds to the global row-major index, int32, so that the sum broadcasts to the box.

    Of the index the lower 32 bits count: elements that lie 2^32 apart have the same bits.
    """
    steps = torch.empty(shape, device="meta").stride()
    made = []
    for axis, (index, step) in enumerate(zip(box.index, steps, strict=True)):
        own = torch.arange(index.start, index.stop, device=device) if isinstance(index, slice) else index.to(device)
        made.append((own * step).to(torch.int32).reshape(-1, *[1] * (len(steps) - axis - 1)))
    return made


def _hashed(index: torch.Tensor, first: int, second: int) -> torch.Tensor:
    """Every bit of the result depends on every bit of index and keys: a multiplicative hash of 32 bits (lowbias32)."""
    x = index * _ODD
    x += first
    x ^= (x >> 16) & 0xFFFF
    x *= _FIRST
    x ^= (x >> 15) & 0x1FFFF
    x += second
    x *= _SECOND
    return (x >> 16).to(torch.int16)
