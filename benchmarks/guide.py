"""What the docstring of an optimizer says of its use, as data: for docs/optimizers.md and ``benchmarks.starts``."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import dataclass
from typing import Any

import oput_dist as oput

__all__ = ["Guide", "guide", "prose"]


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


def _paragraph(cls: type, word: str) -> str:
    """The one paragraph of a docstring that begins with a word, without it."""
    parts = [" ".join(part.split()) for part in inspect.cleandoc(cls.__doc__ or "").split("\n\n")]
    found = [part for part in parts if part.startswith(word)]
    if len(found) != 1:
        raise ValueError(f"{cls.__name__}: the docstring must have one paragraph that begins with {word!r}")
    return found[0].removeprefix(word).strip()


def prose(cls: type) -> tuple[str, str, str, str]:
    """``(title, when, start, paper)`` of a class's docstring, as they are written; ValueError if a part is missing."""
    when, _, start = _paragraph(cls, "When:").partition(" Start: ")
    title = " ".join(inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].split())
    return title.rstrip(".:"), when, start, _paragraph(cls, "Paper:")


def guide(optimizer: type[oput.Optimizer]) -> Guide:
    """The guide of an optimizer; ValueError if its docstring lacks a part."""
    title, when, start, paper = prose(optimizer)
    given = re.findall(r"``(\w+)=(.*?)``", start)
    if not given:
        raise ValueError(f"{optimizer.__name__}: 'Start:' must list keywords, as in ``lr=1e-3``")
    return Guide(
        title=title,
        sharding=_paragraph(optimizer, "Sharding class"),
        when=when,
        start={name: ast.literal_eval(value) for name, value in given},
        paper=paper,
    )
