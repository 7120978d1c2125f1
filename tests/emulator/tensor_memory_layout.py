"""Where values sit in tensor memory: accumulators, scale factors, tcgen05.cp, .ld and .st.

Tensor memory is 128 lanes of 512 columns of 32 bits in each CTA. Every function returns arrays
relative to the address an instruction names. Sources: `tmem_frg` and `tmem_sf_frg` of CUTLASS
include/cute/atom/mma_traits_sm100_frag.hpp for the MMA, `Copy_Traits` of
include/cute/atom/copy_traits_sm100.hpp for the copies. The tables of TVM's TIRx documentation
(tcgen05_ld_st, tcgen05_cp) say the same for the copies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from tests.emulator.errors import EmulatorError, UnsupportedError

LANES = 128
COLUMNS = 512
SUBPARTITION = 32


def _frozen(array: np.ndarray) -> np.ndarray:
    array = np.ascontiguousarray(array)
    array.flags.writeable = False
    return array


@dataclass(frozen=True)
class Accumulator:
    """Place of D[m, n], each int64 (M, N): CTA of the pair (0 or 1), lane and column."""

    cta: np.ndarray
    lane: np.ndarray
    column: np.ndarray


@lru_cache(maxsize=128)
def accumulator(cta_group: int, m: int, n: int) -> Accumulator:
    """The layout of an M x N accumulator of 32-bit elements, one column each.

    cta_group::1: M = 128 one row a lane; M = 64 uses 16 lanes of each subpartition (the other
    half belongs to the tile whose address has lane bit 16 set). cta_group::2: M = 256 one row a
    lane over both CTAs; M = 128 ("2x2") keeps 64 rows in each CTA, columns n >= N/2 64 lanes up.
    """
    row, col = np.meshgrid(np.arange(m), np.arange(n), indexing="ij")
    zero = np.zeros_like(row)
    places = {
        (1, 128): lambda: (zero, row, col),
        (1, 64): lambda: (zero, row % 16 + 32 * (row // 16), col),
        (2, 256): lambda: (row // 128, row % 128, col),
        (2, 128): lambda: (row // 64, row % 64 + 64 * (col // (n // 2)), col % (n // 2)),
    }
    if (cta_group, m) not in places:
        raise UnsupportedError(f"accumulator of cta_group::{cta_group} with M = {m}")
    return Accumulator(*(_frozen(x) for x in places[cta_group, m]()))


@dataclass(frozen=True)
class ScaleFactors:
    """Place of the scale of (row, block), each int64 (copies, rows, blocks).

    Every copy holds the same value: the data path reads the one of its own lanes.
    """

    lane: np.ndarray
    column: np.ndarray
    byte: np.ndarray


@lru_cache(maxsize=128)
def scale_factors(
    rows: int, scale_vector: int, scale_id: int = 0, *, split: bool = False
) -> ScaleFactors:
    """Scale factors of one MMA: `rows` of A in this CTA, or of B, and 1, 2 or 4 blocks along K.

    Row r is in lane r % 32 of every subpartition, column r // 32, block b in byte scale_id + b.
    `split` is SFB of a cta_group::2 MMA with M = 128 ("2x2"): the upper half of N is in the two
    upper subpartitions only, the lower half in the two lower ones.
    """
    if scale_vector not in (1, 2, 4) or scale_id % scale_vector or scale_id > 3:
        raise EmulatorError(f"scale factor id {scale_id} with scale_vec::{scale_vector}X")
    copy, row, block = np.meshgrid(
        np.arange(2 if split else 4), np.arange(rows), np.arange(scale_vector), indexing="ij"
    )
    upper = 0
    if split:
        upper, row = row // (rows // 2), row % (rows // 2)
    lane = row % SUBPARTITION + SUBPARTITION * copy + 64 * upper
    return ScaleFactors(_frozen(lane), _frozen(row // SUBPARTITION), _frozen(scale_id + block))


@dataclass(frozen=True)
class CopyPlan:
    """tcgen05.cp: source row r, 32-bit word w goes to lane lanes[c, r], column w, every copy c."""

    rows: int
    row_bytes: int
    lanes: np.ndarray


@lru_cache(maxsize=16)
def copy_plan(shape: str) -> CopyPlan:
    """The plan of `.shape{.multicast}`, for example "32x128b.warpx4".

    Source rows are those of `descriptors.operand_bytes(descriptor, plan.rows, plan.row_bytes)`.
    """
    row = {count: np.arange(count) for count in (4, 32, 64, 128)}
    lanes = {
        "128x256b": row[128][None],
        "128x128b": row[128][None],
        "4x256b": 32 * row[4][None],
        "64x128b.warpx2::02_13": np.stack([row[64], row[64] + 64]),
        "64x128b.warpx2::01_23": np.stack(
            [row[64] % 32 + 64 * (row[64] // 32) + 32 * c for c in range(2)]
        ),
        "32x128b.warpx4": np.stack([row[32] + 32 * c for c in range(4)]),
    }
    if shape not in lanes:
        raise UnsupportedError(f"tcgen05.cp.{shape}: modelled are {', '.join(lanes)}")
    row_bytes = 32 if "256b" in shape else 16
    return CopyPlan(lanes[shape].shape[1], row_bytes, _frozen(lanes[shape]))


@dataclass(frozen=True)
class Registers:
    """tcgen05.ld/.st: place of each register, int64 (registers, 32 threads).

    With pack::16b / unpack::16b the arrays are (registers, 32, 2): the two columns whose low 16
    bits make the low and the high half of the register.
    """

    lane: np.ndarray
    column: np.ndarray


# Shape -> registers of .x1, largest N.
SHAPES = {
    "32x32b": (1, 128),
    "16x64b": (1, 128),
    "16x128b": (2, 64),
    "16x256b": (4, 32),
    "16x32bx2": (1, 128),
}


@lru_cache(maxsize=256)
def registers(shape: str, repeat: int, *, pack: bool = False, split: int = 0) -> Registers:
    """The map of `.shape.x<repeat>`; `split` is the immediate of 16x32bx2 (a column offset)."""
    if shape not in SHAPES:
        raise UnsupportedError(f"tcgen05.ld/st shape {shape}: modelled are {', '.join(SHAPES)}")
    per_repeat, largest = SHAPES[shape]
    if repeat & (repeat - 1) or not 1 <= repeat <= largest:
        raise EmulatorError(f"tcgen05.ld/st {shape}.x{repeat}: x1 to x{largest}, powers of two")
    if split and shape != "16x32bx2":
        raise EmulatorError(f"tcgen05.ld/st {shape} takes no half-split offset")
    r, t = np.meshgrid(np.arange(per_repeat * repeat), np.arange(32), indexing="ij")
    if shape == "32x32b":
        lane, column = t, r
    elif shape == "16x32bx2":
        lane, column = t % 16, r
    elif shape == "16x64b":
        lane, column = t // 4 + 8 * (t % 2), t // 2 % 2 + 2 * r
    elif shape == "16x128b":
        lane, column = t // 4 + 8 * (r % 2), t % 4 + 4 * (r // 2)
    else:
        lane, column = t // 4 + 8 * (r // 2 % 2), r % 2 + 2 * (t % 4) + 8 * (r // 4)
    if pack:
        column = np.stack([2 * column, 2 * column + 1], axis=-1)
        lane = np.stack([lane, lane], axis=-1)
    if shape == "16x32bx2":
        upper = (t // 16)[..., None] if pack else t // 16
        column = column + split * upper
    return Registers(_frozen(lane), _frozen(column))


def block_scaled_product(
    a: np.ndarray, a_scale: np.ndarray, b: np.ndarray, b_scale: np.ndarray
) -> np.ndarray:
    """Sum over k of A[m, k] SFA[m, k // v] B[n, k] SFB[n, k // v]: float64 (M, N).

    a: float64 (M, K) and b: (N, K), decoded values; a_scale: (M, K / v) and b_scale: (N, K / v).
    Exact, in any order, for e2m1 with ue4m3 scales and K = 64: scaled elements are multiples of
    2^-10 below 2^12, so the sum is a multiple of 2^-20 below 2^30 and fits 53 bits.
    """
    block = a.shape[1] // a_scale.shape[1]
    scaled_a = a.astype(np.float64) * np.repeat(a_scale.astype(np.float64), block, axis=1)
    scaled_b = b.astype(np.float64) * np.repeat(b_scale.astype(np.float64), block, axis=1)
    return scaled_a @ scaled_b.T
