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
from fos_compile.kernels.cute.contract import Tensor
from fos_compile.kernels.cute.filtered import Choice

ROWS = 4
"""Of a thread."""
FLOOR = filtered.FLOOR * 16
COLUMNS = tuple(half * 8 + (k & 1) * 4 + (k >> 1) for half in (0, 1) for k in range(4))
"""The column in the low half of each of the `column_words`; the one after the next is above it."""


class Tile(NamedTuple):
    """What the threads of a tile share."""

    scales: Any
    """E4M3 bytes of candidates 6 and 4."""
    shift: Any
    """Of `filtered.shift_of`."""
    six: filtered.Candidate
    four: filtered.Candidate


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
    scales, six, four = filtered.candidates(peak, tensor)
    return Tile(scales, filtered.shift_of(peak), six, four)


def errors(words: list[Any], tile: Tile, half_exponents: Any) -> tuple[Any, Any, Any]:
    """Squared errors of 6 and of 4 in units of y, and the squared norm, of a row of 16.

    `half_exponents` as for `filtered.adaptive`.
    """
    halves = filtered.float16_of(filtered.magnitudes(words), tile.shift)
    six, four = (
        [filtered.distance(pair, each, half_exponents) for pair in halves]
        for each in (tile.six, tile.four)
    )
    return filtered.total(six), filtered.total(four), filtered.total(halves)


def decide(tile: Tile, error6: Any, error4: Any, norm: Any) -> Choice:
    """The choice of `filtered.adaptive` for the sums of what a thread has."""
    for distance in (4, 8):
        error6, error4, norm = (
            ptx.add(each, ptx.shuffle_xor(each, distance)) for each in (error6, error4, norm)
        )
    return filtered.decide(tile.scales, tile.six, tile.four, (error6, error4), norm, FLOOR)


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
        for pair in zip(filtered.numbers(above), filtered.numbers(below), strict=True)
        for number in pair
    ]
    scaled = [ptx.fma(number, inverse, 0.0) for number in numbers]  # adding 0 makes -0 positive
    return [ptx.e2m1x8(*(scaled[i] for i in range(16) if i >> 1 & 1 == side)) for side in (0, 1)]


def _computed(upper: list[Any], lower: list[Any], inverse: Any, signs: Any) -> list[Any]:
    factor = ptx.mul(inverse, 2.0**filtered.CODE_SHIFT)
    bytes_ = [
        filtered.code(a, factor) + (filtered.code(b, factor) << 4)
        for above, below in zip(upper, lower, strict=True)
        for a, b in zip(filtered.numbers(above), filtered.numbers(below), strict=True)
    ]
    masks = zip(filtered.signs(upper), filtered.signs(lower), strict=True)
    return [
        filtered.low_bytes(bytes_[side::2]) | (above & signs) | (below & (signs << 4))
        for side, (above, below) in enumerate(masks)
    ]


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
