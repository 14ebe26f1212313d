"""Checks of hyperparameters: what is allowed, said in one place, raised before anything changes."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

__all__ = [
    "Check",
    "betas",
    "boolean",
    "check_group",
    "fraction",
    "nearest",
    "nonnegative",
    "nonnegative_integer",
    "nonpositive",
    "number",
    "one_of",
    "optional",
    "positive",
    "positive_integer",
    "share",
]

Check = Callable[[Any], "str | None"]
"""Returns what is allowed if the value is not, else None."""


def _number(value: Any) -> float | None:
    """The value as a float; None if it is no real number. Reading a tensor on a GPU would wait: it is trusted."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.is_complex():
            return None
        return 0.5 if value.device.type not in ("cpu", "meta") else float(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    return float(value)


def _between(low: float, high: float, low_open: bool, text: str) -> Check:
    def check(value: Any) -> str | None:
        x = _number(value)
        ok = x is not None and not math.isnan(x) and (low < x if low_open else low <= x) and x < high
        return None if ok else text

    return check


nonnegative = _between(0.0, math.inf, False, "a finite number >= 0")
positive = _between(0.0, math.inf, True, "a finite number > 0")
nonpositive = _between(-math.inf, 5e-324, True, "a finite number <= 0")
number = _between(-math.inf, math.inf, True, "a finite number")
fraction = _between(0.0, 1.0, False, "a number in [0, 1)")
share = _between(0.0, math.nextafter(1.0, 2.0), True, "a number in (0, 1]")


def optional(check: Check) -> Check:
    """``None`` or what ``check`` allows."""

    def optional_check(value: Any) -> str | None:
        text = None if value is None else check(value)
        return None if text is None else f"None or {text}"

    return optional_check


def positive_integer(value: Any) -> str | None:
    """1, 2, ..."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    return None if ok else "an integer >= 1"


def nonnegative_integer(value: Any) -> str | None:
    """0, 1, 2, ..."""
    return None if value == 0 and not isinstance(value, bool) else positive_integer(value) and "an integer >= 0"


def one_of(*words: str | None) -> Check:
    """One of some words, or None if it is among them."""
    text = " or ".join(map(repr, words))
    return lambda value: None if (value is None or isinstance(value, str)) and value in words else text


def boolean(value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "True or False"


def betas(count: int) -> Check:
    """A sequence of ``count`` decay rates in [0, 1), each the weight of the old value."""

    def check(value: Any) -> str | None:
        ok = isinstance(value, (tuple, list)) and len(value) == count and all(fraction(b) is None for b in value)
        return None if ok else f"a tuple of {count} numbers in [0, 1)"

    return check


def check_group(owner: str, group: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Raise ValueError for the first hyperparameter of ``group`` that is out of range."""
    for name, check in checks.items():
        allowed = check(group[name])
        if allowed is not None:
            raise ValueError(f"{owner}: {name}={group[name]!r} is not allowed: must be {allowed}")


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """`` Did you mean 'x'?`` for the nearest of ``words``, or nothing if none is near."""
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return f" Did you mean {match[0]!r}?" if match else ""
