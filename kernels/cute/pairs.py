"""Two float32 at a time, in one instruction where there is one (`conversions.has_f32x2`).

A pair that is the result of one such instruction and an operand of another costs no moves; a
number that is in both places of a pair (`twice`) costs one, outside of loops where it is constant.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from fos_compile.kernels.cute import conversions, ptx

Pair = tuple[Any, Any]


def of(numbers: Sequence[Any]) -> Iterator[Pair]:
    """Neighbours, of an even number of them."""
    return zip(numbers[::2], numbers[1::2], strict=True)


def twice(a: Any) -> Pair:
    """A number in both places."""
    return a, a


def add(a: Pair, b: Pair) -> Pair:
    """a + b of each, one rounding."""
    if conversions.has_f32x2():
        return ptx.add_x2(a, b)
    return ptx.add(a[0], b[0]), ptx.add(a[1], b[1])


def sub(a: Pair, b: Pair) -> Pair:
    """a - b of each, one rounding."""
    if conversions.has_f32x2():
        return ptx.sub_x2(a, b)
    return ptx.sub(a[0], b[0]), ptx.sub(a[1], b[1])


def mul(a: Pair, b: Pair) -> Pair:
    """a * b of each, one rounding."""
    if conversions.has_f32x2():
        return ptx.mul_x2(a, b)
    return ptx.mul(a[0], b[0]), ptx.mul(a[1], b[1])


def fma(a: Pair, b: Pair, c: Pair) -> Pair:
    """a * b + c of each, one rounding."""
    if conversions.has_f32x2():
        return ptx.fma_x2(a, b, c)
    return ptx.fma(a[0], b[0], c[0]), ptx.fma(a[1], b[1], c[1])
