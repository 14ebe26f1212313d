"""A rule of one float as C++: traced with symbols in place of numbers, so that it is still written once."""

from __future__ import annotations

from typing import Any

from .language import Rule, in_language

__all__ = ["PRELUDE", "as_cpp"]

PRELUDE = """
#include <cmath>
#include <cstdint>
#include <cstring>

static inline int32_t as_int(float x) { int32_t y; std::memcpy(&y, &x, 4); return y; }
static inline float as_float(int32_t x) { float y; std::memcpy(&y, &x, 4); return y; }
static inline float least(float x, float y) { return x < y ? x : y; }
static inline float largest(float x, float y) { return x > y ? x : y; }
static inline float down(float x) { float y = (float)(int32_t)x; return y > x ? y - 1.0f : y; }
"""
"""What traced rules call. ``down`` is the floor of what an int32 holds: compilers leave loops with ``std::floor`` alone."""


def as_cpp(a_rule: Rule, name: str) -> str:
    """A C++ function of the float that a rule computes of a float."""
    lines: list[str] = []
    result = in_language(a_rule, LANGUAGE)(_Symbol(lines, "float", "x"))
    body = "\n".join(f"    {line}" for line in lines)
    return f"static inline float {name}(float x) {{\n{body}\n    return {result.text};\n}}\n"


class _Symbol:
    """What a C++ variable holds: a ``float``, an ``int32_t``, or a ``bool``."""

    def __init__(self, lines: list[str], kind: str, text: str) -> None:
        self._lines, self.kind, self.text = lines, kind, text

    def made(self, kind: str, text: str) -> _Symbol:
        """A new variable."""
        self._lines.append(f"const {kind} t{len(self._lines)} = {text};")
        return _Symbol(self._lines, kind, f"t{len(self._lines) - 1}")

    def written(self, other: Any) -> str:
        """Another operand: a symbol, or a number, which becomes what this is, as in torch."""
        return other.text if isinstance(other, _Symbol) else f"({self.kind}){other!r}"

    def to(self, kind: str) -> _Symbol:
        return self.made(kind, f"({kind}){self.text}")

    def __neg__(self) -> _Symbol:
        return self.made(self.kind, f"-{self.text}")

    def __add__(self, other: Any) -> _Symbol:
        return self.made(self.kind, f"{self.text} + {self.written(other)}")

    def __sub__(self, other: Any) -> _Symbol:
        return self.made(self.kind, f"{self.text} - {self.written(other)}")

    def __mul__(self, other: Any) -> _Symbol:
        return self.made(self.kind, f"{self.text} * {self.written(other)}")

    __radd__, __rmul__ = __add__, __mul__

    def __and__(self, other: Any) -> _Symbol:
        return self.made(self.kind, f"{self.text} & {self.written(other)}")

    def __rshift__(self, other: Any) -> _Symbol:
        return self.made(self.kind, f"{self.text} >> {self.written(other)}")

    def __lt__(self, other: Any) -> _Symbol:
        return self.made("bool", f"{self.text} < {self.written(other)}")


class _CppLanguage:
    """The names of ``triton.language`` that rules of codes may use, on symbols."""

    int32, float32 = "int32_t", "float"

    @staticmethod
    def where(condition: _Symbol, x: Any, y: Any) -> _Symbol:
        known: _Symbol = x if isinstance(x, _Symbol) else y
        return known.made(known.kind, f"{condition.text} ? {known.written(x)} : {known.written(y)}")

    @staticmethod
    def minimum(x: _Symbol, y: Any) -> _Symbol:
        return x.made("float", f"least({x.text}, {x.written(y)})")

    @staticmethod
    def maximum(x: _Symbol, y: Any) -> _Symbol:
        return x.made("float", f"largest({x.text}, {x.written(y)})")

    @staticmethod
    def abs(x: _Symbol) -> _Symbol:
        return x.made("float", f"std::fabs({x.text})")

    @staticmethod
    def floor(x: _Symbol) -> _Symbol:
        return x.made("float", f"down({x.text})")

    @staticmethod
    def cast(x: _Symbol, dtype: str, bitcast: bool) -> _Symbol:
        assert bitcast, "rules change dtypes with .to"
        return x.made(dtype, f"{'as_int' if dtype == 'int32_t' else 'as_float'}({x.text})")


LANGUAGE = _CppLanguage()
