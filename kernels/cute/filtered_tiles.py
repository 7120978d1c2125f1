"""A 2D tile of 16x16 bf16 by four threads: `filtered` for tiles, and codes in both orientations.

A thread has four rows of the tile below each other; the four threads differ in bits 2 and 3 of
their lane. What `filtered` says about 16 elements holds for 256: all of a tile is scaled by the
tile's largest exponent. Only 16 at a time are summed in float16; the sums of rows are widened and
added in float32, which adds 2^-19 to the bound of 7 * 2^-11, and every thread of the tile ends with
the same bits. `filtered.BAND` has room for that; `filtered.FLOOR` is per 16 elements.

Codes are made in pairs of rows: a byte holds those of one column, the upper row in its low nibble.
That is half way to either orientation (`row_words`, `column_words`).
"""

from typing import Any, NamedTuple

from fos_compile.kernels.cute import conversions, filtered, ptx
from fos_compile.kernels.cute.contract import EXPONENT, MIDRANGE, Tensor
from fos_compile.kernels.cute.filtered import Choice

ROWS = 4
"""Of a thread."""
FLOOR = filtered.FLOOR * 16
COLUMNS = tuple(half * 8 + (k & 1) * 4 + (k >> 1) for half in (0, 1) for k in range(4))
"""The column in the low half of each of the `column_words`; the one after the next is above it."""


class Candidate(NamedTuple):
    """A scale of a tile."""

    inverse: Any
    """float32, 1 / (decode * scale)."""
    square: Any
    """Of the scale."""
    factor: Any
    """Two float16: from what `magnitudes` gives to y."""
    tiny: Any
    """2^-15 of that."""
    rest: Any
    """What the factor is off by."""


class Tile(NamedTuple):
    """What the threads of a tile share."""

    scales: Any
    """E4M3 bytes of candidates 6 and 4."""
    shift: Any
    """Of the bf16 patterns, in both halves."""
    six: Candidate
    four: Candidate


def top(rows: list[list[Any]]) -> Any:
    """float32 pattern of the largest magnitude of a tile; NaN is the largest."""
    most, *others = [word & filtered.MAGNITUDES for row in rows for word in row]
    for word in others:  # one after the other, since an instruction takes the largest of three
        most = ptx.max_u16x2(most, word)
    for distance in (4, 8):
        most = ptx.max_u16x2(most, ptx.shuffle_xor(most, distance))
    return filtered.peak_bits([most])


def tile_of(peak: Any, tensor: Tensor) -> Tile:
    """Both candidates of the tile with this largest magnitude."""
    scales = filtered.candidate_scales(peak, tensor)
    scale6, scale4 = ptx.widen(ptx.from_e4m3x2(scales))
    exponent = peak & EXPONENT
    shift = 17 * 128 - (exponent >> 16)  # to biased exponent 17
    unshift = ptx.real(exponent - (2 << 23))
    return Tile(
        scales=scales,
        shift=ptx.prmt(shift, shift, 0x1010),
        six=_candidate(scale6, unshift, tensor),
        four=_candidate(scale4, unshift, tensor),
    )


def _candidate(scale: Any, unshift: Any, tensor: Tensor) -> Candidate:
    inverse = MIDRANGE.reciprocal(ptx.mul(tensor.decode, scale))
    r = ptx.mul(inverse, unshift)
    factor = ptx.half2(r, r)
    return Candidate(
        inverse=inverse,
        square=ptx.mul(scale, scale),
        factor=factor,
        tiny=ptx.hmul2(factor, ptx.u32(0x02000200)),
        rest=ptx.sub(r, ptx.widen(factor)[0]),
    )


def errors(words: list[Any], tile: Tile, half_exponents: Any) -> tuple[Any, Any, Any]:
    """Squared errors of 6 and of 4 in units of y, and the squared norm, of a row of 16.

    `half_exponents` as for `filtered.adaptive`.
    """
    shifted = [
        ptx.add_relu_s16x2(word & filtered.MAGNITUDES, tile.shift) << 3 for word in words
    ]  # float16 patterns
    six = [_distance(x, tile.six, half_exponents) for x in shifted]
    four = [_distance(x, tile.four, half_exponents) for x in shifted]
    return _total(six), _total(four), _total(shifted)


def _distance(x: Any, candidate: Candidate, exponents: Any) -> Any:
    magic = (ptx.hmul2(x, candidate.tiny) & exponents) | filtered.HALF_512
    q = ptx.hsub2(ptx.hfma2(x, candidate.factor, magic), magic)
    return ptx.hfma2(x, ptx.hneg2(candidate.factor), q)


def _total(halves: list[Any]) -> Any:
    """Sum of the squares of 16 float16 in pairs, as float32: five roundings."""
    sums = [ptx.hmul2(halves[0], halves[0]), ptx.hmul2(halves[1], halves[1])]
    for i, pair in enumerate(halves[2:]):
        sums[i % 2] = ptx.hfma2(pair, pair, sums[i % 2])
    low, high = ptx.widen(ptx.hadd2(sums[0], sums[1]))
    return ptx.add(low, high)


def decide(tile: Tile, error6: Any, error4: Any, norm: Any) -> Choice:
    """The choice of `filtered.adaptive` for the sums of what a thread has."""
    for distance in (4, 8):
        error6, error4, norm = (
            ptx.add(each, ptx.shuffle_xor(each, distance)) for each in (error6, error4, norm)
        )
    six, four = tile.six, tile.four
    total6, total4 = ptx.mul(error6, six.square), ptx.mul(error4, four.square)
    gap = ptx.absolute(ptx.sub(total4, total6))
    drift = ptx.fma(
        ptx.mul(six.rest, six.rest),
        six.square,
        ptx.mul(ptx.mul(four.rest, four.rest), four.square),
    )
    floor = ptx.fma(ptx.mul(norm, filtered.SLOPE), drift, ptx.mul(four.square, FLOOR))
    band = ptx.fma(ptx.add(total6, total4), filtered.BAND, floor)
    clear = ptx.where_less(band, gap, 0, 1)
    byte6, byte4 = tile.scales & 0xFF, tile.scales >> 8
    # 6 subnormal (but not a tile of zeros) or 4 saturated, as infinities and NaN are.
    odd = ptx.where_below(byte6, 8, 1, ptx.where_below(byte4, 0x7E, 0, 1))
    inverse = ptx.where_less(total4, total6, ptx.bits(four.inverse), ptx.bits(six.inverse))
    return Choice(
        inverse=ptx.real(ptx.where_nonzero(byte4, inverse, 0)),
        scale=ptx.where_less(total4, total6, byte4, byte6),
        near=ptx.where_nonzero(byte4, clear | odd, 0),
    )


def single(peak: Any, tensor: Tensor) -> Choice:
    """The choice of `filtered.single` for the tile with this largest magnitude."""
    return filtered.single([peak], tensor)  # a pair of which one is 0


def signs_of(choice: Choice) -> Any:
    """Mask of the sign bits in low nibbles; none in a tile of scale 0, where every code is 0."""
    return ptx.where_nonzero(choice.scale, 0x08080808, 0)


def codes(upper: list[Any], lower: list[Any], inverse: Any, signs: Any) -> list[Any]:
    """Codes of two rows of 16 packed bf16, |x| * inverse at most 6.9.

    The rows are of `filtered.without_negative_zeros`.

    Returns:
        Four words of bytes, a byte a column: columns 0, 2, 4, 6, then 1, 3, 5, 7, then the same
        of the other eight.
    """
    make = _converted if conversions.has_e2m1() else _computed
    return [
        word for half in (0, 4) for word in make(upper[half:][:4], lower[half:][:4], inverse, signs)
    ]


def _converted(upper: list[Any], lower: list[Any], inverse: Any, _signs: Any) -> list[Any]:
    """Eight columns by an instruction; an inverse of 0 leaves no sign."""
    numbers = [
        number
        for above, below in zip(upper, lower, strict=True)
        for pair in zip(_numbers(above), _numbers(below), strict=True)
        for number in pair
    ]
    scaled = [ptx.fma(number, inverse, 0.0) for number in numbers]  # adding 0 makes -0 positive
    return [ptx.e2m1x8(*(scaled[i] for i in range(16) if i >> 1 & 1 == side)) for side in (0, 1)]


def _computed(upper: list[Any], lower: list[Any], inverse: Any, signs: Any) -> list[Any]:
    factor = ptx.mul(inverse, 2.0**filtered.CODE_SHIFT)
    bytes_ = [
        _code(a, factor) + (_code(b, factor) << 4)
        for above, below in zip(upper, lower, strict=True)
        for a, b in zip(_numbers(above), _numbers(below), strict=True)
    ]
    masks = zip(_negative(upper), _negative(lower), strict=True)
    return [
        _gather(bytes_[side::2]) | (above & signs) | (below & (signs << 4))
        for side, (above, below) in enumerate(masks)
    ]


def _numbers(word: Any) -> tuple[Any, Any]:
    return ptx.real(word << 16), ptx.real(word & ptx.u32(0xFFFF0000))


def _code(x: Any, factor: Any) -> Any:
    """A register whose low byte is the code of |x|; see `filtered.CODE_SHIFT`."""
    y = ptx.absolute(ptx.mul(x, factor))
    binade = ptx.real(ptx.bits(ptx.maximum(y, 2.0**filtered.CODE_SHIFT)) & EXPONENT)
    t = ptx.bits(ptx.fma(binade, 2.0**22, y))
    return t + (t >> 22)


def _gather(registers: list[Any]) -> Any:
    """The low bytes of four registers."""
    a, b, c, d = registers
    return ptx.prmt(ptx.prmt(a, b, 0x0040), ptx.prmt(c, d, 0x0040), 0x5410)


def _negative(words: list[Any]) -> tuple[Any, Any]:
    """Bytes of 0xff where an even column of four words is negative, and the same of odd ones."""
    # Selectors with bit 3 repeat the sign of a byte.
    left, right = ptx.prmt(words[0], words[1], 0xFBD9), ptx.prmt(words[2], words[3], 0xFBD9)
    return ptx.prmt(left, right, 0x5410), ptx.prmt(left, right, 0x7632)


def row_words(codes: list[Any]) -> tuple[list[Any], list[Any]]:
    """The two words of the upper row of `codes`, and of the lower one."""
    upper, lower = [], []
    for even, odd in zip(codes[::2], codes[1::2], strict=True):
        upper.append((even & 0x0F0F0F0F) | ((odd << 4) & ptx.u32(0xF0F0F0F0)))
        lower.append(((even >> 4) & 0x0F0F0F0F) | (odd & ptx.u32(0xF0F0F0F0)))
    return upper, lower


def column_words(upper: list[Any], lower: list[Any]) -> list[Any]:
    """Eight words of two columns each from the `codes` of rows 0 and 1 and of rows 2 and 3.

    A half holds the four rows of a column; which one: `COLUMNS`.
    """
    return [
        ptx.prmt(upper[i], lower[i], selector) for i in range(4) for selector in (0x5140, 0x7362)
    ]
