"""The grouped Triton launch: one kernel runs a stage on any number of tensors.

Tensors are described by a table of int64 rows, ``[numel, aligned, p, g, state...]`` (data pointers), scalars by a
float64 row per tensor, ``[decay, *h]``, and the grid by a list of tiles, ``[tensor, tile of the tensor]``. So neither
the number of tensors, nor a schedule, nor the parameter groups change the kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from .language import jit, tl
from .math import passed_on
from .rounding import restored, split
from .stage import Agreed, Cautious, Factors, Prologue, Stage
from .tile import common_constexprs, compute, pointer, scalars

__all__ = ["BLOCK", "constexprs", "grouped", "num_warps", "segmented_sum"]

BLOCK = 1024
"""Elements of one tile, and of one program."""
_NUM_WARPS = {"cuda": 4, "hip": 2}  # warps of 32 and of 64 threads


@jit
def _tile(
    row,
    hyper,
    scale,
    partial,
    sums,
    start,
    numel,
    RULE: tl.constexpr,
    FACTORS: tl.constexpr,
    H: tl.constexpr,
    KIND: tl.constexpr,
    CAUTION: tl.constexpr,
    N_H: tl.constexpr,
    N_TERMS: tl.constexpr,
    N_SUMS: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SCALED: tl.constexpr,
    WRITES_P: tl.constexpr,
    WRITES_STATE: tl.constexpr,
    WRITE: tl.constexpr,
    ASIDE: tl.constexpr,
    ROUND: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile: prologue, rule, stores. Unmasked (``MASKED=False``) the accesses are 128 bits wide."""
    offsets = start + tl.arange(0, BLOCK)
    mask = None
    if MASKED:
        mask = offsets < numel
    p_ptr = pointer(row, 2, P, MASKED)
    p = tl.load(p_ptr + offsets, mask=mask).to(C)
    g = tl.load(pointer(row, 3, G, MASKED) + offsets, mask=mask).to(C)
    if WRITE == 1:
        p = restored(p, tl.load(pointer(row, 4, S[0], MASKED) + offsets, mask=mask).to(C), ROUND)
    state = ()
    for i in tl.static_range(ASIDE, len(S)):
        state = state + (tl.load(pointer(row, 4 + i, S[i], MASKED) + offsets, mask=mask).to(C),)  # noqa: RUF005
    h = H(*scalars(hyper + 1, N_H, C))
    c, agreed = (), 0.0
    if N_SUMS > 0:
        c = FACTORS(scalars(sums, N_SUMS, C), h)
    if CAUTION == 2:
        agreed = tl.load(sums + N_SUMS).to(C)
    decay = tl.load(hyper).to(C)
    p, state, terms = compute(p, g, state, h, decay, scale, c, agreed, RULE, KIND, CAUTION, N_SUMS > 0, DECAY,
                              MAXIMIZE, SCALED, C)  # fmt: skip
    for i in tl.static_range(N_TERMS):
        term = terms[i]
        if MASKED:
            term = tl.where(mask, term, 0.0)
        tl.store(partial + i, tl.sum(term).to(tl.float64))
    if WRITES_P:
        if WRITE == 1:
            p, lost = split(p, ROUND)
            tl.store(pointer(row, 4, S[0], MASKED) + offsets, lost.to(S[0]), mask=mask)
        if WRITE == 2:
            bits = tl.load(pointer(row, 4, S[0], MASKED) + offsets, mask=mask)
            p = ROUND(p, bits.to(tl.int32) & 0xFFFF)
        tl.store(p_ptr + offsets, p.to(P), mask=mask)
    if WRITES_STATE:
        for i in tl.static_range(len(state)):
            tl.store(pointer(row, 4 + ASIDE + i, S[ASIDE + i], MASKED) + offsets, state[i].to(S[ASIDE + i]), mask=mask)


@jit
def grouped(
    table,
    hyper,
    tiles,
    scale,
    partial,
    sums,
    RULE: tl.constexpr,
    FACTORS: tl.constexpr,
    H: tl.constexpr,
    KIND: tl.constexpr,
    CAUTION: tl.constexpr,
    N_H: tl.constexpr,
    N_TERMS: tl.constexpr,
    N_SUMS: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SCALED: tl.constexpr,
    WRITES_P: tl.constexpr,
    WRITES_STATE: tl.constexpr,
    WRITE: tl.constexpr,
    ASIDE: tl.constexpr,
    ROUND: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program ``i`` runs the stage on tile ``tiles[i]``; see the module's docstring for the arguments.

    ``scale`` is one float64 that multiplies every gradient; ``partial`` receives one row of sums per tile (Measure);
    ``sums`` holds one row of global sums, or of factors, per tensor (a stage that follows a Measure), then the
    factor of the moves that agree with the gradient (Cautious).
    """
    pid = tl.program_id(0).to(tl.int64)
    tensor = tl.load(tiles + 2 * pid).to(tl.int64)
    start = tl.load(tiles + 2 * pid + 1).to(tl.int64) * BLOCK
    row = table + tensor * (4 + len(S))
    numel = tl.load(row)
    hyper = hyper + tensor * (1 + N_H)
    partial = partial + pid * N_TERMS
    sums = sums + tensor * (N_SUMS + (CAUTION == 2))
    if (start + BLOCK <= numel) & (tl.load(row + 1) != 0):
        _tile(row, hyper, scale, partial, sums, start, numel, RULE, FACTORS, H, KIND, CAUTION, N_H, N_TERMS,
              N_SUMS, DECAY, MAXIMIZE, SCALED, WRITES_P, WRITES_STATE, WRITE, ASIDE, ROUND, P, G, S, C,
              BLOCK, False)  # fmt: skip
    else:
        _tile(row, hyper, scale, partial, sums, start, numel, RULE, FACTORS, H, KIND, CAUTION, N_H, N_TERMS,
              N_SUMS, DECAY, MAXIMIZE, SCALED, WRITES_P, WRITES_STATE, WRITE, ASIDE, ROUND, P, G, S, C,
              BLOCK, True)  # fmt: skip


@jit
def segmented_sum(partial, first_tile, out, N_TERMS: tl.constexpr, BLOCK: tl.constexpr):
    """Program ``i`` adds the partial sums of tensor ``i``, its tiles from ``first_tile[i]`` on, in order."""
    tensor = tl.program_id(0)
    begin = tl.load(first_tile + tensor)
    end = tl.load(first_tile + tensor + 1)
    for term in tl.static_range(N_TERMS):
        total = tl.zeros((BLOCK,), dtype=tl.float64)
        for at in range(begin, end, BLOCK):
            index = at + tl.arange(0, BLOCK)
            total += tl.load(partial + index.to(tl.int64) * N_TERMS + term, mask=index < end, other=0.0)
        tl.store(out + tensor * N_TERMS + term, tl.sum(total))


def num_warps(hip: bool) -> int:
    """Warps of a program: eight elements a thread, so that 16-bit dtypes too move 128 bits at a time."""
    return _NUM_WARPS["hip" if hip else "cuda"]


def constexprs(
    stage: Stage,
    prologue: Prologue,
    kind: type,
    sums: int,
    scaled: bool,
    p: torch.dtype,
    g: torch.dtype,
    state: tuple[torch.dtype, ...],
) -> dict[str, Any]:
    """The compile-time arguments of :func:`grouped` for a stage.

    Args:
        stage: what to run.
        prologue: what comes before the rule.
        kind: the NamedTuple class of the rule's ``h``.
        sums: values of each row of sums that the stage is given (0 if it follows no measure).
        scaled: whether a gradient scale is given.
        p, g, state: dtypes of parameter, gradient and each state, first that which is for the write alone.
    """
    given = stage.given.before if isinstance(stage.given, Agreed) else stage.given
    return {
        **common_constexprs(stage, prologue, kind, scaled, p, g, state),
        "FACTORS": given.rule if isinstance(given, Factors) else passed_on,
        "N_TERMS": len(stage.sums),
        "N_SUMS": sums - isinstance(stage, Cautious),
        "BLOCK": BLOCK,
    }
