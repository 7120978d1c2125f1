"""What newer instructions do, by instructions of sm_80, under the names of their functions.

The same bits for what the kernels give them: scales are not negative, E5M2 is asked for numbers
that it has.
"""

from typing import Any

from fos_compile.kernels.cute import ptx, shared

INFINITY = 0x7F800000
E4M3_MIN_NORMAL = 121 << 23
"""Exponent of 2^-6 in float32."""


def e4m3x2(low: Any, high: Any) -> Any:
    """Two float32 from 0 up to nearest even E4M3, saturated at 448, in bytes 0 and 1."""
    return _e4m3(low) | (_e4m3(high) << 8)


def _e4m3(number: Any) -> Any:
    clipped = ptx.minimum(number, 448.0)
    exponent = ptx.max_u32(ptx.bits(clipped) & INFINITY, E4M3_MIN_NORMAL)
    # A sum with 2^20 times the binade is a multiple of an eighth of it: the count is its last bits,
    # 8 to 16 for normal numbers, to which each binade adds 8.
    count = ptx.bits(ptx.add(clipped, ptx.real(exponent + (20 << 23)))) & 0x1F
    code = count + ((exponent - E4M3_MIN_NORMAL) >> 20)
    magnitude = ptx.bits(number) & 0x7FFFFFFF
    return ptx.where_below(INFINITY, magnitude, 0x7F, code)


def from_e4m3x2(a: Any) -> Any:
    """E4M3 bytes 0 and 1 as two float16."""
    spread = ptx.prmt(a, 0, 0x1404)  # bytes 1 and 3
    magnitude = spread & 0x7F007F00
    # Float16 has one bit of exponent more, with a bias that is 8 larger.
    number = ptx.hmul2(magnitude >> 1, ptx.u32(0x5C005C00))
    nan = ptx.prmt(magnitude + 0x01000100, 0, 0xBB99) & 0x7FFF7FFF
    return number | nan | (spread & ptx.u32(0x80008000))


def e5m2x4(a: Any, b: Any, c: Any, d: Any) -> Any:
    """Four float32 that E5M2 has, in bytes 0 to 3: the upper halves of float16."""
    return ptx.prmt(ptx.half2(a, b), ptx.half2(c, d), 0x7531)


def max_u16x2(a: Any, b: Any) -> Any:
    """The larger of each half."""
    return ptx.prmt(ptx.max_u32(a << 16, b << 16), ptx.max_u32(a, b), 0x7632)


def add_relu_s16x2(a: Any, b: Any) -> Any:
    """max(a + b, 0) of each half, wrapping."""
    total = (a & 0x7FFF7FFF) + (b & 0x7FFF7FFF)  # no carry from half to half
    total = total ^ ((a ^ b) & ptx.u32(0x80008000))
    return total & ~ptx.prmt(total, 0, 0xBB99)  # the sign of a half in all of its bits


def clear_negative_zeros_bf16x2(a: Any) -> Any:
    """a * 1 + 0 of each half: -0 becomes +0, every other number stays."""
    return ptx.bf16_fma2(a, ptx.u32(0x3F803F80), ptx.u32(0))


def store_transposed(address: Any, words: list[Any]) -> None:
    """Four 8x8 matrices of 16 bits, transposed: lane 8 k + r has the address of row r of k."""
    lane = ptx.lane()
    for i, word in enumerate(words):
        for half in (0, 1):
            row = ptx.shuffle(address, (lane & 3) * 2 + (8 * i + half))
            shared.store_u16(row + (lane >> 2) * 2, word >> (16 * half))
