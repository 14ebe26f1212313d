"""Gradients made of others, in place: inner products over all parameters, and sums with weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from oput_dist.engine import row_of
from oput_dist.engine.plan import Plan
from oput_dist.engine.slot import Slot
from oput_dist.engine.sweep import Part, sweep
from oput_dist.layout import flat, same_order

from .sam_stages import COMBINE, PRODUCTS

__all__ = ["combine", "inner_products", "pairs", "pieces", "ratio", "store"]

Weights = Mapping[int, tuple[Any, Any]]
"""For each parameter group the weights of both tensors of a pair: numbers, or 0-d tensors."""


def pairs(plan: Plan, other: Callable[[Slot], torch.Tensor | None]) -> list[Part]:
    """The gradients that are here, as what can be written, each with another tensor laid out like its parameter.

    Gradients that were partial sums, or laid out unlike their parameters, are so no longer.

    Args:
        plan: the plan.
        other: this rank's piece of the other tensor, flat; None for zeros.
    """
    plan.settle_gradients()
    for slot in plan.owners:
        if slot.flat_gradient() is not None:
            _lay_out(slot)
    found = []
    for slot in plan.slots:
        gradient = slot.flat_gradient()
        if gradient is not None and slot.numel:
            paired = other(slot)
            found.append(Part(slot, gradient, torch.zeros_like(gradient) if paired is None else paired))
    return found


def pieces(gradients: Mapping[torch.Tensor, torch.Tensor]) -> Callable[[Slot], torch.Tensor | None]:
    """For :func:`pairs`: of gradients that were kept, by parameter."""

    def piece(slot: Slot) -> torch.Tensor | None:
        kept = gradients.get(slot.parameter)
        return None if kept is None else flat(slot.layout.piece(kept), slot.strides)

    return piece


def _lay_out(slot: Slot) -> None:
    parameter, gradient = slot.parameter, slot.parameter.grad if slot.settled is None else slot.settled
    if isinstance(gradient, DTensor) and isinstance(parameter, DTensor):
        parameter.grad = gradient.redistribute(parameter.device_mesh, parameter.placements)
        slot.settled = None


def inner_products(
    plan: Plan, parts: Sequence[Part], groups: Sequence[Any], backends: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``<p, p>``, ``<p, g>`` and ``<g, g>`` over all parameters and ranks: one all-reduce for each process group."""
    sums = sweep(plan, PRODUCTS, parts, _rows({part.slot.group: (1.0, 0.0) for part in parts}), backends)
    assert sums is not None
    pp, pg, gg, _ = sums.total(groups).unbind()
    return pp, pg, gg


def combine(plan: Plan, parts: Sequence[Part], weights: Weights, backends: Sequence[str]) -> None:
    """``p = own * p + other * g`` for each pair, in place."""
    sweep(plan, COMBINE, parts, _rows(weights), backends)


def store(parts: Sequence[Part]) -> None:
    """Write back the gradients of :func:`pairs` that are not dense in their parameters' order."""
    for part in parts:
        gradient = part.slot.parameter.grad
        assert gradient is not None
        piece = part.slot.layout.piece(gradient)
        if not same_order(piece, part.slot.strides):
            piece.copy_(part.p.as_strided(piece.shape, part.slot.strides))


def ratio(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``x / y``, 0 where ``y`` is 0."""
    return torch.where(y == 0, 0.0, x / y)


def _rows(weights: Weights) -> dict[int, Any]:
    return {number: row_of(own=own, other=other) for number, (own, other) in weights.items()}
