"""What both kernels do with a tile that is loaded: prologue, rule, caution. And how they read rows of tables."""

from __future__ import annotations

from typing import Any

import torch

from .language import HAS_TRITON, jit, tl
from .rounding import rounding_of
from .stage import Agreement, Apply, Cautious, Decay, Measure, Prologue, Stage, Update, Write, plain

__all__ = ["DTYPES", "common_constexprs", "compute", "pointer", "scalars"]

_KINDS: dict[type, int] = {Update: 0, Measure: 1, Apply: 2}
_CAUTION: dict[type, int] = {Agreement: 1, Cautious: 2}


@jit
def scalars(row, N: tl.constexpr, C: tl.constexpr):
    """``N`` values of a float64 row, in the compute dtype."""
    out = ()
    for i in tl.static_range(N):
        out = out + (tl.load(row + i).to(C),)  # noqa: RUF005 - Triton
    return out


@jit
def pointer(row, column: tl.constexpr, dtype: tl.constexpr, MASKED: tl.constexpr):
    """A pointer out of a table; unmasked tiles have aligned ones."""
    address = tl.load(row + column).to(tl.pointer_type(dtype))
    if not MASKED:
        address = tl.multiple_of(address, 16)
    return address


@jit
def compute(
    p,
    g,
    state,
    h,
    decay,
    scale,
    c,
    agreed,
    RULE: tl.constexpr,
    KIND: tl.constexpr,
    CAUTION: tl.constexpr,
    GIVEN: tl.constexpr,
    DECAY: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    SCALED: tl.constexpr,
    C: tl.constexpr,
):
    """``(p, state, terms)`` after the stage. ``c`` is what it is given, ``agreed`` the factor of a Cautious."""
    terms = ()
    if SCALED:
        g = g * tl.load(scale).to(C)
    if MAXIMIZE:
        g = -g
    if DECAY == 1:
        g = g + decay * p
    if DECAY == 2 and KIND != 1:
        p = p * decay
    before = p
    if KIND == 0:
        if GIVEN:
            p, state = RULE(p, g, state, h, c)
        else:
            p, state = RULE(p, g, state, h)
    elif KIND == 1:
        if GIVEN:
            state, terms = RULE(p, g, state, h, c)
        else:
            state, terms = RULE(p, g, state, h)
    else:
        p = RULE(p, g, state, h, c)
    if CAUTION == 1:
        terms = (((p - before) * g < 0).to(C),)
    if CAUTION == 2:
        move = p - before
        p = before + tl.where(move * g >= 0, 0.0, move * agreed)  # NaN moves
    return p, state, terms


DTYPES: dict[torch.dtype, Any] = (
    {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.int16: tl.int16,
    }
    if HAS_TRITON
    else {}
)


def common_constexprs(
    stage: Stage,
    prologue: Prologue,
    kind: type,
    scaled: bool,
    p: torch.dtype,
    g: torch.dtype,
    state: tuple[torch.dtype, ...],
) -> dict[str, Any]:
    """The compile-time arguments that both kernels take.

    Args:
        stage: what to run.
        prologue: what comes before the rule.
        kind: the NamedTuple class of the rule's ``h``.
        scaled: whether a gradient scale is given.
        p, g, state: dtypes of parameter, gradient and each state, first that which is for the write alone.
    """
    return {
        "RULE": stage.rule,
        "H": kind,
        "KIND": _KINDS[type(plain(stage))],
        "CAUTION": _CAUTION.get(type(stage), 0),
        "N_H": len(kind._fields),  # type: ignore[attr-defined]
        "DECAY": prologue.decay.value,
        "MAXIMIZE": prologue.maximize,
        "SCALED": scaled,
        "WRITES_P": stage.writes_parameter,
        "WRITES_STATE": stage.writes_state,
        "WRITE": prologue.write.value,
        "ASIDE": prologue.aside,
        "ROUND": rounding_of(prologue.write, p),
        "P": DTYPES[p],
        "G": DTYPES[g],
        "S": tuple(DTYPES[d] for d in state),
        "C": tl.float64 if p == torch.float64 else tl.float32,
    }


assert (Decay.L2.value, Decay.SHRINK.value) == (1, 2)  # the literals in compute
assert (Write.KAHAN.value, Write.STOCHASTIC.value) == (1, 2)  # and in the kernels
