"""Random numbers that depend on a key and a global index alone, so that no sharding changes them."""

from __future__ import annotations

import math

import torch

from oput_dist.engine.mixing import ODD, key_of, mixed
from oput_dist.engine.slot import Slot

__all__ = ["key_of", "normal", "probe", "signs", "uniform"]

_CHUNK = 2**20  # elements drawn at once: bounds the temporaries


def _bits(key: int, index: torch.Tensor) -> torch.Tensor:
    return mixed((index + 1) * ODD + key)


def uniform(key: int, index: torch.Tensor) -> torch.Tensor:
    """Between 0 and 1, neither of them; float64, for int64 indices >= 0."""
    return ((_bits(key, index) >> 12) & (2**52 - 1)).double() * 2.0**-52 + 2.0**-53


def signs(key: int, index: torch.Tensor) -> torch.Tensor:
    """-1 or 1 (Rademacher)."""
    return torch.where(_bits(key, index) < 0, -1.0, 1.0)


def normal(key: int, index: torch.Tensor) -> torch.Tensor:
    """Standard normal, float64 (Box and Muller)."""
    radius = (-2.0 * uniform(key, index).log()).sqrt()
    return radius * (2.0 * math.pi * uniform(key_of(key, "angle"), index)).cos()


_DRAW = {"rademacher": signs, "normal": normal}


def probe(slot: Slot, key: int, kind: str) -> torch.Tensor:
    """This rank's piece of a random vector for a whole parameter: flat, in the order and dtype of the parameter."""
    drawn = torch.empty(slot.numel, dtype=slot.dtype, device=slot.device)
    steps = torch.empty(slot.layout.shape, device="meta").stride()  # of the global index
    for box, view in zip(slot.boxes, slot.views(drawn), strict=True):
        where = [
            torch.arange(i.start, i.stop, device=slot.device) if isinstance(i, slice) else i.to(slot.device)
            for i in box.index
        ]
        rows = max(1, _CHUNK // max(1, view[:1].numel())) if view.ndim else 1
        for start in range(0, view.shape[0] if view.ndim else 1, rows):
            index = torch.zeros((), dtype=torch.int64, device=slot.device)
            for axis, (values, step) in enumerate(zip(where, steps, strict=True)):
                chosen = values[start : start + rows] if axis == 0 else values
                index = index.unsqueeze(-1) + chosen * step
            part = view[start : start + rows] if view.ndim else view
            part.copy_(_DRAW[kind](key, index))
    return drawn
