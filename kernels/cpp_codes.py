"""Codes of one block in C++: to numbers and back.

The arithmetic is the rules' of :mod:`.codes`, traced; decoding looks up what they computed of each code. Bits are
those of every other backend.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from .codes import FORMATS, LEAST, Format, _cell7
from .cpp import as_cpp
from .language import as_torch

__all__ = ["codes_source", "decoding", "encoding", "number_of", "tables"]

_NUMBERS = {(code.name, code.signed): i for i, code in enumerate(FORMATS)}

_BLOCKS = """
#ifdef __AVX512F__
// Sixteen entries in each register; of each pair the low five bits of a code choose one, then its high bits a pair.
template <int ENTRIES>
static inline F look_up(const float* table, I code) {
    F found[ENTRIES / 32 + 1];
    for (int j = 0; j < ENTRIES; j += 32) {
        const __m512 low = _mm512_loadu_ps(table + j), high = _mm512_loadu_ps(table + j + 16);
        found[j / 32] = (F)_mm512_permutex2var_ps(low, (__m512i)code, high);
    }
    for (int width = ENTRIES / 64, bit = 32; width; width /= 2, bit *= 2) {
        const __mmask16 upper = _mm512_test_epi32_mask((__m512i)code, _mm512_set1_epi32(bit));
        for (int j = 0; j < width; ++j)
            found[j] = (F)_mm512_mask_mov_ps((__m512)found[2 * j], upper, (__m512)found[2 * j + 1]);
    }
    return found[0];
}
#else
template <int ENTRIES>
static inline F look_up(const float* table, I code) { return table[code]; }
#endif

#ifdef __AVX512VBMI__
// Each byte of the floats is looked up for 64 codes at once, in such an order that what is put together lies in order.
static inline void decode_64(const uint8_t* codes, float* out, const uint8_t* bytes, __m512 scale) {
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i code = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
    const __mmask64 upper = _mm512_movepi8_mask(code);
    __m512i part[4];
    for (int k = 0; k < 4; ++k) {
        __m512i table[4];
        for (int j = 0; j < 4; ++j) table[j] = _mm512_loadu_si512(bytes + 256 * k + 64 * j);
        const __m512i low = _mm512_permutex2var_epi8(table[0], code, table[1]);
        part[k] = _mm512_mask_mov_epi8(low, upper, _mm512_permutex2var_epi8(table[2], code, table[3]));
    }
    const __m512i first = _mm512_unpacklo_epi8(part[0], part[1]), second = _mm512_unpacklo_epi8(part[2], part[3]);
    const __m512i third = _mm512_unpackhi_epi8(part[0], part[1]), fourth = _mm512_unpackhi_epi8(part[2], part[3]);
    const __m512i found[4] = {_mm512_unpacklo_epi16(first, second), _mm512_unpackhi_epi16(first, second),
                              _mm512_unpacklo_epi16(third, fourth), _mm512_unpackhi_epi16(third, fourth)};
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(out + 16 * j, _mm512_mul_ps(_mm512_castsi512_ps(found[j]), scale));
}
#endif

template <int BITS, int BLOCK>
static void decode_block(const uint8_t* __restrict codes, float largest, float* __restrict out, const float* table,
                         const uint8_t* bytes) {
    constexpr int WIDTH = BLOCK * BITS / 8;
    const F scale = real(largest);
#ifdef __AVX512VBMI__
    if constexpr (BITS == 8 && BLOCK % 64 == 0) {
        for (int j = 0; j < WIDTH; j += 64) decode_64(codes + j, out + j, bytes, (__m512)scale);
        return;
    }
#endif
    for (int j = 0; j < WIDTH; j += LANES) {
        const I code = load_bytes(codes + j);
        if constexpr (BITS == 8) {
            store(out + j, look_up<256>(table, code) * scale);
        } else {
            store(out + j, look_up<32>(table, code & whole(15)) * scale);
            store(out + j + WIDTH, look_up<32>(table, code >> 4) * scale);
        }
    }
}

template <int BITS, int BLOCK, F CODE(F)>
static void encode_block(const float* __restrict x, uint8_t* __restrict codes, float* largest, bool known) {
    constexpr int WIDTH = BLOCK * BITS / 8;
    if (!known) {  // as bits: ordered as the numbers are, NaN above all
        int32_t most = 0;
        for (int j = 0; j < BLOCK; ++j) {
            int32_t bits;
            std::memcpy(&bits, x + j, 4);
            bits &= 0x7FFFFFFF;
            most = most > bits ? most : bits;
        }
        most = most < 0x7F800000 ? most : 0x7F800000;
        float scale;
        std::memcpy(&scale, &most, 4);
        *largest = scale < LEAST ? 0.0f : scale;
    }
    const float scale = *largest;
    const F inverse = real(scale > 0.0f ? 1.0f / scale : 0.0f);
    for (int j = 0; j < WIDTH; j += LANES) {
        I code = whole(CODE(load(x + j) * inverse));
        if constexpr (BITS == 4) code = code + (whole(CODE(load(x + j + WIDTH) * inverse)) << 4);
        store_bytes(codes + j, code);
    }
}
"""

_OCTAVES = """
#ifdef __AVX512F__
// In an octave at most two of the seven lines are the least anywhere: they are looked up, and the lesser taken.
static inline F cell7(F y) {
    I octave = (as_int(y) >> 23) - whole(107);
    octave = octave < whole(0) ? whole(0) : octave;
    const F lower = look_up<32>(OFFSETS[0], octave) + look_up<32>(SLOPES[0], octave) * y;
    const F upper = look_up<32>(OFFSETS[1], octave) + look_up<32>(SLOPES[1], octave) * y;
    return least(lower, upper);
}
#else
"""


def _octaves() -> str:
    """The lines of ``_cell7`` by octaves from 2^-20 to 1, below the first as in it: that of either end of each."""
    ends = [[2.0**i for i in range(-20, 12)], [2.0**i * (2 - 2**-20) for i in range(-20, 12)]]
    lines = [[sum(10.0**decade <= y for decade in range(-6, 0)) for y in each] for each in ends]

    def table(name: str, value: Callable[[int], float]) -> str:
        rows = ", ".join("{" + ", ".join(f"(float){value(i)!r}" for i in row) + "}" for row in lines)
        return f"static const float {name}[2][32] = {{{rows}}};\n"

    tables = table("OFFSETS", lambda i: 8 / 9 * 2**i) + table("SLOPES", lambda i: 1e7 / 9 / 5**i)
    return f"{tables}{_OCTAVES}{as_cpp(_cell7, 'cell7')}#endif\n"


def codes_source() -> str:
    """The functions that :func:`encoding` and :func:`decoding` call."""
    functions = (as_cpp(code.encode, f"code{i}", {_cell7: "cell7"}) for i, code in enumerate(FORMATS))
    return f"static const float LEAST = (float){LEAST!r};\n{_BLOCKS}{_octaves()}{''.join(functions)}"


def number_of(code: Format) -> int:
    """The number of a format in C++."""
    return _NUMBERS[code.name, code.signed]


def encoding(code: Format, numbers: str, codes: str, scale: str, known: str = "false") -> str:
    """A call that codes one block.

    Args:
        code: the format.
        numbers, codes, scale: pointers to them, as C++.
        known: whether the scale is given.
    """
    return f"encode_block<{code.bits}, {code.block}, code{number_of(code)}>({numbers}, {codes}, {scale}, {known})"


def decoding(code: Format, codes: str, scale: str, numbers: str) -> str:
    """A call that writes the numbers of one block; ``tables`` and ``bytes`` are :func:`tables`."""
    i = number_of(code)
    looked_up = f"tables + {256 * i}, bytes + {1024 * i}"
    return f"decode_block<{code.bits}, {code.block}>({codes}, {scale}, {numbers}, {looked_up})"


@functools.cache
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.zeros(len(FORMATS), 256, dtype=torch.float32, device="cpu")
    for table, code in zip(values, FORMATS, strict=True):
        count = 2**code.bits
        table[:count] = as_torch(code.decode)(torch.arange(count, dtype=torch.float32, device="cpu"))
    return values, values.view(torch.uint8).view(len(FORMATS), 256, 4).mT.contiguous()


def tables() -> list[ctypes.c_void_p]:
    """The numbers of all codes at scale one: as floats, and each byte of them apart."""
    return [ctypes.c_void_p(each.data_ptr()) for each in _tables()]
