"""Formulas that several optimizers share, as rules."""

from __future__ import annotations

from .language import rule, tl

__all__ = [
    "adam_moments",
    "at_least",
    "at_most",
    "cube_root",
    "lerp",
    "lookahead",
    "over_root",
    "passed_on",
    "sigmoid",
    "sign",
    "softplus",
    "square_terms",
]


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
def sigmoid(x):
    """``1 / (1 + exp(-x))``"""
    return 1.0 / (1.0 + tl.exp(-x))


@rule
def softplus(x):
    """``log(1 + exp(x))``, without overflow."""
    return tl.where(x > 0, x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@rule
def cube_root(x):
    """Of ``x >= 0``: a logarithm's guess and one step of Newton's, since GPUs' logarithms are not exact."""
    positive = x > 0
    x = tl.where(positive, x, 1.0)
    y = tl.exp(tl.log(x) / 3.0)
    y = y - (y - x / (y * y)) / 3.0
    return tl.where(positive, y, 0.0)


@rule
def lookahead(p, fast, slow, h):
    """Fast and slow weights after a step from ``p`` to ``fast``: every so many steps both meet on the way.

    Slow weights begin as the parameter before the first step. Needs ``h.first`` (1 at the first step, else 0) and
    ``h.pull``: the share of the way, 0 between synchronisations.
    """
    slow = tl.where(h.first > 0, p, slow)
    met = slow + h.pull * (fast - slow)
    return tl.where(h.pull > 0, met, fast), tl.where(h.pull > 0, met, slow)


@rule
def adam_moments(g, m, v, h):
    """First and second moment, not bias-corrected. Needs ``h.weight1`` and ``h.weight2`` (1 - beta)."""
    return lerp(m, g, h.weight1), lerp(v, g * g, h.weight2)


@rule
def over_root(x, g, squares, h):
    """What becomes of an average of squares, or a sum, and ``x`` over its root. Needs ``h`` as ``matrix.rootmean``."""
    squares = h.kept * squares + h.fresh * (g * g)
    return squares, h.size * x / (tl.sqrt(squares) + h.eps)


@rule
def passed_on(sums, h):
    """What is given in place of sums, as it is."""
    return sums


@rule
def square_terms(p, g, state, h):
    """The measure of a gradient norm: the sum of squares; touches no state."""
    return state, (g * g,)
