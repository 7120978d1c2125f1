"""A block of 16 bf16 by an approximation that knows when it cannot tell: stochastic rounding.

As `filtered`, for the expected error of mse (docs/contract.md section 4), which below 6 is
g(y) = (y - low)(high - y), above (y - 6)^2. With d the distance to the nearest grid point and s the
step that is |d| (s - |d|): |d| may err by much where y is halfway between two, but there g is flat.
In units of y, with f the float16 of the factor r, `rest` = r - f, N the sum of the squares of x and
y' = x f:

* Roundings of d, s - |d| and of five sums: 7 * 2^-11 of the error at most.
* g is Lipschitz with the step, at most sqrt(1/4 + y^2/4), so y' costs at most the sum of
  |rest| x sqrt(1/4 + y^2/4) <= |rest| / r * sqrt(A (4 + A/4)), A = r^2 N (Cauchy), which is below
  |rest| / r * (0.5015 A + 3.71) (its tangent). x is scaled so that its largest is below 2 and goes
  to at least 32/9 (candidate 4 of unbiased rounding, its scale rounded up by 1/16), so 1 / r is at
  most 9/16: |rest| (0.5015 r N + 2.09).
* The step: y' within 2^-10 below 2 or 4 is taken for what lies above. That is off by 2^-11 and
  2^-10 an element, of which there are at most 16 and whose squares are part of A. The most that a
  linear program allows is 0.0052 + 4.1e-5 A.
* Magnitudes below 2^-14 in float16 (units of x) are off by 2^-15: 0.0017 for 16 of them.

All of these times the square of the scale.
"""

from typing import Any

from fos_compile.kernels.cute import contract, filtered, ptx
from fos_compile.kernels.cute.contract import EXPONENT, MIDRANGE, Tensor
from fos_compile.kernels.cute.filtered import HALF_512, MAGNITUDES, Choice

BAND = 0.00345
DRIFT, DRIFT_FLOOR = 0.505, 2.1
STEP, FLOOR = 4.2e-5, 0.0072
MINUS_6 = 0xC600C600
HALF_2_TO_MINUS_10 = 0x14001400
FLOAT_2_23 = 0x4B000000
UNBIASED = "stochastic_unbiased"


def choose(mags: list[Any], tensor: Tensor, rules: contract.Rules, half_exponents: Any) -> Choice:
    """The candidate of mse or static_6 for packed bf16 magnitudes, or `near`.

    Args:
        mags: eight words of `filtered.magnitudes`.
        tensor: of `contract.tensor_of` with the `qs` of the rules.
        rules: mse or static_6, rounding stochastic or stochastic_unbiased, 1d.
        half_exponents: see `filtered.adaptive`.
    """
    if not rules.adaptive:
        return filtered.single(mags, tensor, rules.value_max)
    peak = filtered.peak_bits(mags)
    scales = filtered.candidate_scales(peak, tensor, rules.value_max)
    scale6, scale4 = ptx.widen(ptx.from_e4m3x2(scales))
    inverse6 = MIDRANGE.reciprocal(ptx.mul(tensor.decode, scale6))
    inverse4 = MIDRANGE.reciprocal(ptx.mul(tensor.decode, scale4))

    x = filtered.float16_of(mags, filtered.shift_of(peak, 15))
    tiny = [ptx.hmul2(pair, ptx.u32(filtered.HALF_2_TO_MINUS_15)) for pair in x]
    norm = filtered.total(x)
    unshift = ptx.real(peak & EXPONENT)
    # Only candidate 6 exceeds 6: by the rounding of its scale, which unbiased rounding forestalls.
    over = rules.rounding != UNBIASED
    r6, r4 = ptx.mul(inverse6, unshift), ptx.mul(inverse4, unshift)
    error6, bound6 = _error(x, tiny, r6, norm, half_exponents, over=over)
    error4, bound4 = _error(x, tiny, r4, norm, half_exponents, over=False)

    square6, square4 = ptx.mul(scale6, scale6), ptx.mul(scale4, scale4)
    total6, total4 = ptx.mul(error6, square6), ptx.mul(error4, square4)
    gap = ptx.absolute(ptx.sub(total4, total6))
    band = ptx.fma(bound6, square6, ptx.mul(bound4, square4))
    unclear = ptx.where_less(band, gap, 0, 1)
    return filtered.chosen(scales, (inverse6, inverse4), (total6, total4), unclear)


def _error(
    x: list[Any], tiny: list[Any], r: Any, norm: Any, exponents: Any, *, over: bool
) -> tuple[Any, Any]:
    """Expected error of a candidate in units of y, and by how much that may be off."""
    factor = ptx.half2(r, r)
    minus = ptx.hneg2(factor)
    sums: list[Any] = [None, None]
    beyond: list[Any] = [None, None]
    for i, pair in enumerate(x):
        # The exponent of 2^-15 y tells the step, see `filtered._error`.
        magic = (ptx.hmul2(tiny[i], factor) & exponents) | HALF_512
        q = ptx.hsub2(ptx.hfma2(pair, factor, magic), magic)
        d = ptx.hfma2(pair, minus, q) & MAGNITUDES
        if over:
            excess = ptx.hfma2_relu(pair, factor, ptx.u32(MINUS_6))
            d = ptx.hsub2(d, excess)  # 0 above 6, where q is 6
            beyond[i % 2] = _add_product(excess, excess, beyond[i % 2])
        up = ptx.hfma2(magic, ptx.u32(HALF_2_TO_MINUS_10), ptx.hneg2(d))
        sums[i % 2] = _add_product(d, up, sums[i % 2])
    error = _widened(sums)
    if over:
        error = ptx.add(error, _widened(beyond))
    rest = ptx.absolute(ptx.sub(r, ptx.widen(factor)[0]))
    length = ptx.mul(r, norm)
    drift = ptx.mul(rest, ptx.fma(length, DRIFT, DRIFT_FLOOR))
    floor = ptx.fma(ptx.mul(length, r), STEP, FLOOR)
    return error, ptx.fma(error, BAND, ptx.add(drift, floor))


def _add_product(a: Any, b: Any, total: Any) -> Any:
    return ptx.hmul2(a, b) if total is None else ptx.hfma2(a, b, total)


def _widened(sums: list[Any]) -> Any:
    low, high = ptx.widen(ptx.hadd2(sums[0], sums[1]))
    return ptx.add(low, high)


def codes(words: list[Any], inverse: Any, dice: list[Any]) -> tuple[Any, Any]:
    """Stochastically rounded E2M1 codes of 16 packed bf16: two words of nibbles.

    Args:
        words: packed bf16 without -0.
        inverse: float32, |x| * inverse at most 6.9; signs survive 0, so the caller clears blocks
            of scale 0.
        dice: the four words of `random_bits.philox`.
    """
    factor = ptx.mul(inverse, 2.0**-15)
    return _word(words[:4], factor, dice[:2]), _word(words[4:], factor, dice[2:])


def _word(words: list[Any], factor: Any, dice: list[Any]) -> Any:
    evens, odds = [], []
    for i, (even, odd) in enumerate(map(filtered.numbers, words)):
        evens.append(_magnitude(even, factor, dice[i // 2], 2 * i % 4))
        odds.append(_magnitude(odd, factor, dice[i // 2], (2 * i + 1) % 4))
    # A magnitude times 2^-14 is twice its code as E5M2: below 2^-14 steps are equal, and from
    # there on each binade has four.
    word = (ptx.e5m2x4(*evens) >> 1) + (ptx.e5m2x4(*odds) << 3)
    # 8, of a y above 6 with unlucky dice, has code 8: one too many.
    word = word - ((word & ptx.u32(0x88888888)) >> 3)
    return filtered.with_signs(word, words)


def _magnitude(x: Any, factor: Any, dice: Any, byte: int) -> Any:
    """2^-14 times the magnitude that |x| * factor * 2^15 becomes by `byte` of `dice`: up to 8."""
    y = ptx.absolute(ptx.mul(x, factor))
    binade = ptx.bits(ptx.maximum(y, 2.0**-15)) & EXPONENT  # half a step
    # (byte + 1/2) / 256 from the float 2^23 + byte: exact.
    big = ptx.real(ptx.prmt(dice, ptx.u32(FLOAT_2_23), 0x7650 | byte))
    u = ptx.fma(big, 1 / 256, 1 / 512 - 2.0**15)
    # The exponents of y / step and of its factor add up to 255 for any power of two in y.
    z = ptx.fma(y, ptx.real(ptx.u32(EXPONENT) - binade), u)
    whole = ptx.sub(ptx.add_down(z, 2.0**23), 2.0**23)
    return ptx.mul(whole, ptx.real(binade))
