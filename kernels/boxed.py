"""The boxed Triton launch: stages that sum over some axes, or are given vectors, on any number of boxes.

A box is seen in three dimensions, ``[batch, rows, columns]``, columns innermost in memory: axes of a parameter that
all sums and factors treat alike are one dimension. Programs work on tiles of rows and columns. What a sum keeps decides
how it leaves the tile: as one value for each row or for each column, each tile writing to a place of its own; the
places are added up afterwards in a fixed order, without atomics.

Boxes are described by a table of int64 rows, ``[rows, columns, aligned, p, g, state...]``, then for each factor its
pointer and its strides along the three dimensions, then for each term a pointer to its partial results; scalars and
tiles as in the grouped launch, tiles being ``[box, batch, tile of rows, tile of columns]``.
"""

from __future__ import annotations

from typing import Any

import torch

from .language import jit, tl
from .rounding import restored, split
from .stage import Cautious, Prologue, Stage
from .tile import common_constexprs, compute, pointer, scalars

__all__ = ["COLUMN_MAX", "COLUMN_SUM", "ROW_MAX", "ROW_SUM", "TILES", "boxed", "boxed_constexprs"]

ROW_SUM, COLUMN_SUM, ROW_MAX, COLUMN_MAX = 0, 1, 2, 3
"""How a term leaves a tile."""
TILES = ((8, 128), (64, 16))
"""Rows and columns of a tile: for wide boxes, and for boxes of few columns."""


@jit
def _box_tile(
    row,
    hyper,
    scale,
    batch,
    row_tile,
    column_tile,
    rows,
    columns,
    RULE: tl.constexpr,
    H: tl.constexpr,
    KIND: tl.constexpr,
    CAUTION: tl.constexpr,
    N_H: tl.constexpr,
    N_FACTORS: tl.constexpr,
    GIVEN: tl.constexpr,
    TERMS: tl.constexpr,
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
    BR: tl.constexpr,
    BC: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile. Unmasked (``MASKED=False``) the accesses are 128 bits wide."""
    if not MASKED:
        columns = columns // 16 * 16  # so that the compiler knows
    r = row_tile * BR + tl.arange(0, BR)
    c = column_tile * BC + tl.arange(0, BC)
    offsets = (batch * rows + r)[:, None] * columns + c[None, :]
    mask = None
    if MASKED:
        mask = (r < rows)[:, None] & (c < columns)[None, :]
    p_ptr = pointer(row, 3, P, MASKED)
    p = tl.load(p_ptr + offsets, mask=mask).to(C)
    g = tl.load(pointer(row, 4, G, MASKED) + offsets, mask=mask).to(C)
    if WRITE == 1:
        p = restored(p, tl.load(pointer(row, 5, S[0], MASKED) + offsets, mask=mask).to(C), ROUND)
    state = ()
    for i in tl.static_range(ASIDE, len(S)):
        state = state + (tl.load(pointer(row, 5 + i, S[i], MASKED) + offsets, mask=mask).to(C),)  # noqa: RUF005
    given = ()
    agreed = 0.0
    for i in tl.static_range(N_FACTORS):
        at = row + 5 + len(S) + 4 * i
        start = pointer(at, 0, C, True) + batch * tl.load(at + 1)
        places = r[:, None] * tl.load(at + 2) + c[None, :] * tl.load(at + 3)
        factor = tl.load(start + places, mask=mask)
        if CAUTION == 2 and i == N_FACTORS - 1:
            agreed = factor
        else:
            given = given + (factor,)  # noqa: RUF005
    h = H(*scalars(hyper + 1, N_H, C))
    decay = tl.load(hyper).to(C)
    p, state, terms = compute(p, g, state, h, decay, scale, given, agreed, RULE, KIND, CAUTION, GIVEN, DECAY,
                              MAXIMIZE, SCALED, C)  # fmt: skip
    row_tiles = tl.cdiv(rows, BR)
    column_tiles = tl.cdiv(columns, BC)
    for i in tl.static_range(len(TERMS)):
        term = terms[i]
        if TERMS[i] > 1:  # a GPU's maximum hides NaN
            term = tl.where(term == term, term, float("inf"))
        if MASKED:
            term = tl.where(mask, term, 0.0)
        out = pointer(row, 5 + len(S) + 4 * N_FACTORS + i, tl.float64, True)
        if TERMS[i] == 0 or TERMS[i] == 2:
            if TERMS[i] == 0:  # noqa: SIM108 - Triton
                value = tl.sum(term, 1)
            else:
                value = tl.max(term, 1)
            tl.store(out + (batch * rows + r) * column_tiles + column_tile, value.to(tl.float64), mask=r < rows)
        else:
            if TERMS[i] == 1:  # noqa: SIM108 - Triton
                value = tl.sum(term, 0)
            else:
                value = tl.max(term, 0)
            tl.store(out + (batch * row_tiles + row_tile) * columns + c, value.to(tl.float64), mask=c < columns)
    if WRITES_P:
        if WRITE == 1:
            p, lost = split(p, ROUND)
            tl.store(pointer(row, 5, S[0], MASKED) + offsets, lost.to(S[0]), mask=mask)
        if WRITE == 2:
            bits = tl.load(pointer(row, 5, S[0], MASKED) + offsets, mask=mask)
            p = ROUND(p, bits.to(tl.int32) & 0xFFFF)
        tl.store(p_ptr + offsets, p.to(P), mask=mask)
    if WRITES_STATE:
        for i in tl.static_range(len(state)):
            tl.store(pointer(row, 5 + ASIDE + i, S[ASIDE + i], MASKED) + offsets, state[i].to(S[ASIDE + i]), mask=mask)


@jit
def boxed(
    table,
    hyper,
    tiles,
    scale,
    RULE: tl.constexpr,
    H: tl.constexpr,
    KIND: tl.constexpr,
    CAUTION: tl.constexpr,
    N_H: tl.constexpr,
    N_FACTORS: tl.constexpr,
    GIVEN: tl.constexpr,
    TERMS: tl.constexpr,
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
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """Program ``i`` runs the stage on tile ``tiles[i]``; see the module's docstring for the arguments."""
    pid = tl.program_id(0).to(tl.int64)
    box = tl.load(tiles + 4 * pid).to(tl.int64)
    batch = tl.load(tiles + 4 * pid + 1).to(tl.int64)
    row_tile = tl.load(tiles + 4 * pid + 2).to(tl.int64)
    column_tile = tl.load(tiles + 4 * pid + 3).to(tl.int64)
    row = table + box * (5 + len(S) + 4 * N_FACTORS + len(TERMS))
    hyper = hyper + box * (1 + N_H)
    rows = tl.load(row)
    columns = tl.load(row + 1)
    whole = ((row_tile + 1) * BR <= rows) & ((column_tile + 1) * BC <= columns)
    if whole & (tl.load(row + 2) != 0):
        _box_tile(row, hyper, scale, batch, row_tile, column_tile, rows, columns, RULE, H, KIND, CAUTION, N_H,
                  N_FACTORS, GIVEN, TERMS, DECAY, MAXIMIZE, SCALED, WRITES_P, WRITES_STATE, WRITE, ASIDE, ROUND, P, G,
                  S, C, BR, BC, False)  # fmt: skip
    else:
        _box_tile(row, hyper, scale, batch, row_tile, column_tile, rows, columns, RULE, H, KIND, CAUTION, N_H,
                  N_FACTORS, GIVEN, TERMS, DECAY, MAXIMIZE, SCALED, WRITES_P, WRITES_STATE, WRITE, ASIDE, ROUND, P, G,
                  S, C, BR, BC, True)  # fmt: skip


def boxed_constexprs(
    stage: Stage,
    prologue: Prologue,
    kind: type,
    factors: int,
    terms: tuple[int, ...],
    tile: tuple[int, int],
    scaled: bool,
    p: torch.dtype,
    g: torch.dtype,
    state: tuple[torch.dtype, ...],
) -> dict[str, Any]:
    """The compile-time arguments of :func:`boxed` for a stage.

    Args:
        stage: what to run.
        prologue: what comes before the rule.
        kind: the NamedTuple class of the rule's ``h``.
        factors: how many factors it is given, with that of :class:`Cautious`.
        terms: how each term leaves a tile.
        tile: one of :data:`TILES`.
        scaled: whether a gradient scale is given.
        p, g, state: dtypes of parameter, gradient and each state, first that which is for the write alone.
    """
    return {
        **common_constexprs(stage, prologue, kind, scaled, p, g, state),
        "N_FACTORS": factors,
        "GIVEN": factors - isinstance(stage, Cautious) > 0,
        "TERMS": terms,
        "BR": tile[0],
        "BC": tile[1],
    }
