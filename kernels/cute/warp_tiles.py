"""Eight tiles of 16x16, 32 rows x 64 columns, that a warp has in shared memory for itself.

They are copied asynchronously and read by rows. What is found out about them is written in the
shapes of global memory: codes of columns when there are 64 of each, a sector, and scales when they
are those of 128 rows, or of 64 rows and 64 columns. No warp waits for another.
"""

from typing import Any, NamedTuple

import cutlass
from cutlass import Int32, Int64, Uint32, cute
from cutlass.cute import arch

from fos_compile.kernels.cute import conversions, ptx, shared

BAND, COLS = 128, 64
"""Rows and columns of a warp."""
ROWS = 32
"""Of them at a time."""
UNIT = 64
"""Rows whose column codes fill a sector; a row of x.mT is padded to a multiple."""
TILE_BYTES = ROWS * COLS * 2
COLUMN_BYTES = COLS * UNIT // 2
SCALE_BYTES = 96
"""Those of a band in 8 words, those of the columns of a unit in 4; constants; undecided tiles; the
place."""
BYTES = TILE_BYTES + COLUMN_BYTES + SCALE_BYTES


class Memory(NamedTuple):
    """Shared addresses of a warp."""

    tile: Any
    columns: Any
    scales_row: Any
    scales_col: Any
    constants: Any
    near: Any
    place: Any


class Place(NamedTuple):
    """Where a warp works."""

    batch: Any
    top: Any
    left: Any


def memory(whole: Any, warp: Any, warps: int) -> Memory:
    """Of one of `warps` warps that have `warps * BYTES` at the shared address `whole`."""
    large = TILE_BYTES + COLUMN_BYTES
    tile = whole + Uint32(warp * large)
    small = whole + Uint32(warps * large + warp * SCALE_BYTES)
    return Memory(
        tile=tile,
        columns=tile + TILE_BYTES,
        scales_row=small,
        scales_col=small + 32,
        constants=small + 48,
        near=small + 64,
        place=small + 80,
    )


@cute.jit
def address_in(x: cute.Tensor, batch: Int32, row: Int32, col: Int32) -> Int64:
    """Of an element, columns contiguous."""
    offset = Int64(batch) * x.stride[0] + Int64(row) * x.stride[1] + Int64(col)
    return x.iterator.toint() + offset * 2


@cute.jit
def copy(tile: Uint32, x: cute.Tensor, here: Any, source: Int64, row: Int32, lane: Int32) -> None:
    """Begin to copy 32 rows from `row` on, zeros outside the matrix; `wait` ends it.

    Chunk k of 16 bytes of row r lies at 128 r + 16 (k ^ (r / 4 % 2)): eight lanes that read the
    same half of the blocks of rows r and r + 4 meet no bank twice.

    Args:
        source: address of this lane's chunk of the first of these rows: lane / 8 further down.
    """
    chunk = lane & 7
    to = tile + Uint32((lane >> 3) * 128 + chunk * 16)
    step = x.stride[1] * 8
    if row + ROWS <= x.shape[1] and here.left + COLS <= x.shape[2]:
        for j in cutlass.range_constexpr(ROWS // 4):
            shared.copy_async_16((to ^ ((j & 1) << 4)) + j * 512, source + j * step)
    else:
        rows = x.shape[1] if here.left + chunk * 8 < x.shape[2] else Int32(0)
        for j in cutlass.range_constexpr(ROWS // 4):
            wanted = Uint32(1) if row + (lane >> 3) + j * 4 < rows else Uint32(0)
            at = (to ^ ((j & 1) << 4)) + j * 512
            shared.copy_async_16_or_zero(at, source + j * step, wanted)


@cute.jit
def wait() -> None:
    """Wait for the copies of all lanes."""
    shared.wait_copies()
    arch.sync_warp()


def store_place(to: Any, batch: Any, top: Any, left: Any) -> None:
    """Where a warp works, kept where it takes no registers."""
    shared.store_v4(to, [Uint32(batch), Uint32(top), Uint32(left), Uint32(0)])


def load_place(at: Any) -> Place:
    """What `store_place` left."""
    batch, top, left, _ = shared.load_v4(at)
    return Place(Int32(batch), Int32(top), Int32(left))


def load_row(mine: Any, i: Any) -> list[Any]:
    """A block of 16 of row i of a lane, eight words; `mine` is where its first row begins."""
    at = mine + Uint32(i * 128)
    return [*shared.load_v4(at), *shared.load_v4(at ^ 16)]


def store_columns(columns: Any, words: list[Any], part: Any, lane: Any) -> None:
    """Put `filtered_tiles.column_words` of a warp where `flush_columns` finds them.

    16 bytes hold 32 rows of a column. A matrix of `stmatrix` is a word of every lane: eight such
    rows, two of each of four tiles. Those of column n and this part of its 64 rows lie at
    32 (n ^ (n / 32 % 2)) + 16 (part ^ (n / 16 % 2)), so that no bank is met twice.
    """
    matrix, row = lane >> 3, lane & 7
    tile, later = row >> 1, row & 1
    column = tile * 16 + (matrix & 1) * 4 + (matrix >> 1) + later * 2
    at = columns + Uint32((column ^ (tile >> 1)) * 32 + (part ^ (tile & 1)) * 16)
    store_transposed(at, words[:4])
    store_transposed(at + 256, words[4:])


@cute.jit
def flush_columns(
    columns: Uint32, x: cute.Tensor, here: Any, values: Int64, unit: Int32, lane: Int32
) -> None:
    """Write 64 codes, 32 bytes, of each of this warp's columns."""
    part = lane & 1
    pitch = cute.ceil_div(x.shape[1], UNIT) * 32
    first = here.left + (lane >> 1)
    to = values + (Int64(here.batch) * x.shape[2] + first) * pitch + unit * 32 + part * 16
    for k in cutlass.range_constexpr(COLS // 16):
        column = k * 16 + (lane >> 1)
        words = shared.load_v4(columns + Uint32((column ^ (k >> 1)) * 32 + (part ^ (k & 1)) * 16))
        exists = Uint32(1) if first + k * 16 < x.shape[2] else Uint32(0)
        ptx.store_v4(to, list(words), exists)
        to += 16 * Int64(pitch)


@cute.jit
def flush_scales_row(staged: Uint32, x: cute.Tensor, here: Any, scales: Int64, lane: Int32) -> None:
    """Write the scales of a band: 512 bytes, four rows a lane, zeros from the last row on."""
    words = list(shared.load_v4(staged + Uint32((lane >> 4) * 16)))
    for j in cutlass.range_constexpr(BAND // 32):
        words[j] = words[j] if here.top + lane + j * 32 < x.shape[1] else Uint32(0)
    band = Int64(here.batch) * cute.ceil_div(x.shape[1], 128) + (here.top >> 7)
    ptx.store_v4(
        scales + (band * cute.ceil_div(x.shape[2], COLS) + (here.left >> 6)) * 512 + lane * 16,
        words,
        1,
    )


@cute.jit
def flush_scales_col(
    staged: Uint32, x: cute.Tensor, here: Any, scales: Int64, unit: Int32, lane: Int32
) -> None:
    """Write the scales of 64 columns and 64 rows, two columns a lane; zeros as above."""
    words = []
    for j in cutlass.range_constexpr(COLS // 32):
        word = shared.load_b32(staged + Uint32(j * 8 + (lane >> 4) * 4))
        words.append(word if here.left + lane + j * 32 < x.shape[2] else Uint32(0))
    band = Int64(here.batch) * cute.ceil_div(x.shape[2], 128) + (here.left >> 7)
    to = (
        scales
        + (band * cute.ceil_div(x.shape[1], UNIT) + unit) * 512
        + lane * 16
        + ((here.left >> 6) & 1) * 8
    )
    ptx.store_v2(to, words[0], words[1], 1)


@conversions.emulated_unless(conversions.has_sm_90)
def store_transposed(address: Any, words: list[Any]) -> None:
    """Four 8x8 matrices of 16 bits, transposed: lane 8 k + r has the address of row r of k."""
    code = "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};"
    arch.inline_ptx(code, read_only_args=[address, *words])


def again(a: Any) -> Any:
    """The same, but nothing computed from it is kept in registers for the next turn of a loop."""
    code = "mov.b32 {$w0}, {$r0};"
    return arch.inline_ptx(code, write_only_types=[type(a)], read_only_args=[a])


def ballot(a: Any) -> Any:
    """Which lanes of the warp have something else than 0."""
    code = "{ .reg .pred p; setp.ne.u32 p, {$r0}, 0; vote.sync.ballot.b32 {$w0}, p, 0xffffffff; }"
    return arch.inline_ptx(code, write_only_types=[Uint32], read_only_args=[a])
