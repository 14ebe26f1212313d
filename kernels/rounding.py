"""How 32-bit numbers are rounded to the 16 bits that parameters are stored in, by arithmetic on bits.

Casts would not do: compilers drop one that is undone at once, as here, and Triton's interpreter truncates to bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch

from .language import Rule, rule, tl

__all__ = ["nearest_of", "restored", "split"]


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


_NEAREST: dict[torch.dtype, Rule] = {torch.bfloat16: to_bfloat16, torch.float16: to_float16}


def nearest_of(dtype: torch.dtype) -> Any:
    """The rule that rounds to a 16-bit dtype; for others, which are stored as they are, any."""
    return _NEAREST.get(dtype, to_bfloat16)
