"""Formulas that several optimizers share, as rules."""

from __future__ import annotations

from .language import rule, tl

__all__ = ["adam_moments", "at_least", "at_most", "lerp", "passed_on", "sign", "square_terms"]


@rule
def lerp(old, new, weight):
    """Moving average: ``weight`` is that of the new value, which is exact at 1."""
    return (1.0 - weight) * old + weight * new


@rule
def at_least(x, low):
    """The larger of the two; NaN where ``x`` is NaN, which a GPU's maximum would hide."""
    return tl.where(x < low, low, x)


@rule
def at_most(x, high):
    """The smaller of the two; NaN where ``x`` is NaN."""
    return tl.where(x > high, high, x)


@rule
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@rule
def adam_moments(g, m, v, h):
    """First and second moment, not bias-corrected. Needs ``h.weight1`` and ``h.weight2`` (1 - beta)."""
    return lerp(m, g, h.weight1), lerp(v, g * g, h.weight2)


@rule
def passed_on(sums, h):
    """What is given in place of sums, as it is."""
    return sums


@rule
def square_terms(p, g, state, h):
    """The measure of a gradient norm: the sum of squares; touches no state."""
    return state, (g * g,)
