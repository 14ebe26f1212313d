"""Rules as C++: traced with symbols in place of tensors, so that each is still written once.

``F``, ``I`` and ``B`` are a float, an int32 and a truth value, or sixteen of each in AVX-512 registers; elsewhere
compilers make vectors of the loops around. Every operation is that of torch, rounded alike: the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from .language import Rule, in_language

__all__ = ["OPENMP", "PRELUDE", "CppLanguage", "NotInCpp", "Symbol", "Trace", "as_cpp", "build", "built"]

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
static inline F truth(B x) { return (F)(x & (I)real(1.0f)); }
static inline I as_int(F x) { return (I)x; }
static inline F as_float(I x) { return (F)x; }
static inline F least(F x, F y) { return (F)_mm512_min_ps((__m512)x, (__m512)y); }
static inline F largest(F x, F y) { return (F)_mm512_max_ps((__m512)x, (__m512)y); }
static inline F size(F x) { return (F)_mm512_abs_ps((__m512)x); }
static inline F down(F x) { return (F)_mm512_floor_ps((__m512)x); }
static inline F root(F x) { return (F)_mm512_sqrt_ps((__m512)x); }
static inline F load(const float* x) { return (F)_mm512_loadu_ps(x); }
static inline void store(float* x, F y) { _mm512_storeu_ps(x, (__m512)y); }
static inline I load_bytes(const uint8_t* x) { return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)x)); }
static inline void store_bytes(uint8_t* x, I y) { _mm_storeu_si128((__m128i*)x, _mm512_cvtepi32_epi8((__m512i)y)); }
static inline I load_halves(const void* x) {
    return (I)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x));
}
static inline void store_halves(void* x, I y) {
    _mm256_storeu_si256((__m256i*)x, _mm512_cvtepi32_epi16((__m512i)y));
}
#else
constexpr int LANES = 1;
typedef float F;
typedef int32_t I;
typedef bool B;
static inline F real(float x) { return x; }
static inline I whole(int32_t x) { return x; }
static inline F real(I x) { return (float)x; }
static inline I whole(F x) { return (int32_t)x; }
static inline F truth(B x) { return x ? 1.0f : 0.0f; }
static inline I as_int(F x) { I y; std::memcpy(&y, &x, 4); return y; }
static inline F as_float(I x) { F y; std::memcpy(&y, &x, 4); return y; }
static inline F least(F x, F y) { return x < y ? x : y; }
static inline F largest(F x, F y) { return x > y ? x : y; }
static inline F size(F x) { return std::fabs(x); }
static inline F down(F x) { F y = (float)(int32_t)x; return y > x ? y - 1.0f : y; }  // std::floor stops vectors
static inline F root(F x) { return std::sqrt(x); }
static inline F load(const float* x) { return *x; }
static inline void store(float* x, F y) { *x = y; }
static inline I load_bytes(const uint8_t* x) { return *x; }
static inline void store_bytes(uint8_t* x, I y) { *x = (uint8_t)y; }
static inline I load_halves(const void* x) { return *(const uint16_t*)x; }
static inline void store_halves(void* x, I y) { *(uint16_t*)x = (uint16_t)y; }
#endif

struct bf16 { uint16_t bits; };
static inline F load(const bf16* x) { return as_float(load_halves(x) << 16); }
static inline void store(bf16* x, F y) {  // to nearest, of two the even one; NaN as torch writes it
    const I bits = as_int(y), nearest = (bits + whole(0x7FFF) + ((bits >> 16) & whole(1))) >> 16;
    store_halves(x, y == y ? nearest : whole(0x7FC0));
}
static inline I load(const int16_t* x) { return load_halves(x) << 16 >> 16; }
"""
"""What traced rules call, and what calls them."""

OPENMP = """
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_num_threads() { return 1; }
static int omp_get_thread_num() { return 0; }
#endif
"""


FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=off", "-fsigned-zeros")
"""What Inductor sets another way, or not for certain."""


def build(source: str) -> Any:
    """A library, built once for a machine by what builds torch.compile's code; raises what that raises."""
    from torch._inductor.codecache import CppCodeCache  # takes a second to import

    return CppCodeCache.load(source, "cpu", extra_flags=FLAGS)


@functools.cache
def built(source: str) -> Any | None:
    """What :func:`build` gives; None where that cannot be built, so that something slower must do."""
    try:
        return build(source)
    except Exception:  # whatever torch's parts raise
        return None


_TYPES = {torch.float32: "F", torch.int32: "I", torch.bool: "B"}


class NotInCpp(Exception):
    """A rule needs what has no C++ form here with torch's bits."""


class Trace:
    """The statements of a function."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def made(self, dtype: torch.dtype, text: str) -> Symbol:
        """A new variable."""
        self.lines.append(f"const {_TYPES[dtype]} t{len(self.lines)} = {text};")
        return Symbol(self, dtype, f"t{len(self.lines) - 1}")


class Symbol:
    """What a C++ variable holds, in place of a tensor.

    Args:
        trace: where it is used.
        dtype: float32, int32 or bool.
        text: the variable.
        kept_as: the dtype of the tensor that it was read from, where that has another.
    """

    def __init__(self, trace: Trace, dtype: torch.dtype, text: str, kept_as: torch.dtype | None = None) -> None:
        self._trace, self._computed, self.text = trace, dtype, text
        self.dtype = kept_as or dtype
        self.written: str | None = None
        """The variable that :meth:`copy_` was given last."""

    def __getattr__(self, name: str) -> Any:
        raise NotInCpp(name)

    def _made(self, text: str, dtype: torch.dtype | None = None) -> Symbol:
        return self._trace.made(dtype or self._computed, text)

    def text_of(self, other: Any) -> str:
        """Another operand: a symbol, or a number, which becomes what this is, as in torch."""
        if isinstance(other, Symbol):
            if other._computed != self._computed:
                raise NotInCpp(f"{self._computed} and {other._computed} together")
            return other.text
        if self._computed == torch.float32:
            return number(float(other))
        return f"whole((int32_t){int(other)})" if self._computed == torch.int32 else str(bool(other)).lower()

    def _with(self, sign: str, other: Any, dtype: torch.dtype | None = None) -> Symbol:
        return self._made(f"{self.text} {sign} {self.text_of(other)}", dtype)

    def _within(self, sign: str, other: Any) -> Symbol:
        return self._made(f"{self.text_of(other)} {sign} {self.text}")

    def to(self, dtype: torch.dtype) -> Symbol:
        """Another dtype's numbers; 16-bit floats are computed with as float32."""
        if dtype == self._computed:
            return Symbol(self._trace, dtype, self.text)
        change = {
            (torch.int32, torch.float32): "real",
            (torch.float32, torch.int32): "whole",
            (torch.bool, torch.float32): "truth",
        }
        if (self._computed, dtype) not in change:
            raise NotInCpp(f"{self._computed} to {dtype}")
        return self._made(f"{change[self._computed, dtype]}({self.text})", dtype)

    def copy_(self, value: Symbol) -> None:
        """Store a value where this one was read."""
        if not isinstance(value, Symbol) or value._computed != torch.float32:
            raise NotInCpp("to store what is no float")
        self.written = value.text

    def __bool__(self) -> bool:
        raise NotInCpp("a choice by value")

    def __neg__(self) -> Symbol:
        return self._made(f"-{self.text}")

    def __add__(self, other: Any) -> Symbol:
        return self._with("+", other)

    def __sub__(self, other: Any) -> Symbol:
        return self._with("-", other)

    def __rsub__(self, other: Any) -> Symbol:
        return self._within("-", other)

    def __mul__(self, other: Any) -> Symbol:
        return self._with("*", other)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Any) -> Symbol:
        if isinstance(other, Symbol):
            return self._with("/", other)
        return self._made(f"{self.text} / {number(float(other))}")

    def __rtruediv__(self, other: Any) -> Symbol:
        inverse = self._made(f"real(1.0f) / {self.text}")  # torch multiplies by it
        return inverse if other == 1 else inverse * other

    def __and__(self, other: Any) -> Symbol:
        return self._with("&", other)

    __rand__ = __and__

    def __or__(self, other: Any) -> Symbol:
        return self._with("|", other)

    def __rshift__(self, other: int) -> Symbol:
        return self._made(f"{self.text} >> {other}")

    def __lshift__(self, other: int) -> Symbol:
        return self._made(f"{self.text} << {other}")

    def __lt__(self, other: Any) -> Symbol:
        return self._with("<", other, torch.bool)

    def __le__(self, other: Any) -> Symbol:
        return self._with("<=", other, torch.bool)

    def __gt__(self, other: Any) -> Symbol:
        return self._with(">", other, torch.bool)

    def __ge__(self, other: Any) -> Symbol:
        return self._with(">=", other, torch.bool)

    def __eq__(self, other: Any) -> Symbol:  # type: ignore[override]
        return self._with("==", other, torch.bool)

    def __ne__(self, other: Any) -> Symbol:  # type: ignore[override]
        return self._with("!=", other, torch.bool)

    __hash__ = None  # type: ignore[assignment]


def number(value: float) -> str:
    """A float constant."""
    if value != value or value in (float("inf"), -float("inf")):
        name = "NAN" if value != value else "INFINITY" if value > 0 else "-INFINITY"
        return f"real({name})"
    return f"real((float){value!r})"


class CppLanguage:
    """The names of ``triton.language`` that rules may use, on symbols: but ``exp`` and ``log``, whose bits are torch's.

    Args:
        known: rules that are called by the name of a function of one float in place of being traced.
    """

    int32, float32 = torch.int32, torch.float32
    static_range = staticmethod(range)

    def __init__(self, known: Mapping[Rule, str] = MappingProxyType({})) -> None:
        self.instead = {a_rule: _call(name) for a_rule, name in known.items()}

    def __getattr__(self, name: str) -> Any:
        raise NotInCpp(f"tl.{name}")

    @staticmethod
    def where(condition: Symbol, x: Any, y: Any) -> Symbol:
        known: Symbol = x if isinstance(x, Symbol) else y
        if not isinstance(known, Symbol):
            raise NotInCpp("where of two numbers")
        return known._made(f"{condition.text} ? {known.text_of(x)} : {known.text_of(y)}")

    @staticmethod
    def minimum(x: Symbol, y: Any) -> Symbol:
        return x._made(f"least({x.text}, {x.text_of(y)})")

    @staticmethod
    def maximum(x: Symbol, y: Any) -> Symbol:
        return x._made(f"largest({x.text}, {x.text_of(y)})")

    @staticmethod
    def abs(x: Symbol) -> Symbol:
        return x._made(f"size({x.text})")

    @staticmethod
    def floor(x: Symbol) -> Symbol:
        return x._made(f"down({x.text})")

    @staticmethod
    def sqrt(x: Symbol) -> Symbol:
        return x._made(f"root({x.text})")

    @staticmethod
    def cast(x: Symbol, dtype: torch.dtype, bitcast: bool) -> Symbol:
        assert bitcast, "rules change dtypes with .to"
        return x._made(f"{'as_int' if dtype == torch.int32 else 'as_float'}({x.text})", dtype)


def _call(name: str) -> Callable[[Symbol], Symbol]:
    return lambda x: x._made(f"{name}({x.text})")


def as_cpp(a_rule: Rule, name: str, known: Mapping[Rule, str] = MappingProxyType({})) -> str:
    """A C++ function of the number that a rule computes of a number.

    Args:
        a_rule: the rule.
        name: of the function.
        known: see :class:`CppLanguage`.
    """
    trace = Trace()
    result = in_language(a_rule, CppLanguage(known))(Symbol(trace, torch.float32, "x"))
    body = "\n".join(f"    {line}" for line in trace.lines)
    return f"static inline F {name}(F x) {{\n{body}\n    return {result.text};\n}}\n"
