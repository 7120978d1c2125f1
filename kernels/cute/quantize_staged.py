"""A bf16 matrix to NVFP4 in one or both orientations from one read: 1D blocks, mse or static_6.

A CTA copies a tile of 128x128 to shared memory (`staged`) and quantizes its rows, its columns or
both; a thread has a block of 16 at a time. As in `quantize_filtered`, blocks that a filter cannot
decide are remembered and go through `contract` when all others are done, a thread a block.
"""

import functools
from typing import Any, NamedTuple

import cutlass
from cutlass import Int32, Int64, Uint32, cute
from cutlass.cute import arch

from fos_compile.kernels.cute import (
    contract,
    fast,
    ptx,
    random_bits,
    shared,
    staged,
    tensor_constants,
    tiles,
)
from fos_compile.kernels.cute.host_quantize_staged import CTAS_PER_SM

THREADS = staged.THREADS
ROUNDS = staged.SIDE * staged.SIDE // 16 // THREADS
"""Blocks of an orientation that a thread has."""


class Side(NamedTuple):
    """Static options of one orientation."""

    rules: contract.Rules
    rht: bool


class Output(NamedTuple):
    """What one orientation of the tile needs; rows and columns are those of this orientation."""

    constants: Any
    """Shared address of `tensor_constants`."""
    values: Any
    """Address of the tile's first byte of values."""
    pitch: Any
    """Bytes from one row of values to the next."""
    scales: Any
    """Shared address of staged scales."""
    rows: Any
    """Rows of the tile that exist, up to 128."""
    blocks: Any
    """Blocks of a row that exist, up to 8: padding included."""
    group: Any
    """Number of the first group of 16, for the dice."""
    groups: Any
    """Groups in a row."""
    keys: Any
    """Shared address of the keys of Philox's rounds."""
    stream: Any
    queue: Any
    """Of undecided blocks."""
    count: Any
    """How many those are."""


class QuantizeStaged:
    """Kernel for one set of static options.

    Attributes:
        row: options of x; None where only x.mT is wanted.
        col: options of x.mT; None where only x is wanted.
    """

    def __init__(self, row: Side | None, col: Side | None) -> None:
        self.row: Any = row
        self.col: Any = col
        sides = [side for side in (row, col) if side is not None]
        self.has_dice = any(side.rules.rounding != "nearest" for side in sides)

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,  # [B, R, C] bfloat16, see staged.copy_tile
        amax_row: Int64,  # address of float32 []; anything without that orientation, as below
        amax_col: Int64,
        seed: Int64,  # address of int64 [1]; anything if both are nearest
        values_row: Int64,  # address of uint8 [B, R, roundup(C, 64) / 2]
        scales_row: Int64,  # address of uint8 [B, L]
        values_col: Int64,  # address of uint8 [B, C, roundup(R, 64) / 2]
        scales_col: Int64,
        dice_row: Uint32,  # streams
        dice_col: Uint32,
        half_exponents: Uint32,  # of host_quantize_filtered
        stream: Any,
    ) -> None:
        """Launch on `stream`."""
        across = cute.ceil_div(x.shape[2], staged.SIDE)
        self.kernel(
            x,
            amax_row,
            amax_col,
            seed,
            values_row,
            scales_row,
            values_col,
            scales_col,
            dice_row,
            dice_col,
            half_exponents,
        ).launch(
            grid=(cute.ceil_div(x.shape[1], staged.SIDE) * across, x.shape[0], 1),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=CTAS_PER_SM,
            preferred_smem_carveout=100,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        amax_row: Int64,
        amax_col: Int64,
        seed: Int64,
        values_row: Int64,
        scales_row: Int64,
        values_col: Int64,
        scales_col: Int64,
        dice_row: Uint32,
        dice_col: Uint32,
        half_exponents: Uint32,
    ) -> None:
        """One CTA."""
        tid, _, _ = arch.thread_idx()
        which, batch, _ = arch.block_idx()
        across = cute.ceil_div(x.shape[2], staged.SIDE)
        band, bar = which // across, which % across
        tile = self.alloc(staged.TILE_BYTES)
        staged_row, staged_col = self.alloc(staged.SCALE_BYTES), self.alloc(staged.SCALE_BYTES)
        queue_row = self.alloc(2 * ROUNDS * THREADS)
        queue_col = self.alloc(2 * ROUNDS * THREADS)
        counts, constants = self.alloc(8), self.alloc(32)
        keys = self.alloc(80)
        staged.copy_tile(tile, x, batch, band * staged.SIDE, bar * staged.SIDE, tid)
        if cutlass.const_expr(self.has_dice):
            if tid == 64:
                store_keys(keys, seed)
        bands = cute.ceil_div(x.shape[1], staged.SIDE)
        chunks_row, chunks_col = cute.ceil_div(x.shape[2], 64), cute.ceil_div(x.shape[1], 64)
        if tid == 0:
            shared.store_v2(counts, Uint32(0), Uint32(0))
            if cutlass.const_expr(self.row is not None):
                tensor_constants.store(constants, amax_row, self.row.rules)
        if tid == 32:
            if cutlass.const_expr(self.col is not None):
                tensor_constants.store(constants + 16, amax_col, self.col.rules)
        shared.wait_copies()
        arch.sync_threads()
        if cutlass.const_expr(self.row is not None):
            rows = self.output(
                constants, values_row, (batch, x.shape[1], band, bar, chunks_row),
                keys, dice_row, staged_row, queue_row, counts,
            )  # fmt: skip
            self.quantize_rows(tile, rows, tid, half_exponents)
        if cutlass.const_expr(self.col is not None):
            columns = self.output(
                constants + 16, values_col, (batch, x.shape[2], bar, band, chunks_col),
                keys, dice_col, staged_col, queue_col, counts + 4,
            )  # fmt: skip
            self.quantize_columns(tile, columns, tid, half_exponents)
        arch.sync_threads()
        # Odd warps take columns, even ones rows, if there are both.
        both = cutlass.const_expr(self.row is not None and self.col is not None)
        lane, warp = tid & 31, tid >> 5
        first = (warp >> 1) * 32 + lane if cutlass.const_expr(both) else tid
        step = THREADS // 2 if cutlass.const_expr(both) else THREADS
        if cutlass.const_expr(self.row is not None):
            if cutlass.const_expr(not both) or (warp & 1) == 0:
                self.finish_rows(tile, rows, Uint32(first), step)
        if cutlass.const_expr(self.col is not None):
            if cutlass.const_expr(not both) or (warp & 1) == 1:
                self.finish_columns(tile, columns, Uint32(first), step)
        arch.sync_threads()
        if cutlass.const_expr(self.row is not None):
            if warp < 2:
                tile_row = (Int64(batch) * bands + band) * chunks_row + bar * 2
                staged.write_scales(staged_row, scales_row + tile_row * 512, rows.blocks, tid)
        if cutlass.const_expr(self.col is not None):
            if (warp >> 1) == 1:
                tile_col = (Int64(batch) * across + bar) * chunks_col + band * 2
                to = scales_col + tile_col * 512
                staged.write_scales(staged_col, to, columns.blocks, tid & 63)

    def alloc(self, size: int) -> Any:
        """Shared address of `size` bytes."""
        return shared.address_of(arch.alloc_smem(cutlass.Uint8, size, alignment=128))

    @cute.jit
    def output(
        self,
        constants: Uint32,
        values: Int64,
        where: tuple[Int32, Int32, Int32, Int32, Int32],
        keys: Uint32,
        stream: Uint32,
        scales: Uint32,
        queue: Uint32,
        count: Uint32,
    ) -> Any:
        """The orientation with `where` = batch, rows, tile down, tile across, chunks."""
        batch, rows, down, across, chunks = where
        line = Int64(batch) * rows + down * staged.SIDE
        pitch = chunks * 32
        return Output(
            constants=constants,
            values=values + line * pitch + across * (staged.SIDE // 2),
            pitch=pitch,
            scales=scales,
            rows=rows - down * staged.SIDE,
            blocks=chunks * 4 - across * 8,
            group=line * (chunks * 4) + across * 8,
            groups=chunks * 4,
            keys=keys,
            stream=stream,
            queue=queue,
            count=count,
        )

    @cute.jit
    def quantize_rows(
        self, tile: Uint32, out: cutlass.Constexpr, tid: Int32, half_exponents: Uint32
    ) -> None:
        """All row blocks of the tile."""
        common = tensor_constants.load(out.constants)
        near = Uint32(0)
        for i in cutlass.range(ROUNDS, unroll=1):
            row, block = row_task(tid, i)
            words = staged.row_block(tile, row, block)
            near = near | (
                self.quantize(words, self.row, out, common, row, block, half_exponents) << Uint32(i)
            )
        self.remember(out, near, tid)

    @cute.jit
    def quantize_columns(
        self, tile: Uint32, out: cutlass.Constexpr, tid: Int32, half_exponents: Uint32
    ) -> None:
        """All column blocks of the tile, two neighbours a round."""
        common = tensor_constants.load(out.constants)
        near = Uint32(0)
        for i in cutlass.range(ROUNDS // 2, unroll=1):
            pair, group = column_task(tid, i)
            rows = staged.column_rows(tile, group, pair)
            for side in cutlass.range(2, unroll=1):
                words = staged.column_of(rows, Uint32(side))
                column = pair * 2 + side
                found = self.quantize(words, self.col, out, common, column, group, half_exponents)
                near = near | (found << Uint32(i * 2 + side))
        self.remember(out, near, tid)

    @cute.jit
    def quantize(
        self,
        words: list[Any],
        side: cutlass.Constexpr,
        out: Any,
        common: Any,
        row: Int32,
        block: Int32,
        half_exponents: Uint32,
    ) -> Uint32:
        """Quantize one block as far as a filter can; whether it could not."""
        exists = Uint32(0)
        if row < out.rows and block < out.blocks:
            exists = ptx.u32(0xFF)
        words = fast.ready(words, side.rules, side.rht)
        tensor, outside = common
        dice = self.throw(side, out, row, block)
        done = fast.block(words, tensor, side.rules, dice, half_exponents)
        ptx.store_v2(address(out, row, block), done.low, done.high, exists)
        place = out.scales + Uint32(staged.place_of_scale(row, block))
        shared.store_u8(place, done.scale & exists)
        return (done.near | outside) & exists

    def throw(self, side: Side, out: Any, row: Any, block: Any) -> list[Any] | None:
        """The dice of a block."""
        if side.rules.rounding == "nearest":
            return None
        group = out.group + Int64(row) * out.groups + block
        return random_bits.philox(load_keys(out.keys), tiles.words_of(group), out.stream)

    @cute.jit
    def remember(self, out: Any, near: Uint32, tid: Int32) -> None:
        """Queue this thread's undecided blocks, a bit a round."""
        if near != 0:
            slot = shared.atomic_add(out.count, ptx.popc(near))
            while near != 0:
                shared.store_u16(out.queue + slot * 2, ptx.find_low(near) * THREADS + Uint32(tid))
                near = near & (near - 1)
                slot += 1

    @cute.jit
    def finish_rows(self, tile: Uint32, out: Any, first: Uint32, step: cutlass.Constexpr) -> None:
        """The undecided row blocks."""
        for j in cutlass.range(first, shared.load_b32(out.count), step):
            entry = Int32(shared.load_u16(out.queue + j * 2))
            row, block = row_task(entry % THREADS, entry // THREADS)
            self.finish(staged.row_block(tile, row, block), self.row, out, row, block)

    @cute.jit
    def finish_columns(
        self, tile: Uint32, out: Any, first: Uint32, step: cutlass.Constexpr
    ) -> None:
        """The undecided column blocks."""
        for j in cutlass.range(first, shared.load_b32(out.count), step):
            entry = Int32(shared.load_u16(out.queue + j * 2))
            who, turn = entry % THREADS, entry // THREADS
            pair, group = column_task(who, turn >> 1)
            rows = staged.column_rows(tile, group, pair)
            words = staged.column_of(rows, Uint32(turn & 1))
            self.finish(words, self.col, out, pair * 2 + (turn & 1), group)

    @cute.jit
    def finish(
        self, words: list[Any], side: cutlass.Constexpr, out: Any, row: Int32, block: Int32
    ) -> None:
        """One block by the contract."""
        words = fast.ready(words, side.rules, side.rht)
        tensor, outside = tensor_constants.load(out.constants)
        throw = None
        if cutlass.const_expr(side.rules.rounding != "nearest"):
            throw = functools.partial(self.throw, side, out, row, block)
        codes, scale = fast.exact(words, tensor, side.rules, throw, outside)
        ptx.store_v2(address(out, row, block), codes[0], codes[1], 1)
        shared.store_u8(out.scales + Uint32(staged.place_of_scale(row, block)), scale)


def store_keys(to: Any, seed: Any) -> None:
    """The ten keys of Philox, so that not every block adds them up."""
    keys = [word for key in random_bits.keys_of(ptx.load_v2(seed)) for word in key]
    for i in range(0, len(keys), 4):
        shared.store_v4(to + 4 * i, keys[i : i + 4])


def load_keys(at: Any) -> list[Any]:
    """What `store_keys` left."""
    words = [word for i in range(0, 20, 4) for word in shared.load_v4(at + 4 * i)]
    return list(zip(words[::2], words[1::2], strict=True))


def row_task(tid: Any, turn: Any) -> tuple[Any, Any]:
    """(row, block): a warp takes 8 blocks of 4 rows."""
    return (turn * (THREADS // 32) + (tid >> 5)) * 4 + ((tid & 31) >> 3), tid & 7


def column_task(tid: Any, turn: Any) -> tuple[Any, Any]:
    """(pair of columns, group of 16 rows): a warp takes 8 pairs of 4 groups.

    The four groups of a column are 32 bytes of values, a sector. The pairs are those of two chunks
    that lie 4 words apart, as `staged` wants it.
    """
    warp, lane = tid >> 5, tid & 31
    chunk = ((warp >> 1) * 2 + (lane >> 4)) * 2 + (warp & 1)
    return chunk * 4 + ((lane >> 2) & 3), turn * 4 + (lane & 3)


def address(out: Any, row: Any, block: Any) -> Any:
    """Of the values of a block."""
    return out.values + Int64(row) * out.pitch + block * 8
