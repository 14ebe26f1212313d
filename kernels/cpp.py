"""A rule of one float as C++: traced with symbols in place of numbers, so that it is still written once.

``F``, ``I`` and ``B`` are a float, an int32 and a truth value, or sixteen of each in an AVX-512 register; elsewhere
compilers make vectors of the loops around.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from .language import Rule, in_language

__all__ = ["PRELUDE", "as_cpp"]

PRELUDE = """
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
constexpr int LANES = 16;
typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef I B;
static inline F real(float x) { return (F)_mm512_set1_ps(x); }
static inline I whole(int32_t x) { return (I)_mm512_set1_epi32(x); }
static inline F real(I x) { return (F)_mm512_cvtepi32_ps((__m512i)x); }
static inline I whole(F x) { return (I)_mm512_cvttps_epi32((__m512)x); }
static inline I as_int(F x) { return (I)x; }
static inline F as_float(I x) { return (F)x; }
static inline F least(F x, F y) { return (F)_mm512_min_ps((__m512)x, (__m512)y); }
static inline F largest(F x, F y) { return (F)_mm512_max_ps((__m512)x, (__m512)y); }
static inline F size(F x) { return (F)_mm512_abs_ps((__m512)x); }
static inline F down(F x) { return (F)_mm512_floor_ps((__m512)x); }
static inline F load(const float* x) { return (F)_mm512_loadu_ps(x); }
static inline void store(float* x, F y) { _mm512_storeu_ps(x, (__m512)y); }
static inline I load_bytes(const uint8_t* x) { return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x)); }
static inline void store_bytes(uint8_t* x, I y) { _mm_storeu_si128((__m128i*)x, _mm512_cvtepi32_epi8((__m512i)y)); }
#else
constexpr int LANES = 1;
typedef float F;
typedef int32_t I;
typedef bool B;
static inline F real(float x) { return x; }
static inline I whole(int32_t x) { return x; }
static inline F real(I x) { return (float)x; }
static inline I whole(F x) { return (int32_t)x; }
static inline I as_int(F x) { I y; std::memcpy(&y, &x, 4); return y; }
static inline F as_float(I x) { F y; std::memcpy(&y, &x, 4); return y; }
static inline F least(F x, F y) { return x < y ? x : y; }
static inline F largest(F x, F y) { return x > y ? x : y; }
static inline F size(F x) { return std::fabs(x); }
static inline F down(F x) { F y = (float)(int32_t)x; return y > x ? y - 1.0f : y; }  // std::floor stops vectors
static inline F load(const float* x) { return *x; }
static inline void store(float* x, F y) { *x = y; }
static inline I load_bytes(const uint8_t* x) { return *x; }
static inline void store_bytes(uint8_t* x, I y) { *x = (uint8_t)y; }
#endif
"""
"""What traced rules call, and what calls them."""


def as_cpp(a_rule: Rule, name: str, known: Mapping[Rule, str] = MappingProxyType({})) -> str:
    """A C++ function of the number that a rule computes of a number.

    Args:
        a_rule: the rule.
        name: of the function.
        known: rules that are called by the name of a function in place of being traced.
    """
    lines: list[str] = []
    language = _CppLanguage(known)
    result = in_language(a_rule, language)(_Symbol(lines, "F", "x"))
    body = "\n".join(f"    {line}" for line in lines)
    return f"static inline F {name}(F x) {{\n{body}\n    return {result.text};\n}}\n"


class _Symbol:
    """What a C++ variable of type ``F``, ``I`` or ``B`` holds."""

    def __init__(self, lines: list[str], kind: str, text: str) -> None:
        self._lines, self.kind, self.text = lines, kind, text

    def made(self, kind: str, text: str) -> _Symbol:
        """A new variable."""
        self._lines.append(f"const {kind} t{len(self._lines)} = {text};")
        return _Symbol(self._lines, kind, f"t{len(self._lines) - 1}")

    def written(self, other: Any) -> str:
        """Another operand: a symbol, or a number, which becomes what this is, as in torch."""
        if isinstance(other, _Symbol):
            return other.text
        return f"real((float){float(other)!r})" if self.kind == "F" else f"whole((int32_t){other})"

    def with_(self, sign: str, other: Any) -> _Symbol:
        return self.made(self.kind, f"{self.text} {sign} {self.written(other)}")

    def to(self, kind: str) -> _Symbol:
        return self.made(kind, f"{'real' if kind == 'F' else 'whole'}({self.text})")

    def __neg__(self) -> _Symbol:
        return self.made(self.kind, f"-{self.text}")

    def __add__(self, other: Any) -> _Symbol:
        return self.with_("+", other)

    def __sub__(self, other: Any) -> _Symbol:
        return self.with_("-", other)

    def __mul__(self, other: Any) -> _Symbol:
        return self.with_("*", other)

    __radd__, __rmul__ = __add__, __mul__

    def __and__(self, other: Any) -> _Symbol:
        return self.with_("&", other)

    def __rshift__(self, other: Any) -> _Symbol:
        return self.made(self.kind, f"{self.text} >> {other}")

    def __lt__(self, other: Any) -> _Symbol:
        return self.made("B", f"{self.text} < {self.written(other)}")


class _CppLanguage:
    """The names of ``triton.language`` that rules of codes may use, on symbols."""

    int32, float32 = "I", "F"

    def __init__(self, known: Mapping[Rule, str]) -> None:
        self.instead = {a_rule: _call(name) for a_rule, name in known.items()}

    @staticmethod
    def where(condition: _Symbol, x: Any, y: Any) -> _Symbol:
        known: _Symbol = x if isinstance(x, _Symbol) else y
        return known.made(known.kind, f"{condition.text} ? {known.written(x)} : {known.written(y)}")

    @staticmethod
    def minimum(x: _Symbol, y: Any) -> _Symbol:
        return x.made("F", f"least({x.text}, {x.written(y)})")

    @staticmethod
    def maximum(x: _Symbol, y: Any) -> _Symbol:
        return x.made("F", f"largest({x.text}, {x.written(y)})")

    @staticmethod
    def abs(x: _Symbol) -> _Symbol:
        return x.made("F", f"size({x.text})")

    @staticmethod
    def floor(x: _Symbol) -> _Symbol:
        return x.made("F", f"down({x.text})")

    @staticmethod
    def cast(x: _Symbol, dtype: str, bitcast: bool) -> _Symbol:
        assert bitcast, "rules change dtypes with .to"
        return x.made(dtype, f"{'as_int' if dtype == 'I' else 'as_float'}({x.text})")


def _call(name: str) -> Callable[[_Symbol], _Symbol]:
    return lambda x: x.made("F", f"{name}({x.text})")
