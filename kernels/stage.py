"""The stages of an update: one pass over the tensors each.

An elementwise optimizer has one :class:`Update`. An optimizer that needs norms has a :class:`Measure`, whose terms the
engine sums over the whole parameter whatever its sharding, and an :class:`Apply`, which receives what follows from
the sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from .language import Rule

__all__ = ["Apply", "Decay", "Measure", "Prologue", "Stage", "Update"]


@dataclass(frozen=True)
class Update:
    """``rule(p, g, state, h) -> (p, state)``: reads and writes everything in one pass."""

    rule: Rule


@dataclass(frozen=True)
class Measure:
    """``rule(p, g, state, h) -> (state, terms)``: writes the state, and sums each term over the whole parameter.

    Args:
        rule: the rule.
        terms: how many terms it returns.
        writes_state: whether the state changes; without, it is not stored.
    """

    rule: Rule
    terms: int
    writes_state: bool = True


@dataclass(frozen=True)
class Apply:
    """``rule(p, g, state, h, c) -> p`` with ``c = factors(sums, h)``: writes the parameter.

    Args:
        rule: the rule.
        factors: ``factors(sums, h) -> tuple`` of scalars, evaluated once per parameter from the global sums of the
            :class:`Measure` before it.
        n_factors: how many scalars that is.
    """

    rule: Rule
    factors: Rule
    n_factors: int = 1


Stage: TypeAlias = Update | Measure | Apply


class Decay(Enum):
    """Where weight decay enters, outside the rule. Both use the scalar ``decay`` of the parameter's row."""

    NONE = 0
    L2 = 1
    """``g = g + decay * p`` wherever the gradient is read."""
    SHRINK = 2
    """``p = p * decay`` before the rule of a stage that writes the parameter."""


@dataclass(frozen=True)
class Prologue:
    """What is done to gradient and parameter before every rule. Static: each value is a kernel of its own.

    Order: cast to the compute dtype (fp32; fp64 stays fp64), scale the gradient (unscale and clip factor, one device
    scalar), negate it (``maximize``), decay.
    """

    decay: Decay = Decay.NONE
    maximize: bool = False
