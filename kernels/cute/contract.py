"""Any block to FP4 as docs/contract.md says, operation by operation: what fast paths must equal.

A thread has a whole block of 16 numbers (nvfp4) or 32 (mxfp4); of a 2D tile it has one column, and
the 16 threads of the tile are neighbours in a warp. About 20 instructions an element for each
candidate scale.
"""

from typing import Any, NamedTuple

import cutlass
from cutlass import Uint32, cute

from fos_compile.kernels import formats
from fos_compile.kernels.cute import conversions, pairs, ptx

EXPONENT = 0x7F800000
FLOAT32_MAX = 3.4028234663852886e38
AMAX_MIN = 2.0**-116
HARDWARE = "stochastic_hardware"


class Rules(NamedTuple):
    """Static options of a quantization."""

    format: str = "nvfp4"
    scale_rule: str = "mse"
    rounding: str = "nearest"
    block: str = "1d"

    @property
    def adaptive(self) -> bool:
        """Whether there are two candidates."""
        return self.scale_rule in formats.ADAPTIVE_RULES

    @property
    def qs(self) -> float:
        """Divisor of the tensor scale."""
        return formats.qs_of(self.format, self.scale_rule, self.rounding)

    @property
    def value_max(self) -> float:
        """What the largest magnitude of a block maps to."""
        return formats.value_max(self.scale_rule, self.rounding)


class Tensor(NamedTuple):
    """What is common to all blocks of a tensor."""

    amax: Any
    encode: Any
    """qs / amax."""
    decode: Any
    """1 / encode."""


class Division(NamedTuple):
    """How to divide: by IEEE instructions, or faster where nothing is subnormal."""

    quotient: Any
    """Of a number and a constant."""
    quotients: Any
    """Of a pair of numbers and a constant."""
    reciprocal: Any


def _markstein(a: Any, divisor: float) -> Any:
    reciprocal = 1.0 / divisor
    q = ptx.mul(a, reciprocal)
    return ptx.fma(ptx.fma(q, -divisor, a), reciprocal, q)


def _marksteins(a: pairs.Pair, divisor: float) -> pairs.Pair:
    reciprocal = pairs.twice(1.0 / divisor)
    q = pairs.mul(a, reciprocal)
    return pairs.fma(pairs.fma(q, pairs.twice(-divisor), a), reciprocal, q)


def _newton(t: Any) -> Any:
    r = ptx.rcp_approx(t)
    return ptx.fma(r, ptx.fma(ptx.negative(t), r, 1.0), r)


IEEE = Division(
    quotient=lambda a, b: ptx.div(a, b),
    quotients=lambda a, b: (ptx.div(a[0], b), ptx.div(a[1], b)),
    reciprocal=lambda t: ptx.rcp(t),
)
"""Correctly rounded everywhere."""
MIDRANGE = Division(quotient=_markstein, quotients=_marksteins, reciprocal=_newton)
"""The same bits where arguments, results, remainders are normal: for an amax in MIDRANGE_AMAX."""
MIDRANGE_AMAX = (2.0**-40, 2.0**60)


def tensor_of(amax: Any, qs: float) -> Tensor:
    """Constants of a tensor, once a thread."""
    encode = ptx.div(qs, amax)
    return Tensor(amax, encode, ptx.rcp(encode))


def outside_midrange(tensor: Tensor) -> Any:
    """1 where only `IEEE` divides right, else 0; the same for all threads."""
    least, most = MIDRANGE_AMAX
    return ptx.where_less(tensor.amax, least, 1, ptx.where_less(tensor.amax, most, 0, 1))


@cute.jit
def quantize_either(
    values: list[Any],
    tensor: Tensor,
    rules: cutlass.Constexpr,
    dice: list[Any] | None,
    outside: Uint32,
) -> tuple[list[Any], Any]:
    """`quantize` for nvfp4 with the divisions that `outside` asks for."""
    words, scale = [Uint32(0), Uint32(0)], Uint32(0)
    if outside != 0:
        words, scale = quantize(values, tensor, rules, dice, IEEE)
    else:
        words, scale = quantize(values, tensor, rules, dice, MIDRANGE)
    return words, scale


def quantize(
    values: list[Any], tensor: Tensor, rules: Rules, dice: Any, by: Division = IEEE
) -> tuple[list[Any], Any]:
    """Codes of a block, eight nibbles a word, and its scale byte.

    Args:
        values: float32, 16 or 32, signed, as the quantizer reads them (after RHT); for a 2D tile
            the 16 numbers of this thread's column.
        tensor: of `tensor_of`; unused for mxfp4.
        rules: static options.
        dice: offsets u in (0, 1), an element each, or a function that makes them when they are
            needed; None for nearest. For stochastic_hardware random words, one for each four
            elements of a row; of a 2D tile those of this thread's row, whose codes are returned.
        by: how to divide.
    """
    if callable(dice) and rules.rounding == "stochastic_realized":
        dice = dice()
    mags = [ptx.absolute(value) for value in values]
    peak = mags[0]
    for mag in mags[1:]:
        peak = ptx.max_nan(peak, mag)
    if rules.block == "2d":
        for distance in (8, 4, 2, 1):
            peak = ptx.max_nan(peak, ptx.shuffle_xor(peak, distance))
    if rules.format == "mxfp4":
        scale, inverse = _mxfp4(peak, rules)
        live, nan_scale, worst = scale, 0xFF, ptx.bits(peak)
        shown = 1
    else:
        scale, inverse = _nvfp4(mags, peak, tensor, rules, dice, by)
        # Amax may be static, so the block itself decides too.
        nan_scale = 0x7F
        worst = ptx.max_u32(ptx.bits(peak), ptx.bits(tensor.amax) & 0x7FFFFFFF)
        live = ptx.where_less(tensor.amax, AMAX_MIN, 0, scale)
        shown = live
    finite = ptx.where_below(worst, EXPONENT, 1, 0)
    shown = ptx.where_nonzero(finite, shown, 0)
    words = [
        ptx.where_nonzero(shown, word, 0)
        for word in _codes(values, inverse, dice() if callable(dice) else dice, rules)
    ]
    return words, ptx.where_nonzero(finite, live, nan_scale)


def _codes(values: list[Any], inverse: Any, dice: list[Any] | None, rules: Rules) -> list[Any]:
    """Eight nibbles a word."""
    words = []
    if dice is None and conversions.has_e2m1():
        scaled = _scaled(values, inverse)
        return [ptx.e2m1x8(*scaled[start : start + 8]) for start in range(0, len(values), 8)]
    if dice is not None and rules.rounding == HARDWARE:
        return _hardware_codes(_scaled(values, inverse), dice, rules.block)
    magnitudes = _round([ptx.mul(ptx.absolute(value), inverse) for value in values], dice)
    for start in range(0, len(values), 8):
        word = ptx.u32(0)
        for i in range(8):
            code = _encode(magnitudes[start + i])
            sign = ptx.where_less(values[start + i], 0.0, 8, 0)
            word = word | ((code | sign) << (4 * i))
        words.append(word)
    return words


def _scaled(values: list[Any], inverse: Any) -> list[Any]:
    """With their signs, except that -0 becomes 0: by adding 0, which changes nothing else."""
    by, zero = pairs.twice(inverse), pairs.twice(0.0)
    return [y for pair in pairs.of(values) for y in pairs.fma(pair, by, zero)]


def _hardware_codes(scaled: list[Any], random: list[Any], block: str) -> list[Any]:
    """The instruction takes four neighbours of a row, of which threads of a tile have one each."""
    if block == "2d":
        scaled = [ptx.real(word) for word in transpose_bits([ptx.bits(y) for y in scaled], 32)]
    return [
        ptx.e2m1x8_stochastic(*scaled[4 * i : 4 * i + 8], *random[i : i + 2])
        for i in range(0, len(random), 2)
    ]


def _mxfp4(peak: Any, rules: Rules) -> tuple[Any, Any]:
    """Scale byte and what to multiply by."""
    share = ptx.bits(ptx.div(peak, rules.value_max))
    byte = (share >> 23) + ptx.where_nonzero(share & 0x7FFFFF, 1, 0)
    byte = ptx.where_below(ptx.bits(peak), EXPONENT, byte, 0)
    return byte, ptx.real((ptx.u32(254) - byte) << 23)


def _nvfp4(
    mags: list[Any],
    peak: Any,
    tensor: Tensor,
    rules: Rules,
    dice: list[Any] | None,
    by: Division,
) -> tuple[Any, Any]:
    """Scale byte and what to multiply by."""
    s = ptx.mul(by.quotient(peak, rules.value_max), tensor.encode)
    bytes_ = ptx.e4m3x2(s, ptx.mul(s, 1.5))
    scale6, scale4 = ptx.widen(ptx.from_e4m3x2(bytes_))
    inverse6 = _inverse(scale6, tensor, by)
    if not rules.adaptive:
        return bytes_ & 0xFF, inverse6
    inverse4 = _inverse(scale4, tensor, by)
    error6 = _error(mags, scale6, inverse6, tensor, rules, dice, by)
    error4 = _error(mags, scale4, inverse4, tensor, rules, dice, by)
    inverse = ptx.real(ptx.where_less(error4, error6, ptx.bits(inverse4), ptx.bits(inverse6)))
    byte = ptx.where_less(error4, error6, bytes_ >> 8, bytes_ & 0xFF)
    # Rounding again costs less than keeping both candidates in registers.
    return byte, inverse


def _inverse(scale: Any, tensor: Tensor, by: Division) -> Any:
    inverse = ptx.minimum(by.reciprocal(ptx.mul(tensor.decode, scale)), FLOAT32_MAX)
    return ptx.real(ptx.where_nonzero(ptx.bits(scale), ptx.bits(inverse), 0))


def _error(
    mags: list[Any],
    scale: Any,
    inverse: Any,
    tensor: Tensor,
    rules: Rules,
    dice: list[Any] | None,
    by: Division,
) -> Any:
    """Error of a candidate over the block (docs/contract.md section 4)."""
    if rules.rounding in ("nearest", "stochastic_realized"):
        return _combine(_realized(mags, scale, inverse, tensor, rules, dice, by), rules)
    # One at a time: with pairs `quantize_staged` spills 64 bytes on sm_100a.
    terms = [_expected(ptx.mul(mag, inverse), rules.scale_rule) for mag in mags]
    error = _combine(terms, rules)
    error = ptx.mul(error, ptx.mul(scale, scale) if rules.scale_rule == "mse" else scale)
    return ptx.real(ptx.where_nonzero(ptx.bits(scale), ptx.bits(error), EXPONENT))


def _realized(
    mags: list[Any],
    scale: Any,
    inverse: Any,
    tensor: Tensor,
    rules: Rules,
    dice: list[Any] | None,
    by: Division,
) -> list[Any]:
    """What each element adds to the realized error."""
    terms: list[Any] = []
    for i, pair in enumerate(pairs.of(mags)):
        ys = pairs.mul(pair, pairs.twice(inverse))
        q = _round(ys, None if dice is None else dice[2 * i : 2 * i + 2])
        v = pairs.mul(pairs.mul(q, pairs.twice(scale)), pairs.twice(tensor.amax))
        d = pairs.sub(by.quotients(v, rules.qs), pair)
        terms += pairs.mul(d, d) if rules.scale_rule == "mse" else map(ptx.absolute, d)
    return terms


def _round(ys: Any, dice: list[Any] | None) -> Any:
    """Scaled magnitudes, an even number, to E2M1 magnitudes, saturating at 6."""
    if dice is None:
        if conversions.has_e2m1():
            return [q for pair in pairs.of(ys) for q in ptx.widen(ptx.through_e2m1x2(*pair))]
        return [_nearest(y) for y in ys]
    rounded = []
    for y, u in zip(ys, dice, strict=True):
        y = ptx.minimum(y, 6.0)
        step, inverse = _steps(y)
        whole = ptx.floor(ptx.add(ptx.mul(y, inverse), u))
        rounded.append(ptx.minimum(ptx.mul(whole, step), 6.0))
    return rounded


def _nearest(y: Any) -> Any:
    magic = ptx.mul(_binade(y), 2.0**22)
    return ptx.minimum(ptx.sub(ptx.add(y, magic), magic), 6.0)


def _binade(y: Any) -> Any:
    """1, 2 or 4 for y below 2, 4 or 8; for y from 6 on 4 or more, which rounds to 6 or more."""
    return ptx.real(ptx.bits(ptx.minimum(ptx.maximum(y, 1.0), 6.0)) & EXPONENT)


def _steps(y: Any) -> tuple[Any, Any]:
    """Step of the binade of y <= 6: 0.5, 1 or 2, and 1 / step."""
    binade = _binade(y)
    return ptx.mul(binade, 0.5), ptx.real(ptx.u32(EXPONENT) - ptx.bits(binade))


def _expected(y: Any, rule: str) -> Any:
    """Expected error of one element, in units of y, whatever the dice."""
    over = ptx.maximum(ptx.sub(y, 6.0), 0.0)
    a = ptx.minimum(y, 6.0)
    step, inverse = _steps(a)
    low = ptx.mul(ptx.floor(ptx.mul(a, inverse)), step)
    down, up = ptx.sub(a, low), ptx.sub(ptx.add(low, step), a)
    if rule == "abs_max":
        grid = ptx.bits(down) & 0x7FFFFFFF
        apart = ptx.bits(ptx.maximum(down, up))
        return ptx.real(ptx.where_nonzero(grid, apart, ptx.bits(over)))
    product = ptx.mul(down, up)
    if rule == "mse":
        return ptx.add(product, ptx.mul(over, over))
    return ptx.add(ptx.mul(product, ptx.mul(inverse, 2.0)), over)


def _combine(terms: list[Any], rules: Rules) -> Any:
    if rules.scale_rule == "abs_max":
        most = terms[0]
        for term in terms[1:]:
            most = ptx.maximum(most, term)
        if rules.block == "2d":
            for distance in (8, 4, 2, 1):
                most = ptx.maximum(most, ptx.shuffle_xor(most, distance))
        return most
    if rules.block == "1d":
        return _left_to_right([ptx.add(a, b) for a, b in zip(terms[:8], terms[8:], strict=True)])
    # Element (r, c) is in chunk r / 2, accumulator 2 (r % 2) + c / 8, lane c % 8.
    even, odd = _left_to_right(terms[0::2]), _left_to_right(terms[1::2])
    near, far = ptx.lane() & ptx.u32(0xFFFFFFF7), ptx.lane() | 8
    accumulators = [ptx.shuffle(each, at) for each in (even, odd) for at in (near, far)]
    total = _left_to_right(accumulators)
    first = ptx.lane() & 16
    return _left_to_right([ptx.shuffle(total, first + i) for i in range(8)])


def _left_to_right(terms: list[Any]) -> Any:
    total = terms[0]
    for term in terms[1:]:
        total = ptx.add(total, term)
    return total


def _encode(q: Any) -> Any:
    """E2M1 magnitude as float32 to its code 0-7.

    Adding 2^22 binades leaves q / step in the lowest bits; every binade adds 2 to that.
    """
    q = ptx.mul(q, 2.0**-21)
    binade = ptx.real(ptx.bits(ptx.maximum(q, 2.0**-21)) & EXPONENT)
    t = ptx.bits(ptx.fma(binade, 2.0**22, q))
    # With this exponent t >> 22 is twice the binade's plus 256.
    return (t + (t >> 22)) & 7


def transpose_bits(words: list[Any], width: int) -> list[Any]:
    """Transpose a 16x16 matrix of `width` bits held one row a thread by 16 neighbouring threads.

    Args:
        words: a row, 16 * width bits, lowest first: 2 words of nibbles, 4 of bytes or 16.
        width: 4, 8 or 32.
    """
    lane = ptx.lane()
    for half in (8, 4, 2, 1):
        bits_ = half * width
        upper = lane & half
        if bits_ >= 32:  # whole words change places
            apart, new = bits_ // 32, list(words)
            for i in range(len(words)):
                if not i & apart:
                    low, high = words[i], words[i + apart]
                    got = ptx.shuffle_xor(ptx.where_nonzero(upper, low, high), half)
                    new[i] = ptx.where_nonzero(upper, got, low)
                    new[i + apart] = ptx.where_nonzero(upper, high, got)
            words = new
            continue
        keep = sum(((1 << bits_) - 1) << at for at in range(0, 32, 2 * bits_))
        lower_keep, upper_keep = ptx.u32(keep), ptx.u32(keep ^ 0xFFFFFFFF)
        mine = ptx.where_nonzero(upper, upper_keep, lower_keep)
        new = []
        for word in words:
            other = ptx.shuffle_xor(word, half)
            moved = ptx.where_nonzero(upper, other >> bits_, other << bits_)
            new.append((word & mine) | (moved & ~mine))
        words = new
    return words
