"""Independent scalar oracle of docs/contract.md in numpy; imports nothing of the package.

Written for the eye: one block at a time, grids searched instead of bit tricks, Python integers
for Philox. Every float32 operation is one numpy operation: nothing is contracted or reordered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

F = np.float32
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m * 2.0**-9 for m in range(8)]
E4M3 += [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)]
E4M3 = E4M3[:127]
SIGNS = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
STOCHASTIC = (
    "stochastic",
    "stochastic_realized",
    "stochastic_unbiased",
    "stochastic_hardware",
)
EXPECTED = ("stochastic", "stochastic_unbiased", "stochastic_hardware")
"""Those that choose between 4 and 6 by the expected error."""
HARDWARE_BITS = (
    (*range(23, 15, -1), *range(7, -1, -1)),
    (*range(8), *range(16, 24)),
    (*range(31, 23, -1), *range(15, 7, -1)),
    (*range(8, 16), *range(24, 32)),
)
"""Which bits of a word, most significant first, each of its four elements takes."""
FOUR_OVER_SIX = ("mse", "mae", "abs_max")


@dataclass(frozen=True, kw_only=True)
class Options:
    """One row of the option table of docs/contract.md."""

    dtype: str = "bfloat16"
    format: str = "nvfp4"
    scale_rule: str = "mse"
    rounding: str = "nearest"
    block: str = "1d"
    rht: bool = False
    transpose: bool = False
    seed: int = 0
    stream: int = 0

    @property
    def width(self) -> int:
        return 32 if self.format == "mxfp4" else 16

    @property
    def shrink(self) -> float:
        return 16 / 17 if self.rounding == "stochastic_unbiased" else 1.0

    @property
    def q(self) -> np.float32:
        return F((4 if self.scale_rule == "static_4" else 6) * self.shrink)

    @property
    def qs(self) -> np.float32:
        if self.format == "mxfp4":
            return F(1)
        peak = 256 if self.scale_rule in FOUR_OVER_SIX else 448
        return F((4 if self.scale_rule == "static_4" else 6) * peak * self.shrink)


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values rounded to `dtype`, still stored as float32."""
    if dtype == "float16":
        return x.astype(np.float16).astype(F)
    if dtype == "float32":
        return x.astype(F)
    bits = x.astype(F).view(np.uint32).astype(np.uint64)
    half = np.uint64(16)
    rounded = ((bits + 0x7FFF + ((bits >> half) & np.uint64(1))) >> half) << half
    out = rounded.astype(np.uint32).view(F)
    return np.where(np.isnan(x), F(np.nan), out)


def nearest_even(value: float, grid: list[float]) -> int:
    """Index of the grid point nearest to `value` >= 0, ties to the even index, saturating."""
    # Far above the grid all distances would round to the same number.
    distance = [abs(min(float(value), grid[-1]) - g) for g in grid]
    best = min(distance)
    hits = [i for i, d in enumerate(distance) if d == best]
    return hits[0] if len(hits) == 1 else next(i for i in hits if i % 2 == 0)


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox-4x32-10 (Salmon et al., SC 2011): four 32-bit words."""
    c, (k0, k1), mask = list(counter), key, 0xFFFFFFFF
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & mask, (p0 >> 32) ^ c[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c


def hardware_offset(word: int, element: int) -> Fraction:
    """What cvt.rs.satfinite.e2m1x4 adds to one of four elements, in steps."""
    bits = "".join(str(word >> bit & 1) for bit in HARDWARE_BITS[element])
    return Fraction(int(bits, 2), 2**16)


def group_dice(group: int, opt: Options) -> list[np.float32] | list[Fraction]:
    seed = opt.seed & 0xFFFFFFFFFFFFFFFF
    counter = (group & 0xFFFFFFFF, group >> 32, opt.stream, 0)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    if opt.rounding == "stochastic_hardware":
        return [hardware_offset(words[i // 4], i % 4) for i in range(16)]
    rolls = [(words[i // 4] >> (8 * (i % 4))) & 0xFF for i in range(16)]
    return list((np.array(rolls, F) + F(0.5)) / F(256))


def hadamard16(x: np.ndarray, dtype: str) -> np.ndarray:
    """Rows of 16: signs, float32 butterfly with distances 1, 2, 4, 8, times 1/4, one rounding."""
    v = x * np.array(SIGNS, F)
    for h in (1, 2, 4, 8):
        out = v.copy()
        for i in range(16):
            out[..., i] = v[..., i] + v[..., i + h] if not i & h else v[..., i - h] - v[..., i]
        v = out
    return round_to(v * F(0.25), dtype)


def ordered_sum(t: np.ndarray) -> np.float32:
    """16: a_j = t_j + t_{j+8}, then left to right. 256: 8 chunks, 4 accumulators, 8 lanes."""
    if t.size == 16:
        lanes = [F(t[j] + t[j + 8]) for j in range(8)]
    else:
        c = t.reshape(8, 4, 8)
        running = c[0]
        for i in range(1, 8):
            running = running + c[i]
        lanes = list(((running[0] + running[1]) + running[2]) + running[3])
    total = lanes[0]
    for lane in lanes[1:]:
        total = F(total + lane)
    return total


Dice = list[np.float32] | list[Fraction] | None


def round_e2m1(a: np.ndarray, u: Dice) -> list[int]:
    """Codes 0..7 of magnitudes `a`; with `u`, floor(a / step + u) steps: exactly for fractions."""
    if u is None:
        return [nearest_even(v, E2M1) for v in a]
    codes = []
    for v, dice in zip(a, u, strict=True):
        v = min(v, F(6))
        step = F(0.5) if v < 2 else F(1) if v < 4 else F(2)
        share = F(v / step)
        total = Fraction(float(share)) + dice if isinstance(dice, Fraction) else F(share + dice)
        codes.append(E2M1.index(min(float(math.floor(total) * step), 6.0)))
    return codes


def realized_error(
    codes: list[int], ax: np.ndarray, scale: float, amax: np.float32, opt: Options
) -> np.float32:
    q = np.array([E2M1[c] for c in codes], F)
    diff = np.abs(((q * F(scale)) * amax) / opt.qs - ax)
    if opt.scale_rule == "abs_max":
        return diff.max()
    return ordered_sum(diff * diff if opt.scale_rule == "mse" else diff)


def expected_error(a: np.ndarray, scale: float, opt: Options) -> np.float32:
    if scale == 0:
        return F(np.inf)
    terms = []
    for v in a:
        if v >= 6:
            over = F(v - F(6))
            terms.append(F(over * over) if opt.scale_rule == "mse" else over)
            continue
        step = F(0.5) if v < 2 else F(1) if v < 4 else F(2)
        lo = F(np.floor(v / step) * step)
        down, up = F(v - lo), F(F(lo + step) - v)
        if opt.scale_rule == "abs_max":
            terms.append(max(down, up) if down else F(0))
        else:
            weight = F(F(2) / step) if opt.scale_rule == "mae" else F(1)
            terms.append(F(F(down * up) * weight))
    if opt.scale_rule == "abs_max":
        return F(max(terms) * F(scale))
    factor = F(F(scale) * F(scale)) if opt.scale_rule == "mse" else F(scale)
    return F(ordered_sum(np.array(terms, F)) * factor)


def candidate(
    x: np.ndarray, scale_code: int, enc: np.float32, u: Dice
) -> tuple[np.ndarray, list[int]]:
    """Scaled magnitudes and E2M1 magnitude codes of one block under one E4M3 scale."""
    scale = F(E4M3[scale_code])
    if scale == 0:
        return np.zeros_like(x), [0] * x.size
    a = np.abs(x) * min(F(1) / ((F(1) / enc) * scale), np.finfo(F).max)
    return a, round_e2m1(a, u)


def quantize_block(x: np.ndarray, amax: np.float32, u: Dice, opt: Options) -> tuple[list[int], int]:
    """One block (16, 32 or a flattened 16x16 tile): 4-bit codes and the scale byte."""
    zeros = [0] * x.size
    if not np.isfinite(x).all() or (opt.format == "nvfp4" and not np.isfinite(amax)):
        return zeros, 0xFF if opt.format == "mxfp4" else 0x7F
    blockmax = np.abs(x).max()
    if opt.format == "mxfp4":
        bits = int(F(blockmax / opt.q).view(np.uint32))
        byte = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
        picked = round_e2m1((np.abs(x).astype(np.float64) / 2.0 ** (byte - 127)).astype(F), u)
    elif amax < 2.0**-116:
        return zeros, 0
    else:
        enc = opt.qs / amax
        s = (blockmax / opt.q) * enc
        byte = nearest_even(min(s, F(448)), E4M3)
        a, picked = candidate(x, byte, enc, u)
        if opt.scale_rule in FOUR_OVER_SIX:
            byte4 = nearest_even(min(F(s * F(1.5)), F(448)), E4M3)
            a4, picked4 = candidate(x, byte4, enc, u)
            if opt.rounding in EXPECTED:
                e6, e4 = expected_error(a, E4M3[byte], opt), expected_error(a4, E4M3[byte4], opt)
            else:
                e6 = realized_error(picked, np.abs(x), E4M3[byte], amax, opt)
                e4 = realized_error(picked4, np.abs(x), E4M3[byte4], amax, opt)
            if e4 < e6:
                byte, picked = byte4, picked4
        if byte == 0:
            return zeros, 0
    return [c | (8 if v < 0 else 0) for c, v in zip(picked, x, strict=True)], byte


def prepare(x: np.ndarray, opt: Options) -> np.ndarray:
    """[R, C] float32 -> transposed, zero-padded to P columns, rotated [R', P] float32."""
    x = x.T if opt.transpose else x
    step = 4 * opt.width
    out = np.zeros((x.shape[0], -(-x.shape[1] // step) * step), F)
    out[:, : x.shape[1]] = x
    return hadamard16(out.reshape(-1, 16), opt.dtype).reshape(out.shape) if opt.rht else out


def tensor_amax(matrices: list[np.ndarray], opt: Options) -> np.float32:
    """Largest magnitude of all prepared matrices; NaN wins; 0 when there is no element."""
    if opt.format == "mxfp4":
        return F(1)
    peaks = [np.abs(prepare(m, opt)).max() for m in matrices if m.size]
    return F(np.max(peaks)) if peaks else F(0)


def block_layout(scales: np.ndarray) -> np.ndarray:
    """Row-major [R, G] bytes -> 1-D 128x4 blocked, rows padded to 128 with zeros."""
    rows, groups = scales.shape
    out = np.zeros(-(-rows // 128) * 128 * groups, np.uint8)
    for m in range(rows):
        for g in range(groups):
            tile = m // 128 * (groups // 4) + g // 4
            out[tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + g % 4] = scales[m, g]
    return out


def quantize(
    x: np.ndarray, amax: np.float32, opt: Options, first_row: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """[R, C] float32 -> packed values [R', P/2] and row-major scale bytes [R', P/width]."""
    p = prepare(x, opt)
    rows, cols = p.shape
    width, height = (16, 16) if opt.block == "2d" else (opt.width, 1)
    padded = np.zeros((-(-rows // height) * height, cols), F)
    padded[:rows] = p
    codes = np.zeros(padded.shape, np.uint8)
    scales = np.zeros((padded.shape[0], cols // opt.width), np.uint8)
    for r in range(0, padded.shape[0], height):
        for c in range(0, cols, width):
            u = None
            if opt.rounding in STOCHASTIC:
                u = [
                    roll
                    for i in range(height)
                    for g in range(c // 16, (c + width) // 16)
                    for roll in group_dice((first_row + r + i) * (cols // 16) + g, opt)
                ]
            tile = padded[r : r + height, c : c + width]
            picked, byte = quantize_block(tile.reshape(-1), amax, u, opt)
            codes[r : r + height, c : c + width] = np.array(picked, np.uint8).reshape(tile.shape)
            scales[r : r + height, c // opt.width] = byte
    codes, scales = codes[:rows], scales[:rows]
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scales
