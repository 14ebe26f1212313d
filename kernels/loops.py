"""A stage on flat tensors on a CPU, in C++: one pass over memory for all tensors of a batch, state as codes included.

Blocks of :data:`BLOCK` elements go through the first cache: the numbers of codes are nowhere else. Sums are taken in
float64 over spans of fixed size, so that they are the same for any number of threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch

from .codes import Format
from .cpp import OPENMP, PRELUDE
from .cpp_codes import codes_source, decoding, encoding, tables

__all__ = ["BLOCK", "SPAN", "Column", "loop_source", "run_loop"]

BLOCK = 256
"""Elements: a multiple of the blocks of all codes."""
SPAN = 64 * BLOCK
"""Elements whose terms are summed by one thread."""
_AHEAD = 256
"""Elements from where they are read to what is fetched then: hardware stops at every page."""
_C_TYPES = {torch.float32: "float", torch.bfloat16: "bf16", torch.int16: "int16_t"}


@dataclass(frozen=True)
class Column:
    """The parameters, the gradients, or one state of them."""

    kept: torch.dtype | Format
    """As what it is in memory."""
    read: bool
    """Whether the rule looks at it."""
    written: str | None
    """The variable that is stored there."""

    @property
    def coded(self) -> bool:
        """Whether it is codes."""
        return isinstance(self.kept, Format)

    @property
    def c_type(self) -> str:
        """Of what the loop reads."""
        return "float" if isinstance(self.kept, Format) else _C_TYPES[self.kept]


def loop_source(
    lines: Sequence[str], columns: Sequence[Column], scalars: int, factors: int, terms: Sequence[str]
) -> str:
    """A library with ``run(table, tensors, scale, rows, factors, partial, sums, tables, bytes)``.

    ``table`` has for every tensor: elements, number of its row of scalars, number of its first span, and for each
    column an address, of codes that of the scales too. ``partial`` gets the sums of each span, ``sums`` theirs.

    Args:
        lines: what is done to an element, by ``x0``, ``x1``, ... of the columns, ``h.h0``, ... of the scalars,
            ``h.c0``, ... of the factors, and ``h.scale``.
        columns: the tensors.
        scalars, factors: how many.
        terms: the variables that are summed.
    """
    pointers = [f"{each.c_type}* __restrict p{i}" for i, each in enumerate(columns)]
    sums = [f"float* __restrict sum{i}" for i in range(len(terms))]
    writes = [f"store(p{i}, {each.written});" for i, each in enumerate(columns) if each.written]
    writes += [f"store(sum{i}, {term});" for i, term in enumerate(terms)]
    reads = [f"const {_kind(each)} x{i} = load(p{i});" for i, each in enumerate(columns) if each.read]
    names = [f"h{i}" for i in range(scalars)] + [f"c{i}" for i in range(factors)] + ["scale"]
    codes = codes_source() if any(each.coded for each in columns) else ""
    newline = "\n    "
    return f"""{PRELUDE}{OPENMP}{codes}
constexpr int64_t BLOCK = {BLOCK}, SPAN = {SPAN};
constexpr int TERMS = {len(terms)}, WORDS = {3 + sum(2 if each.coded else 1 for each in columns)};
struct Scalars {{ F {", ".join(names)}; }};
{_SUM}
static inline void element({", ".join([*pointers, *sums])}, const Scalars& h) {{
    {newline.join([*reads, *lines, *writes])}
}}

static void block(const int64_t* t, int64_t at, int n, const Scalars& h, double* lanes, const float* tables,
                  const uint8_t* bytes) {{
    {newline.join(_block_lines(columns, len(terms)))}
}}
{_RUN.replace("SCALARS", str(scalars)).replace("FACTORS", str(factors)).replace("MADE", _scalars(scalars, factors))}
"""


def run_loop(
    library: Any,
    sizes: Sequence[int],
    which: Sequence[int],
    addresses: Sequence[Sequence[int]],
    rows: torch.Tensor,
    terms: int,
    scale: float = 1.0,
    factors: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Run what was built of :func:`loop_source` on some tensors.

    Args:
        library: what was built.
        sizes: elements of each.
        which: the number of each one's row of scalars.
        addresses: for each column that of every tensor; of codes, then those of their scales.
        rows: of scalars, float32.
        terms: how many are summed.
        scale: the scalar ``scale``.
        factors: ``[n, tensors]``.

    Returns:
        the sums, ``[tensors, terms]``, float64; None without any.
    """
    firsts = [0, *accumulate(-(-size // SPAN) for size in sizes)]
    words = zip(sizes, which, firsts[:-1], *addresses, strict=True)
    table = (ctypes.c_int64 * ((3 + len(addresses)) * len(sizes)))(*chain.from_iterable(words))
    partial, sums = (torch.empty(n, terms, dtype=torch.float64, device="cpu") for n in (firsts[-1], len(sizes)))
    each = None if factors is None else factors.t().contiguous()
    rows = rows.contiguous()
    library.run(
        table,
        ctypes.c_int64(len(sizes)),
        ctypes.c_float(scale),
        _pointer(rows),
        _pointer(each),
        _pointer(partial),
        _pointer(sums),
        *tables(),
    )
    return sums if terms else None


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _kind(column: Column) -> str:
    return "I" if column.kept == torch.int16 else "F"


def _scalars(scalars: int, factors: int) -> str:
    values = [f"real(row[{i}])" for i in range(scalars)] + [f"real(c[{i}])" for i in range(factors)]
    return ", ".join([*values, "real(scale)"])


def _block_lines(columns: Sequence[Column], terms: int) -> list[str]:
    """What is done to ``n`` elements of a tensor from ``at``: decode, element by element, code again, add up."""
    lines, ends, word = [], [], 3
    for i, each in enumerate(columns):
        if isinstance(each.kept, Format):
            code = each.kept
            lines += [
                f"uint8_t* codes{i} = (uint8_t*)t[{word}] + at / {code.block} * {code.width};",
                f"float* scales{i} = (float*)t[{word + 1}] + at / {code.block};",
                f"alignas(64) float p{i}[BLOCK];",
            ]
            if each.read:
                lines.append(
                    f"for (int k = 0; k * {code.block} < n; ++k) "
                    + decoding(code, f"codes{i} + k * {code.width}", f"scales{i}[k]", f"p{i} + k * {code.block}")
                    + ";"
                )
            if each.written:
                numbers = f"p{i} + k * {code.block}"
                ends += [
                    f"for (int j = n; j < BLOCK; ++j) p{i}[j] = 0.0f;",
                    f"for (int k = 0; k * {code.block} < n; ++k) "
                    + encoding(code, numbers, f"codes{i} + k * {code.width}", f"scales{i} + k")
                    + ";",
                ]
            word += 1
        else:
            lines.append(f"{each.c_type}* p{i} = ({each.c_type}*)t[{word}] + at;")
        word += 1
    lines += [f"alignas(64) float sum{i}[BLOCK];" for i in range(terms)]
    ahead = [
        f"__builtin_prefetch(p{i} + j + {_AHEAD}, {int(bool(each.written))});"
        for i, each in enumerate(columns)
        if not each.coded and (each.read or each.written)
    ]
    here = ", ".join([f"p{i} + j" for i in range(len(columns))] + [f"sum{i} + j" for i in range(terms)] + ["h"])
    lines += ["int j = 0;", "#ifdef __AVX512F__"]
    lines.append(f"for (; j + LANES <= n; j += LANES) {{ {' '.join(ahead)} element({here}); }}")
    lines += ["if (j < n) {", *_tail_lines(columns, terms), "}"]
    lines += ["#else", "#pragma omp simd", f"for (j = 0; j < n; ++j) element({here});", "#endif"]
    ends += [f"add_up(sum{i}, n, lanes + {16 * i});" for i in range(terms)]
    return lines + ends


def _tail_lines(columns: Sequence[Column], terms: int) -> list[str]:
    """The elements that do not fill a register, copied to where there is room."""
    lines = []
    for i, each in enumerate(columns):
        lines.append(f"{each.c_type} last{i}[LANES] = {{}};")
        if each.read:
            lines.append(f"std::memcpy(last{i}, p{i} + j, (n - j) * sizeof(last{i}[0]));")
    lines += [f"float part{i}[LANES];" for i in range(terms)]
    arguments = [f"last{i}" for i in range(len(columns))] + [f"part{i}" for i in range(terms)] + ["h"]
    lines.append(f"element({', '.join(arguments)});")
    for i, each in enumerate(columns):
        if each.written:
            lines.append(f"std::memcpy(p{i} + j, last{i}, (n - j) * sizeof(last{i}[0]));")
    lines += [f"std::memcpy(sum{i} + j, part{i}, (n - j) * sizeof(float));" for i in range(terms)]
    return [f"    {line}" for line in lines]


_SUM = """
static inline void add_up(const float* x, int n, double* lanes) {
    int j = 0;
    for (; j + 16 <= n; j += 16)
        for (int k = 0; k < 16; ++k) lanes[k] += (double)x[j + k];
    for (int k = 0; j + k < n; ++k) lanes[k] += (double)x[j + k];
}
"""

_RUN = """
static void span(const int64_t* t, int64_t at, const Scalars& h, double* partial, const float* tables,
                 const uint8_t* bytes) {
    double lanes[TERMS * 16 + 1] = {};
    const int64_t end = at + SPAN < t[0] ? at + SPAN : t[0];
    for (int64_t i = at; i < end; i += BLOCK)
        block(t, i, (int)(end - i < BLOCK ? end - i : BLOCK), h, lanes, tables, bytes);
    for (int term = 0; term < TERMS; ++term) {
        double total = 0.0;
        for (int k = 0; k < 16; ++k) total += lanes[16 * term + k];
        partial[term] = total;
    }
}

extern "C" void run(const int64_t* table, int64_t count, float scale, const float* rows, const float* factors,
                    double* partial, double* sums, const float* tables, const uint8_t* bytes) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += table[i * WORDS];
    #pragma omp parallel if (total > 2 * SPAN)
    {
        // Every thread has about as many consecutive elements; a span is the thread's in whose part it begins.
        const int64_t threads = omp_get_num_threads(), self = omp_get_thread_num();
        const int64_t low = total * self / threads, high = total * (self + 1) / threads;
        int64_t begin = 0;
        for (int64_t i = 0; i < count && begin < high; ++i) {
            const int64_t* t = table + i * WORDS;
            if (begin + t[0] > low) {
                const float *row = rows + t[1] * (SCALARS), *c = factors + i * (FACTORS);
                const Scalars h = { MADE };
                for (int64_t n = low <= begin ? 0 : (low - begin + SPAN - 1) / SPAN;
                     n * SPAN < t[0] && begin + n * SPAN < high; ++n)
                    span(t, n * SPAN, h, partial + (t[2] + n) * TERMS, tables, bytes);
            }
            begin += t[0];
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        const int64_t* t = table + i * WORDS;
        for (int term = 0; term < TERMS; ++term) {
            double total = 0.0;
            for (int64_t n = t[2]; (n - t[2]) * SPAN < t[0]; ++n) total += partial[n * TERMS + term];
            sums[i * TERMS + term] = total;
        }
    }
}
"""
