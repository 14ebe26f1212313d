"""How 32-bit numbers are rounded to the 16 bits that parameters are stored in, by arithmetic on bits.

Casts would not do: compilers drop one that is undone at once, as here, and Triton's interpreter truncates to bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch

from .language import Rule, rule, tl
from .stage import Write

__all__ = ["restored", "rounding_of", "split"]


@rule
def to_bfloat16(x):
    """The nearest bfloat16, of two the even one; as float32."""
    bits = tl.cast(x, tl.int32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, tl.cast(nearest, tl.float32, bitcast=True), x)


@rule
def to_float16(x):
    """The nearest float16, of two the even one; as float32."""
    bits = tl.cast(x, tl.int32, bitcast=True)
    nearest = tl.cast((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000, tl.float32, bitcast=True)
    nearest = tl.where(tl.abs(x) < 2.0**-14, (x + 0.75) - 0.75, nearest)  # subnormal: multiples of 2^-24
    nearest = tl.where(nearest > 65504.0, float("inf"), tl.where(nearest < -65504.0, -float("inf"), nearest))
    return tl.where(x == x, nearest, x)


@rule
def restored(p, lost, NEAREST):
    """A parameter with what :func:`split` left of it.

    That is at most half a unit in its last place. More must come from before someone changed the parameter, and does
    not count. (The remainder was rounded, perhaps up to just that half: hence a little less of it is compared.)
    """
    return tl.where(NEAREST(p + lost * (1 - 2.0**-8)) == p, p + lost, p)


@rule
def split(p, NEAREST):
    """A parameter as it is stored, and what that loses, both rounded."""
    stored = NEAREST(p)
    return stored, NEAREST(p - stored)


@rule
def toss_bfloat16(x, bits):
    """One of the two nearest bfloat16, as float32: the farther from zero if the rest and ``bits``, of 16, carry."""
    tossed = (tl.cast(x, tl.int32, bitcast=True) + bits) & -0x10000
    return tl.where(x == x, tl.cast(tossed, tl.float32, bitcast=True), x)


@rule
def toss_float16(x, bits):
    """One of the two nearest float16, likewise by 13 of 16 bits."""
    size = tl.abs(x)
    small = size < 2.0**-14  # subnormal: spaced as those of the next power of two, where it is moved to
    moved = tl.where(small, size + 2.0**-14, size)
    tossed = (tl.cast(moved, tl.int32, bitcast=True) + (bits & 0x1FFF)) & -0x2000
    size = tl.cast(tossed, tl.float32, bitcast=True)
    size = tl.where(small, size - 2.0**-14, size)
    size = tl.where(size > 65504.0, float("inf"), size)
    return tl.where(x == x, tl.where(x < 0, -size, size), x)


_NEAREST: dict[torch.dtype, Rule] = {torch.bfloat16: to_bfloat16, torch.float16: to_float16}
_TOSS: dict[torch.dtype, Rule] = {torch.bfloat16: toss_bfloat16, torch.float16: toss_float16}


def rounding_of(write: Write, dtype: torch.dtype) -> Any:
    """The rule that rounds to a 16-bit dtype; for other dtypes, which are stored as they are, any."""
    rules = _TOSS if write is Write.STOCHASTIC else _NEAREST
    return rules.get(dtype, to_bfloat16)
