"""How parameters of 16 bits are written: what the options mean for a parameter, and the state that it takes."""

from __future__ import annotations

import torch

from oput_dist.kernels.stage import Write

__all__ = ["COMPENSATION", "compensated", "names_of", "write_of"]

COMPENSATION = "kahan_comp"
"""The name of the state that holds what rounding lost; optimi's."""

_SHORT = (torch.bfloat16, torch.float16)


def write_of(asked: Write, dtype: torch.dtype) -> Write:
    """How parameters of a dtype are written: the longer ones to nearest always."""
    return asked if dtype in _SHORT else Write.NEAREST


def compensated(asked: Write, dtype: torch.dtype) -> bool:
    """Whether parameters of a dtype have :data:`COMPENSATION` among their state."""
    return write_of(asked, dtype) is Write.KAHAN


def names_of(state: tuple[str, ...], asked: Write, dtype: torch.dtype) -> tuple[str, ...]:
    """The names of all state in the shape of parameters of a dtype: what rounding lost, then that of the rules."""
    return (COMPENSATION, *state) if compensated(asked, dtype) else state
