"""A stage as a function of torch tensors: what the eager, foreach and compile backends run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from oput_dist.kernels.language import as_torch, fresh_function
from oput_dist.kernels.stage import Apply, Decay, Measure, Prologue, Stage, Update

from .batch import compute_dtype

__all__ = ["Body", "body_of", "factors_of"]

Tensors: TypeAlias = tuple[torch.Tensor, ...]
Body: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, Tensors, torch.Tensor, torch.Tensor | None, torch.Tensor | None], Tensors
]
"""``body(p, g, state, row, scale, c)``, in place.

``row`` is ``[decay, *h]`` in the compute dtype, ``scale`` 0-d or None, ``c`` the factors: one 0-d or elementwise tensor
in each row. Returns the terms of a Measure, elementwise or summed; nothing otherwise.
"""


def body_of(stage: Stage, prologue: Prologue, kind: type, summed: bool) -> Body:
    """The body of a stage, with a code object of its own.

    Args:
        stage: the stage.
        prologue: what precedes the rule.
        kind: the NamedTuple class of ``h``.
        summed: whether a Measure returns sums, in float64, in place of elementwise terms.
    """
    rule = as_torch(stage.rule)

    def prepare(p: torch.Tensor, g: torch.Tensor, decay: torch.Tensor, scale: torch.Tensor | None) -> Tensors:
        compute = compute_dtype(p.dtype)
        p, g = p.to(compute), g.to(compute)
        if scale is not None:
            g = g * scale
        if prologue.maximize:
            g = -g
        if prologue.decay is Decay.L2:
            g = g + decay * p
        if prologue.decay is Decay.SHRINK and not isinstance(stage, Measure):
            p = p * decay
        return p, g

    def widen(state: Tensors, compute: torch.dtype) -> Tensors:
        return tuple(s.to(compute) for s in state)

    def update(p: Any, g: Any, state: Tensors, row: Any, scale: Any, c: Any) -> Tensors:
        decay, *h = row.unbind()
        p_in, g_in = prepare(p, g, decay, scale)
        p_out, state_out = rule(p_in, g_in, widen(state, p_in.dtype), kind(*h))
        p.copy_(p_out)
        for old, new in zip(state, state_out):  # noqa: B905 - Dynamo does not trace strict=
            old.copy_(new)
        return ()

    def measure(p: Any, g: Any, state: Tensors, row: Any, scale: Any, c: Any) -> Tensors:
        decay, *h = row.unbind()
        p_in, g_in = prepare(p, g, decay, scale)
        state_out, terms = rule(p_in, g_in, widen(state, p_in.dtype), kind(*h))
        if stage.writes_state:  # type: ignore[union-attr]
            for old, new in zip(state, state_out):  # noqa: B905
                old.copy_(new)
        return tuple(term.sum(dtype=torch.float64) for term in terms) if summed else terms

    def apply(p: Any, g: Any, state: Tensors, row: Any, scale: Any, c: Any) -> Tensors:
        decay, *h = row.unbind()
        p_in, g_in = prepare(p, g, decay, scale)
        p.copy_(rule(p_in, g_in, widen(state, p_in.dtype), kind(*h), c.unbind()))
        return ()

    template = {Update: update, Measure: measure, Apply: apply}[type(stage)]
    return fresh_function(template)  # type: ignore[arg-type]


def factors_of(stage: Apply, rows: torch.Tensor, kind: type, sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The factors of every tensor of a batch at once.

    Args:
        stage: the stage.
        rows: ``[tensors, 1 + h]``, float64.
        kind: the NamedTuple class of ``h``.
        sums: ``[tensors, terms + 1]``, float64.
        dtype: the compute dtype.

    Returns:
        ``[factors, tensors]``
    """
    columns = rows.to(dtype).unbind(1)[1:]
    return torch.stack(as_torch(stage.factors)(sums.to(dtype).unbind(1), kind(*columns)))
