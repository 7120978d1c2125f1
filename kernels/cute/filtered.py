"""A block of 16 bf16 by an approximation that knows when it cannot tell: nearest, mse or static_6.

The bits are those of `contract`; blocks that are reported `near` must go through it. For mse the
errors of both candidates are evaluated on pairs of float16:

* The magnitudes are exact in float16 after a shift by a power of two that takes the block's
  largest exponent to 2^2: bfloat16 has 8 significant bits. What falls below 2^-14 is off by at most
  2^-15, 2^-14.3 in units of y.
* The factor r that takes them to y is rounded to float16; it is off by `rest`.
* Rounding to E2M1: adding M = 512, 1024 or 2048 in one multiply-add leaves a multiple of the step
  0.5, 1 or 2. The exponent of 2^-15 y tells which: where y < 2 it is a float16 subnormal's, 0.
  Near 2 and 4, where it may be one off, both steps round to the same number.
* The distance d = q - x r loses 2^-11 of itself in one rounding, which its square doubles, and a
  sum of squares 2^-11 in each of five roundings: 7 * 2^-11 = 0.342% of the sum S at most.
* The distance to the nearest grid point is 1-Lipschitz, so the true sum T obeys
  |sqrt S - sqrt T| <= b = |rest| |x|, the norm |x| from one more sum. By
  2 b sqrt S <= S/519 + 519 b^2 that is |S - T| <= S/519 + 520 b^2.

So BAND = 0.54% (0.342% + 1/519) of both errors and SLOPE b^2 of each separates them. Where they
are closer, or a scale is subnormal or saturated (y may exceed 6.9), the block is `near`: 2 to 3%
of the blocks of a Gaussian. FLOOR covers what is absolute in the above. The contract's own
roundings matter 1e-6 of an error as long as no square is subnormal: all of this holds for an amax
in `contract.MIDRANGE_AMAX`.

A second float16 for `rest` was tried: 16 instructions a block more, and blocks become near for
another reason, since q is then not nearest to what d is measured from (3.4% of a Gaussian's).
"""

from typing import Any, NamedTuple

from fos_compile.kernels.cute import conversions, pairs, ptx
from fos_compile.kernels.cute.contract import EXPONENT, MIDRANGE, Tensor

HALF_512 = 0x60006000
MAGNITUDES = 0x7FFF7FFF
BAND = 0.0054
SLOPE = 520.0
FLOOR = 2.0**-12
CODE_SHIFT = -21
"""y is scaled by 2^-21 so that (t >> 22) + t, t = y + M, holds the code in a clean low byte."""


class Choice(NamedTuple):
    """What the filter found out about a block."""

    inverse: Any
    """float32, 1 / (decode * scale) of the chosen candidate; 0 for a scale of 0."""
    scale: Any
    """The E4M3 byte."""
    near: Any
    """1 where only `contract` can tell, else 0."""


def magnitudes(words: list[Any]) -> list[Any]:
    """Packed bf16 without signs."""
    return [w & MAGNITUDES for w in words]


def peak_bits(mags: list[Any]) -> Any:
    """float32 pattern of the largest of 16 packed bf16 magnitudes; NaN is the largest."""
    top = mags
    while len(top) > 1:
        top = [ptx.max_u16x2(a, b) for a, b in zip(top[::2], top[1::2], strict=True)]
    both = top[0]
    return ptx.max_u32(both & ptx.u32(0xFFFF0000), both << 16)


def adaptive(mags: list[Any], tensor: Tensor, half_exponents: Any) -> Choice:
    """Choose between 4 and 6 by mse for packed bf16 magnitudes, or say `near`.

    `half_exponents` is 0x7C007C00 in a register that the assembler cannot see through: (z & mask) |
    512 is one instruction only if one of its constants is in a register.
    """
    peak = peak_bits(mags)
    scales = candidate_scales(peak, tensor)
    scale6, scale4 = ptx.widen(ptx.from_e4m3x2(scales))
    inverse6 = MIDRANGE.reciprocal(ptx.mul(tensor.decode, scale6))
    inverse4 = MIDRANGE.reciprocal(ptx.mul(tensor.decode, scale4))

    exponent = peak & EXPONENT
    shift = 17 * 128 - (exponent >> 16)  # of the bf16 patterns, to biased exponent 17
    shifted = [
        ptx.add_relu_s16x2(m, ptx.prmt(shift, shift, 0x1010)) << 3 for m in mags
    ]  # float16 patterns
    unshift = ptx.real(exponent - (2 << 23))
    error6, rest6 = _error(shifted, ptx.mul(inverse6, unshift), half_exponents)
    error4, rest4 = _error(shifted, ptx.mul(inverse4, unshift), half_exponents)
    norm = _total(shifted)

    square6, square4 = ptx.mul(scale6, scale6), ptx.mul(scale4, scale4)
    total6, total4 = ptx.mul(error6, square6), ptx.mul(error4, square4)
    gap = ptx.absolute(ptx.sub(total4, total6))
    drift = ptx.fma(ptx.mul(rest6, rest6), square6, ptx.mul(ptx.mul(rest4, rest4), square4))
    floor = ptx.fma(ptx.mul(norm, SLOPE), drift, ptx.mul(square4, FLOOR))
    band = ptx.fma(ptx.add(total6, total4), BAND, floor)
    clear = ptx.where_less(band, gap, 0, 1)
    byte6, byte4 = scales & 0xFF, scales >> 8
    # 6 subnormal (but not a block of zeros) or 4 saturated, as infinities and NaN are.
    odd = ptx.where_below(byte6, 8, 1, ptx.where_below(byte4, 0x7E, 0, 1))
    near = ptx.where_nonzero(byte4, clear | odd, 0)
    bits6, bits4 = ptx.bits(inverse6), ptx.bits(inverse4)
    return Choice(
        inverse=ptx.real(ptx.where_nonzero(byte4, ptx.where_less(total4, total6, bits4, bits6), 0)),
        scale=ptx.where_less(total4, total6, byte4, byte6),
        near=near,
    )


def single(mags: list[Any], tensor: Tensor) -> Choice:
    """The only candidate of static_6 for packed bf16 magnitudes, `near` where y may exceed 6.9."""
    peak = peak_bits(mags)
    s = ptx.mul(MIDRANGE.quotient(ptx.real(peak), 6.0), tensor.encode)
    byte = ptx.e4m3x2(s, s) & 0xFF
    inverse = MIDRANGE.reciprocal(ptx.mul(tensor.decode, ptx.widen(ptx.from_e4m3x2(byte))[0]))
    odd = ptx.where_below(byte, 8, 1, ptx.where_below(byte, 0x7E, 0, 1))
    return Choice(
        inverse=ptx.real(ptx.where_nonzero(byte, ptx.bits(inverse), 0)),
        scale=byte,
        near=ptx.where_nonzero(byte, odd, 0),
    )


def candidate_scales(peak: Any, tensor: Tensor) -> Any:
    """E4M3 bytes of candidates 6 (byte 0) and 4 (byte 1)."""
    s = ptx.mul(MIDRANGE.quotient(ptx.real(peak), 6.0), tensor.encode)
    return ptx.e4m3x2(s, ptx.mul(s, 1.5))


def _error(x: list[Any], r: Any, exponents: Any) -> tuple[Any, Any]:
    """Squared error of a candidate in units of y, and r minus its float16."""
    factor = ptx.half2(r, r)
    minus = ptx.hneg2(factor)
    tiny = ptx.hmul2(factor, ptx.u32(0x02000200))  # 2^-15 r
    distances = []
    for pair in x:
        magic = (ptx.hmul2(pair, tiny) & exponents) | HALF_512
        q = ptx.hsub2(ptx.hfma2(pair, factor, magic), magic)
        distances.append(ptx.hfma2(pair, minus, q))
    return _total(distances), ptx.sub(r, ptx.widen(factor)[0])


def _total(halves: list[Any]) -> Any:
    """Sum of the squares of 16 float16 in pairs, as float32."""
    sums = [ptx.hmul2(halves[0], halves[0]), ptx.hmul2(halves[1], halves[1])]
    for i, pair in enumerate(halves[2:]):
        sums[i % 2] = ptx.hfma2(pair, pair, sums[i % 2])
    low, high = ptx.widen(ptx.hadd2(sums[0], sums[1]))
    return ptx.add(low, high)


def without_negative_zeros(words: list[Any]) -> list[Any]:
    """Packed bf16 as `codes` needs them: the instruction takes care of -0 on its way."""
    if conversions.has_e2m1():
        return words
    return [ptx.clear_negative_zeros_bf16x2(word) for word in words]


def codes(words: list[Any], inverse: Any) -> tuple[Any, Any]:
    """Nearest E2M1 codes of 16 packed bf16, |x| * inverse at most 6.9: two words of nibbles.

    `words` are of `without_negative_zeros`. Signs survive an inverse of 0: the caller clears
    blocks of scale 0.
    """
    if conversions.has_e2m1():
        return _converted(words[:4], inverse), _converted(words[4:], inverse)
    factor = ptx.mul(inverse, 2.0**CODE_SHIFT)
    return _word(words[:4], factor), _word(words[4:], factor)


def _converted(words: list[Any], inverse: Any) -> Any:
    by, zero = pairs.twice(inverse), pairs.twice(0.0)
    # Adding 0 makes -0 positive, and nothing else.
    both = [(ptx.real(w << 16), ptx.real(w & ptx.u32(0xFFFF0000))) for w in words]
    return ptx.e2m1x8(*(y for pair in both for y in pairs.fma(pair, by, zero)))


def _word(words: list[Any], factor: Any) -> Any:
    pairs = []
    for w in words:
        even = _code(ptx.real(w << 16), factor)
        odd = _code(ptx.real(w & ptx.u32(0xFFFF0000)), factor)
        pairs.append(even + (odd << 4))
    low, high = ptx.prmt(pairs[0], pairs[1], 0x0040), ptx.prmt(pairs[2], pairs[3], 0x0040)
    word = ptx.prmt(low, high, 0x5410)
    # Selectors with bit 3 repeat the sign of a byte: 0xff where x < 0.
    left, right = ptx.prmt(words[0], words[1], 0xFBD9), ptx.prmt(words[2], words[3], 0xFBD9)
    evens, odds = ptx.prmt(left, right, 0x5410), ptx.prmt(left, right, 0x7632)
    return word | (evens & 0x08080808) | (odds & ptx.u32(0x80808080))


def _code(x: Any, factor: Any) -> Any:
    """A register whose low byte is the code of |x| * factor * 2^21."""
    y = ptx.absolute(ptx.mul(x, factor))
    binade = ptx.real(ptx.bits(ptx.maximum(y, 2.0**CODE_SHIFT)) & EXPONENT)
    t = ptx.bits(ptx.fma(binade, 2.0**22, y))
    return t + (t >> 22)
