"""State kept as codes: what holds them, and what they stand for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from oput_dist.backends import backend, decode, encode
from oput_dist.kernels.codes import Format

from .blocks import blocks_of
from .slot import Slot

__all__ = ["Coded", "decoded"]


@dataclass(eq=False)
class Coded:
    """One state of this rank's piece of a parameter. The piece of a whole block lies in a block of its own size.

    Attributes:
        code: the format.
        codes: uint8, ``[blocks, code.width]``.
        scales: float32, ``[blocks]``: the largest magnitude in each block, also of what other ranks have of it.
    """

    code: Format
    codes: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def zeros(cls, code: Format, count: int, device: torch.device) -> Coded:
        """Blocks of zeros."""
        made = cls(
            code,
            torch.empty(count, code.width, dtype=torch.uint8, device=device),
            torch.zeros(count, dtype=torch.float32, device=device),
        )
        if count and device.type != "meta":
            made.codes.copy_(_zero(code).to(device))
        return made

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


@functools.cache
def _zero(code: Format) -> torch.Tensor:
    """The codes of a block of zeros."""
    codes = torch.empty(1, code.width, dtype=torch.uint8, device="cpu")
    scale = torch.zeros(1, dtype=torch.float32, device="cpu")
    encode(backend("eager"), [(code, codes, scale, torch.zeros(1, code.block, device="cpu"))])
    return codes


def decoded(slot: Slot, coded: Coded) -> torch.Tensor:
    """The numbers of this rank's piece, flat, float32, on the parameter's device, wherever codes are."""
    blocks, device = blocks_of(slot, coded.code.block), slot.device
    memory = torch.empty(blocks.count, coded.code.block, dtype=torch.float32, device=device)
    run = backend("triton" if device.type == "cuda" else "eager")
    decode(run, [(coded.code, coded.codes.to(device), coded.scales.to(device), memory)])
    if blocks.begin is None:
        return memory.view(-1)[blocks.places(slot)]
    lead = blocks.range(0, slot.numel).lead
    return memory.view(-1)[lead : lead + slot.numel]
