"""What the docstring of an optimizer says of its use, as data: for docs/optimizers.md and ``benchmarks.starts``."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass
from typing import Any

import oput_dist as oput

__all__ = ["Guide", "guide"]


@dataclass(frozen=True)
class Guide:
    """The last paragraphs of a docstring."""

    title: str
    """Its first sentence."""
    sharding: str
    """What is exchanged, and the state."""
    when: str
    """When to use it."""
    start: dict[str, Any]
    """Keywords of the constructor to start with."""
    paper: str


def guide(optimizer: type[oput.Optimizer]) -> Guide:
    """The guide of an optimizer; ValueError if its docstring lacks a part."""
    text = inspect.cleandoc(optimizer.__doc__ or "")
    parts = [" ".join(part.split()) for part in text.split("\n\n")]

    def part(word: str) -> str:
        found = [p for p in parts if p.startswith(word)]
        if len(found) != 1:
            raise ValueError(f"{optimizer.__name__}: the docstring must have one paragraph that begins with {word!r}")
        return found[0].removeprefix(word).strip()

    when, _, start = part("When:").partition(" Start: ")
    given = re.findall(r"``(\w+)=(.*?)``", start)
    if not given:
        raise ValueError(f"{optimizer.__name__}: 'Start:' must list keywords, as in ``lr=1e-3``")
    return Guide(
        title=parts[0].rstrip(".:"),
        sharding=part("Sharding class"),
        when=when,
        start={name: ast.literal_eval(value) for name, value in given},
        paper=part("Paper:"),
    )
