"""The random Hadamard transform of groups of 16 float32 (docs/contract.md section 3)."""

from typing import Any

from fos_compile.kernels.cute import pairs, ptx

SIGNS = "+++-+------+-+--"


def rotate(values: list[Any], to_dtype: Any) -> list[Any]:
    """Random Hadamard transform of a thread's 16 float32, each result rounded by `to_dtype`."""
    v = [x if sign == "+" else ptx.negative(x) for x, sign in zip(values, SIGNS, strict=True)]
    for half in (1, 2, 4, 8):
        for i in range(0, 16, 2):
            if half == 1:
                v[i], v[i + 1] = ptx.add(v[i], v[i + 1]), ptx.sub(v[i], v[i + 1])
            elif not i & half:
                low, high = (v[i], v[i + 1]), (v[i + half], v[i + half + 1])
                v[i : i + 2], v[i + half : i + half + 2] = (
                    pairs.add(low, high),
                    pairs.sub(low, high),
                )
    quarter = pairs.twice(0.25)
    return [to_dtype(x) for pair in pairs.of(v) for x in pairs.mul(pair, quarter)]


def rotate_across(values: list[Any], to_dtype: Any) -> list[Any]:
    """The same for groups of 16 neighbouring threads, for each of the values of a thread."""
    lane = ptx.lane()
    minus = sum(1 << i for i, sign in enumerate(SIGNS) if sign == "-")
    flip = ((ptx.u32(minus) >> (lane & 15)) & 1) << 31
    rotated = []
    for value in values:
        v = ptx.real(ptx.bits(value) ^ flip)
        for half in (1, 2, 4, 8):
            other = ptx.shuffle_xor(v, half)
            # The upper of two threads takes other - v.
            upper = (lane & half) << (31 - half.bit_length() + 1)
            v = ptx.add(other, ptx.real(ptx.bits(v) ^ upper))
        rotated.append(to_dtype(ptx.mul(v, 0.25)))
    return rotated
