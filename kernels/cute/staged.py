"""A tile of 128x128 bf16 in shared memory, from which both orientations are quantized.

The tile is copied asynchronously, 16 bytes a thread, zeros outside the matrix, and read in blocks
of 16 along a row or down a column. The chunk c of 16 bytes of row r lies at

    256 r + 128 (c % 2) + 16 ((c / 2) ^ (r % 8) ^ 2 (r / 16 % 4))

which keeps three ways of reading free of bank conflicts: the 8 blocks of a row by 8 lanes, a block
of 8 rows by 8 lanes, and 32-bit pairs of 8 neighbouring words in the same row of 4 groups of 16
rows by a warp.
"""

from typing import Any

import cutlass
from cutlass import Int32, Int64, Uint32, cute

from fos_compile.kernels.cute import ptx, shared

SIDE = 128
"""Rows and columns of a tile."""
THREADS = 256
ROWS_A_TURN = THREADS // 16
"""Rows that all threads copy at once."""
TILE_BYTES = SIDE * SIDE * 2
SCALE_BYTES = 1024
"""Scales of one orientation of a tile: two of 128 x 4 in the blocked layout."""


@cute.jit
def copy_tile(
    tile: Uint32,  # shared address, a multiple of 128
    x: cute.Tensor,  # [B, R, C] bfloat16, columns contiguous, everything a multiple of 16 bytes
    batch: Int32,
    top: Int32,
    left: Int32,
    tid: Int32,
) -> None:
    """Begin to copy the tile at row `top`, column `left`; `shared.wait_copies` ends it."""
    # 8 lanes take the even chunks of half a row, the next 8 the odd ones: no conflicts in the tile,
    # and together all 256 bytes.
    chunk = (tid & 7) * 2 + ((tid >> 3) & 1)
    row = top + (tid >> 4)
    col = left + chunk * 8
    source = (
        x.iterator.toint()
        + (Int64(batch) * x.stride[0] + Int64(row) * x.stride[1] + Int64(col)) * 2
    )
    step = x.stride[1] * (2 * ROWS_A_TURN)
    to = tile + Uint32(place_of_chunk(tid >> 4, chunk))
    turns = SIDE // ROWS_A_TURN
    if top + SIDE <= x.shape[1] and left + SIDE <= x.shape[2]:
        for j in cutlass.range_constexpr(turns):
            shared.copy_async_16(turn(to, j), source + j * step)
    else:
        rows = x.shape[1] if col < x.shape[2] else Int32(0)
        for j in cutlass.range_constexpr(turns):
            wanted = Uint32(1) if row + j * ROWS_A_TURN < rows else Uint32(0)
            shared.copy_async_16_or_zero(turn(to, j), source + j * step, wanted)


def turn(place: Any, j: int) -> Any:
    """Where a chunk of ROWS_A_TURN * j rows further down lies."""
    return (place ^ ((j & 3) << 5)) + j * ROWS_A_TURN * 256


def place_of_chunk(row: Any, chunk: Any) -> Any:
    """Byte offset in the tile of 8 columns of a row."""
    return row * 256 + (chunk & 1) * 128 + (((chunk >> 1) ^ swizzle(row)) << 4)


def swizzle(row: Any) -> Any:
    """What a row adds (exclusive or) to the number of a block."""
    return (row & 7) ^ (((row >> 4) & 3) << 1)


def row_block(tile: Any, row: Any, block: Any) -> list[Any]:
    """The 16 bf16 of a block of 16 columns, eight words."""
    at = tile + Uint32(place_of_chunk(row, block * 2))
    return [*shared.load_v4(at), *shared.load_v4(at + 128)]


def column_rows(tile: Any, group: Any, pair: Any) -> list[Any]:
    """Rows 16 group, ... of columns 2 pair and 2 pair + 1: a word each."""
    chunk = pair >> 2
    # Rows of a group share bits 1 and 2 of the swizzle; bits 4 to 6 of the address take the rest.
    corner = place_of_chunk(group * 16, chunk) + (pair & 3) * 4
    at = tile + Uint32(corner)
    return [shared.load_b32((at ^ ((i & 7) << 4)) + i * 256) for i in range(16)]


def column_of(rows: list[Any], side: Any) -> list[Any]:
    """The left (0) or right (1) column of `column_rows`, eight words of two rows."""
    selector = ptx.where_nonzero(side, 0x7632, 0x5410)
    return [ptx.prmt(rows[i], rows[i + 1], selector) for i in range(0, 16, 2)]


def place_of_scale(row: Any, block: Any) -> Any:
    """Byte offset of a scale among the `SCALE_BYTES` of a tile: row and block in 0-127, 0-7."""
    return (block >> 2) * 512 + (row & 31) * 16 + (row >> 5) * 4 + (block & 3)


@cute.jit
def write_scales(
    staged: Uint32,  # shared address of SCALE_BYTES
    scales: Int64,  # address of the first of two scale tiles
    blocks: Int32,  # of a row from there on, a multiple of 4
    lane: Int32,  # 0-63
) -> None:
    """Copy the scales of a tile to where they belong, 16 bytes a thread."""
    exists = Uint32(1) if (lane >> 5) * 4 < blocks else Uint32(0)
    words = shared.load_v4(staged + Uint32(lane * 16))
    tile = scales + lane * 16
    ptx.store_v4(tile, list(words), exists)
