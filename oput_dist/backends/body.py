"""A stage as a function of torch tensors: what the eager, foreach and compile backends run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

from oput_dist.kernels.language import TORCH, as_torch, fresh_function, in_language
from oput_dist.kernels.rounding import restored, rounding_of, split
from oput_dist.kernels.stage import (
    Agreed,
    Agreement,
    Apply,
    Axes,
    Cautious,
    Decay,
    Factors,
    Given,
    Measure,
    Prologue,
    Stage,
    Update,
    Write,
    plain,
)

from .batch import compute_dtype

__all__ = ["Body", "body_of", "factor_count", "factors_of"]

Tensors: TypeAlias = tuple[torch.Tensor, ...]
Body: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, Tensors, torch.Tensor, torch.Tensor | None, torch.Tensor | Tensors | None], Tensors
]
"""``body(p, g, state, row, scale, c)``, in place.

``state`` begins with what is for the write alone. ``row`` is ``[decay, *h]`` in the compute dtype, ``scale``
0-d or None, ``c`` the factors: a tensor with a 0-d or elementwise one in each row, or a tuple of tensors that broadcast
against a box. Returns the terms of a Measure, elementwise or summed; nothing otherwise.
"""


def body_of(
    stage: Stage,
    prologue: Prologue,
    kind: type,
    summed: bool,
    ndim: int | None = None,
    dtype: torch.dtype = torch.float32,
    language: Any = TORCH,
) -> Body:
    """The body of a stage, with a code object of its own.

    Args:
        stage: the stage.
        prologue: what precedes the rule.
        kind: the NamedTuple class of ``h``.
        summed: whether a Measure returns sums, in float64, in place of elementwise terms.
        ndim: the number of axes of a stack of boxes, whose sums keep the first and others as the stage says; None for
            flat tensors, summed whole.
        dtype: of the parameters; tells how they are rounded where that is not left to the store.
        language: what rules are written in, torch's or C++'s: then everything is symbols in place of tensors.
    """
    rule = in_language(stage.rule, language)
    summed_axes = [_others(axes, ndim) for axes in stage.sums]
    largest_axes = [_others(axes, ndim) for axes in stage.maxima]
    inner = plain(stage)
    takes = inner.given is not None
    aside, lossless, tossed = prologue.aside, prologue.write is Write.KAHAN, prologue.write is Write.STOCHASTIC
    restore, divide = in_language(restored, language), in_language(split, language)
    rounded = in_language(rounding_of(prologue.write, dtype), language)

    def total(term: torch.Tensor, axes: Axes | None) -> torch.Tensor:
        if axes is None:
            return term.sum(dtype=torch.float64)
        return term.sum(axes, keepdim=True, dtype=torch.float64) if axes else term.to(torch.float64)

    def largest(term: torch.Tensor, axes: Axes | None) -> torch.Tensor:
        assert axes is not None
        return (term.amax(axes, keepdim=True) if axes else term).to(torch.float64)

    def results(terms: Tensors) -> Tensors:
        if not summed:
            return tuple(terms)
        kinds = [(total, axes) for axes in summed_axes] + [(largest, axes) for axes in largest_axes]
        return tuple(reduce(term, axes) for term, (reduce, axes) in zip(terms, kinds))  # noqa: B905

    def factors(c: Any) -> tuple[Tensors, ...]:
        """The last argument of the rule, where it takes one."""
        return (c.unbind() if isinstance(c, torch.Tensor) else c,) if takes else ()

    def prepare(p: Any, g: torch.Tensor, state: Tensors, decay: torch.Tensor, scale: torch.Tensor | None) -> Tensors:
        compute = compute_dtype(p.dtype)
        p, g = p.to(compute), g.to(compute)
        if lossless:
            p = restore(p, state[0].to(compute), rounded)
        if scale is not None:
            g = g * scale
        if prologue.maximize:
            g = -g
        if prologue.decay is Decay.L2:
            g = g + decay * p
        if prologue.decay is Decay.SHRINK and not isinstance(inner, Measure):
            p = p * decay
        return p, g

    def widen(state: Tensors, compute: torch.dtype) -> Tensors:
        """What rules see of the state."""
        return tuple(s.to(compute) for s in state[aside:])

    def write(p: torch.Tensor, state: Tensors, new: torch.Tensor) -> None:
        if lossless:
            new, rest = divide(new, rounded)
            state[0].copy_(rest)
        if tossed:
            new = rounded(new, state[0].to(torch.int32) & 0xFFFF)
        p.copy_(new)

    def write_state(state: Tensors, new: Tensors) -> None:
        for old, value in zip(state[aside:], new):  # noqa: B905 - Dynamo does not trace strict=
            old.copy_(value)

    def update(p: Any, g: Any, state: Tensors, row: Any, scale: Any, c: Any) -> Tensors:
        decay, *h = row.unbind()
        p_in, g_in = prepare(p, g, state, decay, scale)
        p_out, state_out = rule(p_in, g_in, widen(state, p_in.dtype), kind(*h), *factors(c))
        write(p, state, p_out)
        write_state(state, state_out)
        return ()

    def measure(p: Any, g: Any, state: Tensors, row: Any, scale: Any, c: Any) -> Tensors:
        decay, *h = row.unbind()
        p_in, g_in = prepare(p, g, state, decay, scale)
        state_out, terms = rule(p_in, g_in, widen(state, p_in.dtype), kind(*h), *factors(c))
        if stage.writes_state:
            write_state(state, state_out)
        return results(terms)

    def apply(p: Any, g: Any, state: Tensors, row: Any, scale: Any, c: Any) -> Tensors:
        decay, *h = row.unbind()
        p_in, g_in = prepare(p, g, state, decay, scale)
        write(p, state, rule(p_in, g_in, widen(state, p_in.dtype), kind(*h), *factors(c)))
        return ()

    def moved(p: Any, g: Any, state: Tensors, row: Any, scale: Any, c: Any) -> tuple[Any, Any, Any, Tensors]:
        """Parameter and gradient before the rule, the parameter after it, and the new state."""
        decay, *h = row.unbind()
        p_in, g_in = prepare(p, g, state, decay, scale)
        made = rule(p_in, g_in, widen(state, p_in.dtype), kind(*h), *factors(c))
        return (p_in, g_in, *made) if isinstance(inner, Update) else (p_in, g_in, made, ())

    def agreement(p: Any, g: Any, state: Tensors, row: Any, scale: Any, c: Any) -> Tensors:
        p_in, g_in, p_out, _ = moved(p, g, state, row, scale, c)
        return results((((p_out - p_in) * g_in < 0).to(p_in.dtype),))

    def cautious(p: Any, g: Any, state: Tensors, row: Any, scale: Any, c: Any) -> Tensors:
        p_in, g_in, p_out, state_out = moved(p, g, state, row, scale, c[:-1])
        move = p_out - p_in
        write(p, state, p_in + language.where(move * g_in >= 0, 0.0, move * c[-1]))
        write_state(state, state_out)
        return ()

    templates: dict[type, Any] = {
        Update: update,
        Measure: measure,
        Apply: apply,
        Agreement: agreement,
        Cautious: cautious,
    }
    return fresh_function(templates[type(stage)])


def _others(axes: Axes, ndim: int | None) -> Axes | None:
    """The axes of a stack that a sum runs over."""
    return None if ndim is None else tuple(axis for axis in range(1, ndim) if axis - 1 not in axes)


def factor_count(given: Given | None) -> int | None:
    """How many factors a stage is given; None if that does not follow from the stage alone."""
    if isinstance(given, Agreed):
        before = factor_count(given.before)
        return None if before is None else before + 1
    if given is None or isinstance(given, Factors):
        return 0 if given is None else given.n
    return None


def factors_of(stage: Stage, rows: torch.Tensor, kind: type, sums: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The factors of every tensor of a batch at once: of its sums, or as the engine passes them on in their place.

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
    values = sums.to(dtype).unbind(1)
    if isinstance(stage.given, Agreed):
        given, values, last = stage.given.before, values[:-1], values[-1:]
    else:
        given, last = stage.given, ()
    made = as_torch(given.rule)(values, kind(*columns)) if isinstance(given, Factors) else values
    return torch.stack([*made, *last])
