"""Keys of random numbers, and a hash of 64-bit integers, as tensors: the finisher of the splitmix64 generator."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["ODD", "key_of", "mixed"]

ODD = 0x9E3779B97F4A7C15 - 2**64
"""The odd step between the states of the generator."""
_MIX = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def key_of(*parts: object) -> int:
    """A 64-bit key from a seed, a count, a name."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def mixed(x: torch.Tensor) -> torch.Tensor:
    """Every bit of the result depends on every bit of ``x`` (int64)."""
    x = (x ^ _shifted(x, 30)) * _MIX[0]
    x = (x ^ _shifted(x, 27)) * _MIX[1]
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros from the left: the sign is a bit like any other."""
    moved: torch.Tensor = (x >> by) & (2 ** (64 - by) - 1)
    return moved
