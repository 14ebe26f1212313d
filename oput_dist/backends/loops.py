"""Stages on flat tensors on a CPU as loops in C++, each built when it is first needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from oput_dist.kernels.codes import Format
from oput_dist.kernels.cpp import CppLanguage, NotInCpp, Symbol, Trace, built
from oput_dist.kernels.loops import Column, loop_source, run_loop
from oput_dist.kernels.stage import Prologue, Stage

from .batch import Batch, Codes
from .body import body_of

__all__ = ["Loop", "loop_of"]

Kept = torch.dtype | Format
"""As what a tensor is in memory."""

_CPP = CppLanguage()
_DTYPES = (torch.float32, torch.bfloat16)
"""Of parameters, gradients and state. Others go through torch.compile."""


class Loop:
    """A stage for tensors of given dtypes."""

    def __init__(self, library: Any, terms: int) -> None:
        self._library, self._terms = library, terms

    def run(
        self, batch: Batch, rows: torch.Tensor, scale: torch.Tensor | None, factors: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Run it on a batch.

        Args:
            batch: the tensors.
            rows: the distinct rows of scalars.
            scale: multiplies every gradient.
            factors: ``[n, tensors]``.

        Returns:
            for a Measure the sums: ``[tensors, terms]``, float64.
        """
        return run_loop(
            self._library,
            [p.numel() for p in batch.p],
            batch.scalars.which,
            [each for column in batch.columns() for each in _addresses(column)],
            rows,
            self._terms,
            1.0 if scale is None else float(scale),
            factors,
        )


def _addresses(column: Sequence[torch.Tensor | Codes]) -> list[list[int]]:
    if isinstance(column[0], Codes):
        return [[each.codes.data_ptr() for each in column], [each.scales.data_ptr() for each in column]]  # type: ignore[union-attr]
    return [[each.data_ptr() for each in column]]  # type: ignore[union-attr]


def loop_of(
    stage: Stage, prologue: Prologue, kind: type, scaled: bool, factors: int, kept: Sequence[Kept]
) -> Loop | None:
    """The loop of a stage; None where its rule has no C++ form, or nothing builds it.

    Args:
        stage: the stage.
        prologue: what precedes the rule.
        kind: the NamedTuple class of ``h``.
        scaled: whether gradients have a scale.
        factors: how many factors it is given.
        kept: as what parameters, gradients and each state are in memory.
    """
    try:
        source = _source(stage, prologue, kind, scaled, factors, kept)
    except (NotInCpp, TypeError):
        return None
    library = built(source)  # what it raised, torch.compile will raise again and say when it is asked
    return None if library is None else Loop(library, len(stage.sums))


def _source(stage: Stage, prologue: Prologue, kind: type, scaled: bool, factors: int, kept: Sequence[Kept]) -> str:
    trace = Trace()
    aside = [2 + i for i in range(prologue.aside)]
    for i, each in enumerate(kept):
        if not (isinstance(each, Format) or each in _DTYPES or (i in aside and each == torch.int16)):
            raise NotInCpp(str(each))
    columns = [_read(trace, f"x{i}", each) for i, each in enumerate(kept)]
    p, g, *state = columns
    row = _Row([Symbol(trace, torch.float32, f"h.h{i}") for i in range(1 + len(kind._fields))])  # type: ignore[attr-defined]
    scale = Symbol(trace, torch.float32, "h.scale") if scaled else None
    c = tuple(Symbol(trace, torch.float32, f"h.c{i}") for i in range(factors))
    assert isinstance(kept[0], torch.dtype)
    body: Callable[..., Any] = body_of(stage, prologue, kind, summed=False, dtype=kept[0], language=_CPP)
    terms = [term.text for term in body(p, g, tuple(state), row, scale, c)]
    used = set(re.findall(r"\w+", " ".join([*trace.lines, *terms, *(x.written for x in columns if x.written)])))
    made = [Column(each, x.text in used, x.written) for each, x in zip(kept, columns, strict=True)]
    return loop_source(trace.lines, made, len(row.unbind()), factors, terms)


def _read(trace: Trace, name: str, kept: Kept) -> Symbol:
    if kept == torch.int16:
        return Symbol(trace, torch.int32, name, torch.int16)
    return Symbol(trace, torch.float32, name, None if isinstance(kept, Format) else kept)


class _Row:
    """Scalars as a body takes them."""

    def __init__(self, symbols: list[Symbol]) -> None:
        self._symbols = symbols

    def unbind(self) -> list[Symbol]:
        """One by one."""
        return self._symbols
