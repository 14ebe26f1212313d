"""The passes over tensors that the SAM family makes, as stages of rules."""

from __future__ import annotations

from oput_dist.kernels.language import rule, tl
from oput_dist.kernels.stage import WHOLE, Measure, Update

__all__ = ["COMBINE", "PERTURB", "PRODUCTS", "SQUARES"]


@rule
def sizes(p, h):
    """By what perturbations are measured: the size of each weight where they adapt to it, else 1."""
    return tl.where(h.adaptive > 0, tl.abs(p) + h.eta, 1.0)


@rule
def sized_squares(p, g, state, h):
    """Terms of the norm that a perturbation is divided by."""
    sized = sizes(p, h) * g
    return state, (sized * sized,)


@rule
def perturbed(p, g, state, h):
    """Weights a step up the gradient; as they are where the factor is 0, also if the gradient is not finite."""
    size = sizes(p, h)
    return tl.where(h.factor > 0, p + h.factor * (size * size * g), p), state


@rule
def products(p, g, state, h):
    """Terms of the inner products of two gradients."""
    return state, (p * p, p * g, g * g)


@rule
def combined(p, g, state, h):
    """A sum of two gradients with weights."""
    return h.own * p + h.other * g, state


SQUARES = Measure(sized_squares, (WHOLE,), writes_state=False)
PERTURB = Update(perturbed)
PRODUCTS = Measure(products, (WHOLE, WHOLE, WHOLE), writes_state=False)
COMBINE = Update(combined)
