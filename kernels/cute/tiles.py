"""Who works on which block: threads, warps and CTAs over the 128x4 tiles of the scale layout.

All coordinates are those of the matrix that is quantized, x or x.mT: a transposition is a pair of
swapped strides. A chunk is four blocks wide, 64 columns (nvfp4) or 128 (mxfp4). Sixteen warps share
a tile of 128 rows x one chunk; a CTA is four of them and walks along its rows.
"""

from typing import Any, NamedTuple

import cutlass
from cutlass import Int32, Int64, Uint32, cute

from fos_compile.kernels.cute import ptx

THREADS = 128
WARPS = THREADS // 32
TASKS = 16
"""Warps that share a tile of 128 rows and one chunk."""
ELEMENT_BYTES = {cutlass.BFloat16: 2, cutlass.Float16: 2, cutlass.Float32: 4}


class Place(NamedTuple):
    """A thread's row, the block inside the chunk, and where its scale lies in the tile."""

    row: Any
    block: Any
    scale: Any


@cute.jit
def place(task: Int32, lane: Int32, by_column: cutlass.Constexpr) -> Any:
    """Row inside the tile, block inside the chunk and scale offset inside the tile of a thread.

    Columns contiguous in memory: a warp takes 8 rows x 4 blocks, the rows r, r + 32, r + 64, r + 96
    and the same for r + 1, whose 32 scales are one sector. `by_column`, rows contiguous: 16 rows x
    2 blocks, so that a load of a warp covers 16 neighbours twice.
    """
    row, block = Int32(0), Int32(0)
    if cutlass.const_expr(by_column):
        row = (task >> 1) * 16 + (lane & 15)
        block = (task & 1) * 2 + (lane >> 4)
    else:
        row = task * 2 + (lane >> 4) + ((lane >> 2) & 3) * 32
        block = lane & 3
    return Place(row, block, (row & 31) * 16 + (row >> 5) * 4 + block)


def grid_of(rows: Any, chunks: Any, rounds: Any, batch: Any) -> tuple[Any, Any, Any]:
    """CTAs: those of the row tiles, of which there may be most, along the chunks, and the batch."""
    return cute.ceil_div(rows, 128) * (TASKS // WARPS), cute.ceil_div(chunks, rounds), batch


@cute.jit
def load_values(
    x: cute.Tensor,  # [B, R, C]
    batch: Int32,
    row: Int32,
    col: Int32,
    width: cutlass.Constexpr,
    vector: cutlass.Constexpr,
) -> Any:
    """`width` float32 from column `col` of a row; zeros outside the matrix.

    With `vector` the columns are contiguous, everything is a multiple of 16 bytes.
    """
    dtype = x.element_type
    size = ELEMENT_BYTES[dtype]
    base = (
        x.iterator.toint()
        + (Int64(batch) * x.stride[0] + Int64(row) * x.stride[1] + Int64(col) * x.stride[2]) * size
    )
    cols = x.shape[2] if row < x.shape[1] else Int32(0)
    values = []
    if cutlass.const_expr(vector):
        step = 16 // size
        for i in cutlass.range_constexpr(width // step):
            wanted = Uint32(1) if col + i * step < cols else Uint32(0)
            for word in ptx.load_stream_v4(base + i * 16, wanted):
                values += unpack(word, dtype)
    else:
        for i in cutlass.range_constexpr(width):
            wanted = Uint32(1) if col + i < cols else Uint32(0)
            values.append(load_one(base + i * x.stride[2] * size, wanted, dtype))
    return values


@cute.jit
def load_column(x: cute.Tensor, batch: Int32, row: Int32, col: Int32) -> Any:
    """16 float32 of column `col` from row `row` down; zeros outside the matrix."""
    dtype = x.element_type
    size = ELEMENT_BYTES[dtype]
    base = (
        x.iterator.toint()
        + (Int64(batch) * x.stride[0] + Int64(row) * x.stride[1] + Int64(col) * x.stride[2]) * size
    )
    rows = x.shape[1] if col < x.shape[2] else Int32(0)
    values = []
    for i in cutlass.range_constexpr(16):
        wanted = Uint32(1) if row + i < rows else Uint32(0)
        values.append(load_one(base + i * x.stride[1] * size, wanted, dtype))
    return values


def load_one(address: Any, wanted: Any, dtype: Any) -> Any:
    """One number as float32, or 0 unless `wanted`."""
    if dtype is cutlass.Float32:
        return ptx.real(ptx.load_b32(address, wanted))
    return unpack(ptx.load_b16(address, wanted), dtype)[0]


def unpack(word: Any, dtype: Any) -> list[Any]:
    """The numbers in a 32-bit register as float32."""
    if dtype is cutlass.Float32:
        return [ptx.real(word)]
    if dtype is cutlass.Float16:
        return list(ptx.widen(word))
    return [ptx.real(word << 16), ptx.real(word & ptx.u32(0xFFFF0000))]


def packed(numbers: list[Any], dtype: Any) -> list[Any]:
    """float32 rounded to `dtype`, as words of memory."""
    if dtype is cutlass.Float32:
        return [ptx.bits(number) for number in numbers]
    pack = ptx.half2 if dtype is cutlass.Float16 else ptx.bfloat16x2
    return [pack(low, high) for low, high in zip(numbers[::2], numbers[1::2], strict=True)]


def rounding_to(dtype: Any) -> Any:
    """The function that rounds a float32 to `dtype` and back."""
    if dtype is cutlass.Float32:
        return lambda a: a
    return ptx.to_float16 if dtype is cutlass.Float16 else ptx.to_bfloat16


def words_of(index: Any) -> tuple[Any, Any]:
    """(low, high) word of a 64-bit integer."""
    return Uint32(index & 0xFFFFFFFF), Uint32(index >> 32)
