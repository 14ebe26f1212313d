"""Codes of a few bits for optimizer state: blocks of elements, each with the largest magnitude of its own.

A block is scaled to magnitudes of at most one; every element then becomes the code of the nearest value of a fixed map
(Dettmers et al., https://arxiv.org/abs/2110.02861). Formats:

- ``int8``, blocks of 256: the dynamic map. Seven decades from 1e-7 to 1, cut into 1, 2, 4, ... 64 equal cells, whose
  middles are the values; with 0 and 1, and for signed state with all but 1 also negative. Of state that is never
  negative each cell is cut in two.
- ``int4``, blocks of 128: of three decades likewise, with signs; or 1/16, 2/16, ... 1.
- ``fp8``, blocks of 256: the nearest float8_e4m3fn of 448 times the scaled value. State that is never negative has
  another exponent bit in place of the sign, down to 2^-32: in 4 bits small second moments would be zeros, which are
  divided by.

What lies in a cell gets its middle. So an element is off by half a cell at most, and every step is plain arithmetic, no
search in a table: the same bits in torch, compiled and in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .language import Rule, jit, rule, tl

__all__ = ["FORMATS", "LEAST", "PROGRAM", "Format", "decode_blocks", "encode_blocks", "format_of", "magnitude"]

LEAST = 2.0**-120
"""A block whose largest magnitude is below is zero: its inverse would overflow soon."""


@rule
def magnitude(x):
    """The bits of ``|x|``: ordered as the numbers are, NaN above all."""
    return tl.cast(x, tl.int32, bitcast=True) & 0x7FFFFFFF


@rule
def _cell7(y):
    """How many cells of seven decades lie below ``y >= 0``, and what part of its own: 0 to 128.

    Decades have twice the cells of the one below, so the number of cells is a concave function of ``y``: the least of
    the lines that continue each decade.
    """
    k = 0.8888888888888888 + 1111111.111111111 * y
    k = tl.minimum(k, 1.7777777777777777 + 222222.2222222222 * y)
    k = tl.minimum(k, 3.5555555555555554 + 44444.444444444445 * y)
    k = tl.minimum(k, 7.111111111111111 + 8888.888888888889 * y)
    k = tl.minimum(k, 14.222222222222221 + 1777.7777777777778 * y)
    k = tl.minimum(k, 28.444444444444443 + 355.55555555555554 * y)
    return tl.minimum(k, 56.888888888888886 + 71.11111111111111 * y)


@rule
def _value7(k):
    """The inverse of :func:`_cell7`, within 0 and 1."""
    y = 9e-07 * k - 8e-07
    y = tl.maximum(y, 4.5e-06 * k - 8e-06)
    y = tl.maximum(y, 2.25e-05 * k - 8e-05)
    y = tl.maximum(y, 0.0001125 * k - 0.0008)
    y = tl.maximum(y, 0.0005625 * k - 0.008)
    y = tl.maximum(y, 0.0028125 * k - 0.08)
    y = tl.maximum(y, 0.0140625 * k - 0.8)
    return tl.minimum(tl.maximum(y, 0.0), 1.0)


@rule
def _cell3(y):
    """As :func:`_cell7`, of three decades: 0 to 8."""
    k = tl.minimum(0.8888888888888888 + 111.1111111111111 * y, 1.7777777777777777 + 22.22222222222222 * y)
    return tl.minimum(k, 3.5555555555555554 + 4.444444444444445 * y)


@rule
def _value3(k):
    """The inverse of :func:`_cell3`."""
    y = tl.maximum(tl.maximum(0.009 * k - 0.008, 0.045 * k - 0.08), 0.225 * k - 0.8)
    return tl.minimum(tl.maximum(y, 0.0), 1.0)


@rule
def _signed8(y):
    k = tl.floor(_cell7(tl.abs(y)))
    return tl.maximum(127.0 + tl.where(y < 0, -k, k), 0.0)


@rule
def _signed8_value(code):
    k = code - 127.0
    y = _value7(tl.abs(k) + 0.5)
    return tl.where(k < 0, -y, y)


@rule
def _unsigned8(y):
    return tl.minimum(tl.maximum(tl.floor(2.0 * _cell7(y) - 1.0), 0.0), 255.0)


@rule
def _unsigned8_value(code):
    return _value7(0.5 * code + 0.75)


@rule
def _signed4(y):
    k = tl.floor(_cell3(tl.abs(y)))
    return tl.maximum(7.0 + tl.where(y < 0, -k, k), 0.0)


@rule
def _signed4_value(code):
    k = code - 7.0
    y = _value3(tl.abs(k) + 0.5)
    return tl.where(k < 0, -y, y)


@rule
def _unsigned4(y):
    return tl.minimum(tl.maximum(tl.floor(16.0 * y - 0.5), 0.0), 15.0)


@rule
def _unsigned4_value(code):
    return 0.0625 * code + 0.0625


@rule
def _float8(y):
    """The bits of the nearest float8_e4m3fn of ``448 y``, of two the even one."""
    x = 448.0 * y
    bits = tl.cast(tl.abs(x), tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = tl.cast(tl.abs(x) + 16384.0, tl.int32, bitcast=True) - 0x46800000  # multiples of 2^-9
    code = tl.where(tl.abs(x) < 0.015625, small, normal).to(tl.float32)
    return tl.where(y < 0, code + 128.0, code)


@rule
def _float8_value(code):
    negative = code >= 128.0
    k = tl.where(negative, code - 128.0, code)
    bits = k.to(tl.int32)
    normal = tl.cast((bits + (120 << 3)) << 20, tl.float32, bitcast=True)
    size = tl.where(k < 8.0, k * 0.001953125, normal) * 0.002232142857142857
    return tl.where(negative, -size, size)


@rule
def _unsigned_float8(y):
    """5 bits of exponent, 3 of mantissa: 255 is 1, and the others lie below as floating-point numbers do."""
    bits = tl.cast(y, tl.int32, bitcast=True)
    code = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 761
    return tl.minimum(tl.maximum(code.to(tl.float32), 0.0), 255.0)


@rule
def _unsigned_float8_value(code):
    value = tl.cast((code.to(tl.int32) + 761) << 20, tl.float32, bitcast=True)
    return tl.where(code > 0, value, 0.0)


@dataclass(frozen=True)
class Format:
    """How state is coded.

    Attributes:
        name: as users say it.
        signed: whether the state may be negative.
        bits: of a code: 8, or 4, of which a byte holds two.
        block: elements of a block.
        encode: rule: from a scaled element to its code, a whole number as float32.
        decode: rule: back.
    """

    name: str
    signed: bool
    bits: int
    block: int
    encode: Rule
    decode: Rule

    @property
    def width(self) -> int:
        """Bytes of the codes of a block."""
        return self.block * self.bits // 8

    def __reduce__(self) -> Any:  # its rules, which Triton compiles, can be neither copied nor pickled
        return format_of, (self.name, self.signed)


FORMATS: tuple[Format, ...] = (
    Format("int8", True, 8, 256, _signed8, _signed8_value),
    Format("int8", False, 8, 256, _unsigned8, _unsigned8_value),
    Format("fp8", True, 8, 256, _float8, _float8_value),
    Format("fp8", False, 8, 256, _unsigned_float8, _unsigned_float8_value),
    Format("int4", True, 4, 128, _signed4, _signed4_value),
    Format("int4", False, 4, 128, _unsigned4, _unsigned4_value),
)


def format_of(name: str, signed: bool) -> Format:
    """The format of a name for state that may be negative, or for state that is not."""
    return next(f for f in FORMATS if f.name == name and f.signed == signed)


PROGRAM = 8
"""Blocks of one program."""


@jit
def decode_blocks(
    codes, scales, out, count, DECODE: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """``out[i] = DECODE(codes[i]) * scales[i]`` for ``count`` blocks; with 4 bits, the low ones are the first half."""
    WIDTH: tl.constexpr = BLOCK * BITS // 8
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = block < count
    scale = tl.load(scales + block, mask=mask)
    code = tl.load(codes + block * WIDTH + column, mask=mask).to(tl.int32)
    if BITS == 8:
        tl.store(out + block * BLOCK + column, DECODE(code.to(tl.float32)) * scale, mask=mask)
    else:
        tl.store(out + block * BLOCK + column, DECODE((code & 15).to(tl.float32)) * scale, mask=mask)
        tl.store(out + block * BLOCK + WIDTH + column, DECODE((code >> 4).to(tl.float32)) * scale, mask=mask)


@jit
def encode_blocks(
    values,
    codes,
    scales,
    count,
    ENCODE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    KNOWN: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Codes of ``count`` blocks, and their scales, unless these are ``KNOWN``."""
    WIDTH: tl.constexpr = BLOCK * BITS // 8
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    mask = block < count
    at = block[:, None] * BLOCK + tl.arange(0, WIDTH)[None, :]
    low = tl.load(values + at, mask=mask[:, None], other=0.0)
    if BITS == 4:
        high = tl.load(values + at + WIDTH, mask=mask[:, None], other=0.0)
    if KNOWN:
        scale = tl.load(scales + block, mask=mask, other=0.0)
    else:
        largest = tl.max(magnitude(low), 1)
        if BITS == 4:
            largest = tl.maximum(largest, tl.max(magnitude(high), 1))
        scale = tl.cast(largest, tl.float32, bitcast=True)
        scale = tl.where(scale < LEAST, 0.0, tl.where(scale < float("inf"), scale, float("inf")))
        tl.store(scales + block, scale, mask=mask)
    inverse = tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)[:, None]
    code = ENCODE(low * inverse).to(tl.int32)
    if BITS == 4:
        code = code | (ENCODE(high * inverse).to(tl.int32) << 4)
    tl.store(codes + block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], code.to(tl.uint8), mask=mask[:, None])


def constexprs(code: Format, encode: bool, known: bool = False) -> dict[str, Any]:
    """The compile-time arguments of the two kernels."""
    fixed: dict[str, Any] = {"BITS": code.bits, "BLOCK": code.block, "BLOCKS": PROGRAM}
    if encode:
        return {"ENCODE": code.encode, **fixed, "KNOWN": known, "LEAST": LEAST}
    return {"DECODE": code.decode, **fixed}
