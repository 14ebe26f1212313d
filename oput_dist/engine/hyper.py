"""Hyperparameters: what is allowed, said by the types of a signature and checked before anything changes."""

from __future__ import annotations

import difflib
import functools
import math
import numbers
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

__all__ = [
    "Allowed",
    "Betas",
    "Betas3",
    "BetasN",
    "Check",
    "Fraction",
    "Nonnegative",
    "NonnegativeInteger",
    "Nonpositive",
    "Number",
    "Positive",
    "PositiveInteger",
    "Share",
    "betas3",
    "boolean",
    "check_group",
    "check_of",
    "each",
    "fraction",
    "hyperparameters",
    "nearest",
    "nonnegative",
    "number",
    "optional",
    "positive",
    "positive_integer",
    "share",
    "signature_checks",
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


def one_of(words: Iterable[str | None]) -> Check:
    """One of some words, or None if it is among them."""
    words = tuple(words)
    text, names = " or ".join(map(repr, words)), [word for word in words if word is not None]

    def check(value: Any) -> str | None:
        if (value is None or isinstance(value, str)) and value in words:
            return None
        return text + (nearest(value, names) if isinstance(value, str) else "")

    return check


def boolean(value: Any) -> str | None:
    """True or False."""
    return None if isinstance(value, bool) else "True or False"


def each(check: Check, text: str, count: int | None = None) -> Check:
    """A sequence of ``count`` values (one or more by default) that ``check`` allows; ``text`` says so."""

    def check_each(value: Any) -> str | None:
        fits = isinstance(value, (tuple, list)) and (len(value) > 0 if count is None else len(value) == count)
        return None if fits and all(check(one) is None for one in value) else text

    return check_each


@dataclass(frozen=True)
class Allowed:
    """What an annotated type allows: ``Annotated[float, Allowed(check)]``."""

    check: Check


# The types of hyperparameters. ``X | None`` allows None too; ``bool`` and ``Literal`` need no mark.

Number = Annotated[float, Allowed(number)]
Nonnegative = Annotated[float, Allowed(nonnegative)]
Positive = Annotated[float, Allowed(positive)]
Nonpositive = Annotated[float, Allowed(nonpositive)]
Fraction = Annotated[float, Allowed(fraction)]
Share = Annotated[float, Allowed(share)]
PositiveInteger = Annotated[int, Allowed(positive_integer)]
NonnegativeInteger = Annotated[int, Allowed(nonnegative_integer)]
Betas = Annotated[tuple[float, float], Allowed(each(fraction, "a tuple of 2 numbers in [0, 1)", 2))]
"""Two decay rates, each the weight of the old value."""
betas3 = each(fraction, "a tuple of 3 numbers in [0, 1)", 3)
Betas3 = Annotated[tuple[float, float, float], Allowed(betas3)]
BetasN = Annotated[tuple[float, ...], Allowed(each(fraction, "a tuple of one or more numbers in [0, 1)"))]


def check_of(annotation: Any) -> Check | None:
    """The check that an annotation says, if it says one."""
    if annotation is bool:
        return boolean
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return one_of(args)
    if origin is Annotated:
        return next((mark.check for mark in args[1:] if isinstance(mark, Allowed)), None)
    if origin in (Union, types.UnionType) and len(args) == 2 and type(None) in args:
        check = check_of(next(arg for arg in args if arg is not type(None)))
        return check if check is None or check(None) is None else optional(check)
    return None


@functools.cache
def signature_checks(kind: type) -> Mapping[str, Check]:
    """The checks that the signature of a class's ``__init__`` says, and those of its bases, which come first."""
    checks: dict[str, Check] = {}
    for base in reversed(kind.__mro__):
        try:
            annotations = get_type_hints(base.__init__, include_extras=True) if "__init__" in vars(base) else {}  # type: ignore[misc]
        except NameError:  # a class of a user's, with names that only type checkers import
            annotations = {}
        found = {name: check_of(annotation) for name, annotation in annotations.items()}
        checks.update({name: check for name, check in found.items() if check is not None})
    return checks


def hyperparameters(given: Mapping[str, Any], *without: str) -> dict[str, Any]:
    """The hyperparameters among the ``locals()`` of an ``__init__``, in the order of its signature.

    Args:
        given: ``locals()``, before anything else is assigned but arguments themselves: a derived value goes under the
            name of its argument.
        without: what groups do not have: an argument from which others follow, or another variable.
    """
    beside = ("self", "params", "common", *without)
    return {name: value for name, value in given.items() if name not in beside and not name.startswith("__")}


def check_group(owner: str, group: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Raise ValueError for the first hyperparameter of ``group`` that is out of range."""
    for name, check in checks.items():
        allowed = check(group[name]) if name in group else None
        if allowed is not None:
            raise ValueError(f"{owner}: {name}={group[name]!r} is not allowed: must be {allowed}")


def nearest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """`` Did you mean 'x'?`` for the nearest of ``words``, or nothing if none is near."""
    match = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return f" Did you mean {match[0]!r}?" if match else ""
