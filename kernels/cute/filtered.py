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
HALF_2_TO_MINUS_15 = 0x02000200
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
    scales, six, four = candidates(peak, tensor)
    halves = float16_of(mags, shift_of(peak))
    error6, error4 = (
        total([distance(pair, each, half_exponents) for pair in halves]) for each in (six, four)
    )
    return decide(scales, six, four, (error6, error4), total(halves), FLOOR)


class Candidate(NamedTuple):
    """A scale of a block."""

    inverse: Any
    """float32, 1 / (decode * scale)."""
    square: Any
    """Of the scale."""
    factor: Any
    """Two float16: from what `float16_of` gives to y."""
    tiny: Any
    """2^-15 of that: its products tell the step."""
    rest: Any
    """What the factor is off by."""


def candidates(peak: Any, tensor: Tensor) -> tuple[Any, Candidate, Candidate]:
    """E4M3 bytes as of `candidate_scales`, candidate 6 and candidate 4."""
    scales = candidate_scales(peak, tensor)
    scale6, scale4 = ptx.widen(ptx.from_e4m3x2(scales))
    unshift = ptx.real((peak & EXPONENT) - (2 << 23))
    return scales, _candidate(scale6, unshift, tensor), _candidate(scale4, unshift, tensor)


def _candidate(scale: Any, unshift: Any, tensor: Tensor) -> Candidate:
    inverse = MIDRANGE.reciprocal(ptx.mul(tensor.decode, scale))
    r = ptx.mul(inverse, unshift)
    factor = ptx.half2(r, r)
    return Candidate(
        inverse=inverse,
        square=ptx.mul(scale, scale),
        factor=factor,
        tiny=ptx.hmul2(factor, ptx.u32(HALF_2_TO_MINUS_15)),
        rest=ptx.sub(r, ptx.widen(factor)[0]),
    )


def shift_of(peak: Any, exponent: int = 17) -> Any:
    """What takes the pattern of the largest bf16 to this biased exponent, in both halves."""
    shift = exponent * 128 - ((peak & EXPONENT) >> 16)
    return ptx.prmt(shift, shift, 0x1010)


def float16_of(mags: list[Any], shift: Any) -> list[Any]:
    """Packed bf16 magnitudes as float16, times the power of two that `shift` stands for."""
    return [ptx.add_relu_s16x2(mag, shift) << 3 for mag in mags]


def decide(
    scales: Any, six: Candidate, four: Candidate, errors: tuple[Any, Any], norm: Any, least: float
) -> Choice:
    """The candidate with the smaller error, unless those are closer than what they are off by.

    Args:
        scales: E4M3 bytes of both.
        six, four: of `candidates`.
        errors: theirs, in units of y.
        norm: sum of the squares of what `float16_of` gave.
        least: FLOOR for every 16 elements.
    """
    total6, total4 = ptx.mul(errors[0], six.square), ptx.mul(errors[1], four.square)
    gap = ptx.absolute(ptx.sub(total4, total6))
    drift = ptx.fma(
        ptx.mul(six.rest, six.rest),
        six.square,
        ptx.mul(ptx.mul(four.rest, four.rest), four.square),
    )
    floor = ptx.fma(ptx.mul(norm, SLOPE), drift, ptx.mul(four.square, least))
    band = ptx.fma(ptx.add(total6, total4), BAND, floor)
    unclear = ptx.where_less(band, gap, 0, 1)
    return chosen(scales, (six.inverse, four.inverse), (total6, total4), unclear)


def chosen(scales: Any, inverses: tuple[Any, Any], totals: tuple[Any, Any], unclear: Any) -> Choice:
    """The candidate with the smaller error.

    Args:
        scales: of `candidate_scales`.
        inverses: of candidates 6 and 4.
        totals: their errors.
        unclear: 1 where those are too close.
    """
    byte6, byte4 = scales & 0xFF, scales >> 8
    total6, total4 = totals
    # 6 subnormal (but not a block of zeros) or 4 saturated, as infinities and NaN are.
    odd = ptx.where_below(byte6, 8, 1, ptx.where_below(byte4, 0x7E, 0, 1))
    inverse = ptx.where_less(total4, total6, ptx.bits(inverses[1]), ptx.bits(inverses[0]))
    return Choice(
        inverse=ptx.real(ptx.where_nonzero(byte4, inverse, 0)),
        scale=ptx.where_less(total4, total6, byte4, byte6),
        near=ptx.where_nonzero(byte4, unclear | odd, 0),
    )


def single(mags: list[Any], tensor: Tensor, value_max: float = 6.0) -> Choice:
    """The only candidate of static_6 for packed bf16 magnitudes, `near` where y may exceed 6.9."""
    byte = candidate_scales(peak_bits(mags), tensor, value_max) & 0xFF
    inverse = MIDRANGE.reciprocal(ptx.mul(tensor.decode, ptx.widen(ptx.from_e4m3x2(byte))[0]))
    odd = ptx.where_below(byte, 8, 1, ptx.where_below(byte, 0x7E, 0, 1))
    return Choice(
        inverse=ptx.real(ptx.where_nonzero(byte, ptx.bits(inverse), 0)),
        scale=byte,
        near=ptx.where_nonzero(byte, odd, 0),
    )


def candidate_scales(peak: Any, tensor: Tensor, value_max: float = 6.0) -> Any:
    """E4M3 bytes of candidates 6 (byte 0) and 4 (byte 1); `value_max` is that of the rules."""
    s = ptx.mul(MIDRANGE.quotient(ptx.real(peak), value_max), tensor.encode)
    return ptx.e4m3x2(s, ptx.mul(s, 1.5))


def distance(pair: Any, candidate: Candidate, exponents: Any) -> Any:
    """From y of two float16 to the nearest E2M1 numbers."""
    magic = (ptx.hmul2(pair, candidate.tiny) & exponents) | HALF_512
    q = ptx.hsub2(ptx.hfma2(pair, candidate.factor, magic), magic)
    return ptx.hfma2(pair, ptx.hneg2(candidate.factor), q)


def total(halves: list[Any]) -> Any:
    """Sum of the squares of 16 float16 in pairs, as float32: five roundings."""
    sums = [ptx.hmul2(halves[0], halves[0]), ptx.hmul2(halves[1], halves[1])]
    for i, pair in enumerate(halves[2:]):
        sums[i % 2] = ptx.hfma2(pair, pair, sums[i % 2])
    low, high = ptx.widen(ptx.hadd2(sums[0], sums[1]))
    return ptx.add(low, high)


def numbers(word: Any) -> tuple[Any, Any]:
    """Two packed bf16 as float32."""
    return ptx.real(word << 16), ptx.real(word & ptx.u32(0xFFFF0000))


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
    return ptx.e2m1x8(*(y for word in words for y in pairs.fma(numbers(word), by, zero)))


def _word(words: list[Any], factor: Any) -> Any:
    bytes_ = []
    for even, odd in map(numbers, words):
        bytes_.append(code(even, factor) + (code(odd, factor) << 4))
    return with_signs(low_bytes(bytes_), words)


def code(x: Any, factor: Any) -> Any:
    """A register whose low byte is the code of |x| * factor * 2^21."""
    y = ptx.absolute(ptx.mul(x, factor))
    binade = ptx.real(ptx.bits(ptx.maximum(y, 2.0**CODE_SHIFT)) & EXPONENT)
    t = ptx.bits(ptx.fma(binade, 2.0**22, y))
    return t + (t >> 22)


def low_bytes(registers: list[Any]) -> Any:
    """Those of four registers in one."""
    a, b, c, d = registers
    return ptx.prmt(ptx.prmt(a, b, 0x0040), ptx.prmt(c, d, 0x0040), 0x5410)


def signs(words: list[Any]) -> tuple[Any, Any]:
    """Bytes of 0xff where the even numbers of four words are negative, and the odd ones."""
    # Selectors with bit 3 repeat the sign of a byte.
    left, right = ptx.prmt(words[0], words[1], 0xFBD9), ptx.prmt(words[2], words[3], 0xFBD9)
    return ptx.prmt(left, right, 0x5410), ptx.prmt(left, right, 0x7632)


def with_signs(codes: Any, words: list[Any]) -> Any:
    """Eight nibbles with the signs of four words of packed bf16."""
    evens, odds = signs(words)
    return codes | (evens & 0x08080808) | (odds & ptx.u32(0x80808080))
