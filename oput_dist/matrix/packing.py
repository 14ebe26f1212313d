"""Matrices in a byte for each element: what roots and bases are found from and are, as codes.

Not in blocks of 256 with their largest magnitude, as moving averages of the shape of a parameter are kept: a statistic
changes by a thousandth at a step, and what lies in a cell of 8 bits would never leave it; and the error of large
numbers would be more than all of a small row beside them, so that eigenvalues turn negative.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Columns", "Packing", "Symmetric"]

_MOST = 2**15 - 1
_PART = 4
"""Bytes of what a matrix takes are a multiple of it, so that each begins where a float32 can be."""


class Packing(ABC):
    """How a matrix ``[d, d]`` is kept: ``d`` numbers in float32, then a square of bytes. Zeros are a matrix of zeros.

    What is unpacked and packed again is the same bytes.
    """

    @staticmethod
    def size(shape: Sequence[int]) -> int:
        """Bytes of one matrix."""
        return _PART * (shape[0] + -(-shape[0] * shape[1] // _PART))

    @abstractmethod
    def unpack(self, kept: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, whole: bool = True) -> torch.Tensor:
        """``[n, d, d]`` in a dtype, from uint8 ``[n, size]``, the bytes of each one after the other.

        If it need not be the ``whole`` of it, what lies above the diagonal of symmetric ones is zeros.
        """

    @abstractmethod
    def pack(self, numbers: torch.Tensor) -> torch.Tensor:
        """uint8 ``[n, size]`` of ``[n, d, d]``. Of symmetric ones nothing above the diagonal is looked at."""


def _parts(kept: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers in float32 ``[n, d]``, and the square, as views of what is kept."""
    side, n = shape[0], len(kept)
    floats = kept[:, : _PART * side].view(torch.float32)
    return floats, kept[:, _PART * side : _PART * side + side * side].view(n, side, side)


def _empty(numbers: torch.Tensor) -> torch.Tensor:
    size = Packing.size(numbers.shape[1:])
    return torch.zeros(len(numbers), size, dtype=torch.uint8, device=numbers.device)


@dataclass(frozen=True)
class Symmetric(Packing):
    """A positive semidefinite matrix: its diagonal exactly, of every pair of other elements a code of 16 bits.

    The code is the signed root of the correlation, ``a_ij / sqrt(a_ii a_jj)``, of -1 to 1, in steps of 1/32767. The
    square has its high byte below the diagonal, and its low byte where that is when all rows and columns are reversed:
    above it.
    """

    def unpack(self, kept: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, whole: bool = True) -> torch.Tensor:
        diagonal, square = _parts(kept, shape)
        numbers = square.view(torch.int8).to(dtype)
        other = torch.empty_like(numbers).copy_(square.flip(1, 2))
        numbers.mul_(256 / _MOST).add_(other, alpha=1 / _MOST).tril_(-1)
        numbers.mul_(torch.abs(numbers, out=other)).mul_(_sizes(diagonal, dtype, other))
        if whole:
            numbers += other.copy_(numbers.mT)
        numbers.diagonal(dim1=1, dim2=2).copy_(diagonal)
        return numbers

    def pack(self, numbers: torch.Tensor) -> torch.Tensor:
        kept = _empty(numbers)
        diagonal, square = _parts(kept, numbers.shape[1:])
        diagonal.copy_(numbers.diagonal(dim1=1, dim2=2))
        given = _sizes(diagonal, numbers.dtype, torch.empty_like(numbers))
        torch.div(numbers, given, out=given)
        roots = (
            given.abs().sqrt_().mul_(_MOST).round_().clamp_(max=_MOST)
        )  # roots of zeros would take five times as long
        codes = roots.mul_(given.sign_()).tril_(-1).nan_to_num_(0.0).to(torch.int16)
        square.copy_((codes >> 8).to(torch.int8).view(torch.uint8))
        square += codes.to(torch.uint8).flip(1, 2)
        return kept


def _sizes(diagonal: torch.Tensor, dtype: torch.dtype, out: torch.Tensor) -> torch.Tensor:
    """How large each element can be at most: ``sqrt(a_ii a_jj)``."""
    root = diagonal.to(dtype).clamp(min=0).sqrt()
    return torch.mul(root.unsqueeze(2), root.unsqueeze(1), out=out)


@dataclass(frozen=True)
class Columns(Packing):
    """Any matrix: codes of 8 bits, and for each column what a step of them is, so that the largest magnitude is 127.

    127 such steps, rounded, give the same step again: rounding leaves less than half of the step's last place, or the
    magnitude that the step was found from.
    """

    def unpack(self, kept: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, whole: bool = True) -> torch.Tensor:
        step, square = _parts(kept, shape)
        return square.view(torch.int8).to(dtype).mul_(step.to(dtype).unsqueeze(1))

    def pack(self, numbers: torch.Tensor) -> torch.Tensor:
        kept = _empty(numbers)
        step, square = _parts(kept, numbers.shape[1:])
        step.copy_(numbers.abs().amax(1) / 127)
        inverse = torch.where(step > 0, 1.0 / step.to(numbers.dtype), 0.0)
        codes = (numbers * inverse.unsqueeze(1)).round_().clamp_(-127, 127)
        square.copy_(codes.nan_to_num_(0.0).to(torch.int8).view(torch.uint8))
        return kept
