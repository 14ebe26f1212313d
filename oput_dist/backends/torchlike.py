"""The backends that run rules as torch operations: ``eager``, ``foreach`` and ``compile``.

They differ in two choices only: whether small tensors are packed, and how a body runs on a range of elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oput_dist.kernels.stage import Axes, Prologue, Stage, Update, Write, measures

from .adjacent import joined
from .batch import Batch, Codes, Stack, compute_dtype
from .body import Body, body_of, factor_count, factors_of
from .loops import Loop, loop_of
from .packing import Pack, packs, segment_sums
from .transfer import send

__all__ = ["Compile", "Eager", "Foreach", "TorchBackend"]


@dataclass(frozen=True)
class _Given:
    """What a stage is run with, besides its tensors."""

    rows: torch.Tensor
    """The distinct rows of scalars."""
    scale: torch.Tensor | None
    """Multiplies every gradient."""
    factors: torch.Tensor | None
    """``[n, tensors]``, of an Apply."""
    out: torch.Tensor | None
    """Where the sums of a Measure go: ``[tensors, terms]``."""


def _given(stage: Stage, batch: Batch, sums: torch.Tensor | None) -> _Given:
    dtype = compute_dtype(batch.p[0].dtype)
    scale = None if batch.scale is None else batch.scale.to(dtype).reshape(())
    rows = batch.scalars.distinct.to(dtype)
    factors = None
    if sums is not None:
        factors = factors_of(stage, batch.scalars.table, batch.scalars.kind, sums, dtype)
    out = None
    if measures(stage):
        out = torch.empty(len(batch.p), len(stage.sums), dtype=torch.float64, device=rows.device)
    return _Given(rows, scale, factors, out)


class TorchBackend:
    """Runs a stage tensor by tensor, or pack by pack, in chunks of bounded size."""

    name: str
    packed: bool
    """Whether small tensors are run together."""
    chunk: int
    """Elements of one call of a body; bounds the temporaries."""

    def __init__(self) -> None:
        self._bodies: dict[Any, Body] = {}

    def prepare(self, body: Body, stage: Stage) -> Body:
        """What runs: the body itself, or a compiled form."""
        return body

    def run(self, stage: Stage, batch: Batch, sums: torch.Tensor | None) -> torch.Tensor | None:
        """See :class:`Backend`."""
        return self.run_with(stage, batch, _given(stage, batch, sums))

    def run_with(self, stage: Stage, batch: Batch, given: _Given) -> torch.Tensor | None:
        """The same, of what follows from the sums."""
        if self.packed and type(stage) is Update and given.factors is None:
            batch = joined(batch)
        single, together = packs(batch) if self.packed else (list(range(len(batch.p))), [])
        for i in single:
            self._run_single(stage, batch, i, given)
        for pack in together:
            self._run_pack(stage, batch, pack, given)
        return given.out

    def _run_single(self, stage: Stage, batch: Batch, i: int, given: _Given) -> None:
        body = self._body(stage, batch, summed=True)
        row = given.rows[batch.scalars.which[i]]
        c = None if given.factors is None else given.factors[:, i]
        parts = -(-batch.p[i].numel() // self.chunk)
        ranges = zip(*(t.tensor_split(parts) for t in (batch.p[i], batch.g[i], *batch.state[i])), strict=True)
        sums = [body(p, g, state, row, given.scale, c) for p, g, *rest in ranges for state in (tuple(rest),)]
        if given.out is not None:
            given.out[i] = torch.stack([torch.stack(terms) for terms in sums]).sum(0)

    def _run_pack(self, stage: Stage, batch: Batch, pack: Pack, given: _Given) -> None:
        indices = pack.indices
        columns = [list(column) for column in zip(*(batch.state[i] for i in indices), strict=True)]
        lists = [[batch.p[i] for i in indices], [batch.g[i] for i in indices], *columns]
        gathered = [pack.gather(number, tensors) for number, tensors in enumerate(lists)]
        p, g, *state = [flat for flat, _ in gathered]
        row = given.rows[batch.scalars.which[indices[0]]]
        lengths = send(torch.tensor(pack.sizes, device="cpu"), p.device)
        index = send(torch.tensor(indices, device="cpu"), p.device)
        factors, out = given.factors, given.out
        c = None if factors is None else factors[:, index].repeat_interleave(lengths, dim=1, output_size=pack.numel)
        body = self._body(stage, batch, summed=False)
        parts = -(-pack.numel // self.chunk)
        ranges = zip(*(t.tensor_split(parts) for t in (p, g, *state)), strict=True)
        cs = [None] * parts if c is None else c.tensor_split(parts, dim=1)
        terms = [body(a, b, tuple(rest), row, given.scale, ci) for (a, b, *rest), ci in zip(ranges, cs, strict=True)]
        if out is not None:
            out[index] = torch.stack([segment_sums(torch.cat(term), lengths) for term in zip(*terms, strict=True)], 1)
        for number in _changed(stage, batch.prologue, len(lists)):
            torch._foreach_copy_(lists[number], gathered[number][1])

    def takes_codes(self, stage: Stage, batch: Batch, state: Sequence[torch.Tensor | Codes]) -> bool:
        """See :class:`Backend`."""
        return False

    def run_stacks(self, stage: Stage, batch: Batch, stacks: Sequence[Stack]) -> list[tuple[torch.Tensor, ...]]:
        """See :class:`Backend`."""
        dtype = compute_dtype(batch.p[0].dtype)
        scale = None if batch.scale is None else batch.scale.to(dtype).reshape(())
        rows = batch.scalars.distinct.to(dtype)
        return [self._run_stack(stage, batch, stack, rows, scale) for stack in stacks]

    def _run_stack(
        self, stage: Stage, batch: Batch, stack: Stack, rows: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        most = max(1, self.chunk // max(1, math.prod(stack.shape)))
        parts = [stack.part(start, start + most) for start in range(0, len(stack.which), most)]
        made = [self._run_boxes(stage, batch, part, rows, scale) for part in parts]
        return made[0] if len(made) == 1 else tuple(torch.cat(terms) for terms in zip(*made, strict=True))

    def _run_boxes(
        self, stage: Stage, batch: Batch, stack: Stack, rows: torch.Tensor, scale: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        n, ndim = len(stack.which), len(stack.shape)
        packed = [tensors[0] if n == 1 else torch.cat(tensors) for tensors in stack.tensors]
        size = packed[0].numel() // n
        p, g, *state = [t.as_strided((n, *stack.shape), (size, *stack.strides), t.storage_offset()) for t in packed]
        which = [batch.scalars.which[i] for i in stack.which]
        one = all(w == which[0] for w in which)
        row = rows[which[0]] if one else rows[torch.tensor(which, device=rows.device)].T.reshape(-1, n, *[1] * ndim)
        body = self._body(stage, batch, summed=True, ndim=ndim + 1)
        parts = [(0, stack.shape[0])] if n > 1 else _row_ranges(stack.shape, self.chunk)
        made = []
        for start, stop in parts:
            p_part, g_part, *state_part = [t[:, start:stop] for t in (p, g, *state)]
            c = tuple(_rows(factor, start, stop) for factor in stack.factors)
            made.append(body(p_part, g_part, tuple(state_part), row, scale, c))
        if n > 1:
            for number in _changed(stage, batch.prologue, len(packed)):
                torch._foreach_copy_(stack.tensors[number], list(torch.split(packed[number], size)))
        by_term = list(zip(*made, strict=True))
        sums, maxima = by_term[: len(stage.sums)], by_term[len(stage.sums) :]
        return (
            *(_joined(terms, axes, torch.sum) for terms, axes in zip(sums, stage.sums, strict=True)),
            *(_joined(terms, axes, torch.amax) for terms, axes in zip(maxima, stage.maxima, strict=True)),
        )

    def _body(self, stage: Stage, batch: Batch, summed: bool, ndim: int | None = None) -> Body:
        kind = batch.scalars.kind
        dtypes = (batch.p[0].dtype, batch.g[0].dtype, *(s.dtype for s in batch.state[0]))
        key = (stage, batch.prologue, kind, summed, ndim, batch.scale is None, dtypes, batch.p[0].device)
        if key not in self._bodies:
            self._bodies[key] = self.make_body(stage, batch.prologue, kind, summed, ndim, dtypes[0])
        return self._bodies[key]

    def make_body(
        self,
        stage: Stage,
        prologue: Prologue,
        kind: type,
        summed: bool,
        ndim: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Body:
        """The body in the form that this backend runs."""
        return self.prepare(body_of(stage, prologue, kind, summed, ndim, dtype), stage)


def _changed(stage: Stage, prologue: Prologue, count: int) -> list[int]:
    """Which of parameter, gradient, and state, ``count`` together, a stage writes."""
    kept = [2] if prologue.write is Write.KAHAN else []
    written = [0, *kept] if stage.writes_parameter else []
    return [*written, *(range(2 + prologue.aside, count) if stage.writes_state else [])]


def _row_ranges(shape: Sequence[int], chunk: int) -> list[tuple[int, int]]:
    """Ranges of the first axis, of about ``chunk`` elements each."""
    rows = max(1, chunk // max(1, math.prod(shape[1:])))
    return [(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def _rows(factor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """The rows of stacked factors that belong to a range of the first axis."""
    return factor[:, start:stop] if factor.shape[1] > 1 else factor


def _joined(terms: tuple[torch.Tensor, ...], axes: Axes, reduce: Callable[..., torch.Tensor]) -> torch.Tensor:
    """One sum or maximum of a stack from those of ranges of the first axis."""
    if len(terms) == 1:
        return terms[0]
    return torch.cat(terms, 1) if 0 in axes else reduce(torch.stack(terms), 0)


class Eager(TorchBackend):
    """Torch operations, tensor by tensor: the plainest form, and the reference."""

    name, packed, chunk = "eager", False, 2**17


class Foreach(TorchBackend):
    """Torch operations on packs of small tensors."""

    name, packed, chunk = "foreach", True, 2**17


class Compile(TorchBackend):
    """One fused loop over memory for each stage: on flat tensors on a CPU in C++, else through torch.compile."""

    name, packed, chunk = "compile", True, 2**40

    def __init__(self) -> None:
        super().__init__()
        self._loops: dict[Any, Loop | None] = {}

    def run_with(self, stage: Stage, batch: Batch, given: _Given) -> torch.Tensor | None:
        """In C++ where the stage has such a form."""
        count = 0 if given.factors is None else len(given.factors)
        loop = self._loop(stage, batch, tuple(column[0] for column in batch.columns()), count)
        if loop is None:
            return super().run_with(stage, batch, given)
        return loop.run(batch, given.rows, given.scale, given.factors)

    def takes_codes(self, stage: Stage, batch: Batch, state: Sequence[torch.Tensor | Codes]) -> bool:
        """See :class:`Backend`."""
        count = factor_count(stage.given)
        return count is not None and self._loop(stage, batch, (batch.p[0], batch.g[0], *state), count) is not None

    def _loop(self, stage: Stage, batch: Batch, first: tuple[torch.Tensor | Codes, ...], factors: int) -> Loop | None:
        """The loop for tensors such as the first of each column."""
        if batch.p[0].device.type != "cpu":
            return None
        kept = tuple(each.code if isinstance(each, Codes) else each.dtype for each in first)
        key = (stage, batch.prologue, batch.scalars.kind, batch.scale is None, kept, factors)
        if key not in self._loops:
            self._loops[key] = loop_of(
                stage, batch.prologue, batch.scalars.kind, batch.scale is not None, factors, kept
            )
        return self._loops[key]

    def prepare(self, body: Body, stage: Stage) -> Body:
        # Dynamic: one program serves all sizes. A schedule recompiles nothing, since scalars are a tensor argument.
        # realize_reads_threshold=0 makes Inductor store new moments in the loop that sums the terms; by default it
        # recomputes them in a second one, twice the time. Where nothing is summed it would only split loops.
        options: dict[str, Any] = {"realize_reads_threshold": 0} if measures(stage) else {}
        compiled = torch.compile(body, dynamic=True, fullgraph=True, options=options)

        def one_element_aside(p: Any, *rest: Any) -> Any:
            # Dynamo specializes on sizes 0 and 1: not worth a program of its own.
            return body(p, *rest) if p.numel() == 1 else compiled(p, *rest)

        return one_element_aside
