"""A bf16 matrix to NVFP4 in one or both orientations from one read: 1D blocks, mse or static_6.

A CTA copies a tile of 128x128 to shared memory (`staged`) and quantizes its rows, its columns or
both, a thread a block of 16 at a time; then the next tile. As in `quantize_filtered`, blocks that a
filter cannot decide are remembered and go through `contract` later, when there are enough of them
to fill the warps of the CTA, or at its end. They are then read from global memory again.
"""

from typing import Any, NamedTuple

import cutlass
from cutlass import Int32, Int64, Uint32, cute
from cutlass.cute import arch

from fos_compile.kernels.cute import contract, fast, ptx, shared, staged, tiles
from fos_compile.kernels.cute.host_quantize_staged import CTAS_PER_SM

THREADS = staged.THREADS
WARPS = THREADS // 32
ROUNDS = staged.SIDE * staged.SIDE // 16 // THREADS
"""Blocks of an orientation and a tile that a thread has."""
ENOUGH = 512
"""Undecided blocks of an orientation that are worth a stop."""
QUEUE = ENOUGH + ROUNDS * THREADS


class Side(NamedTuple):
    """Static options of one orientation."""

    rules: contract.Rules
    rht: bool


class Constants(NamedTuple):
    """What one orientation of a CTA needs."""

    tensor: Any
    outside: Any
    values: Any
    """Address."""
    scales: Any
    """Address."""
    rows: Any
    """Of a matrix in this orientation."""
    chunks: Any
    """Of 64 columns in a row."""
    tiles: Any
    """Tiles down."""
    stream: Any
    key: Any
    """Words of the seed."""
    staged: Any
    """Shared address of the scales of a tile."""
    queue: Any
    """Shared address of undecided blocks."""
    count: Any
    """Shared address of how many those are."""


class Output(NamedTuple):
    """One orientation of a tile."""

    constants: Any
    values: Any
    """Address of the tile's first byte of values."""
    rows: Any
    """Rows of the tile that exist; may exceed 128."""
    blocks: Any
    """Blocks of a row from here on, padding included; may exceed 8."""
    group: Any
    """Number of the first group of 16, for the dice."""
    scales: Any
    """Address of the first of two scale tiles."""


class QuantizeStaged:
    """Kernel for one set of static options.

    Attributes:
        row: options of x; None where only x.mT is wanted.
        col: options of x.mT; None where only x is wanted.
    """

    def __init__(self, row: Side | None, col: Side | None) -> None:
        self.row = row
        self.col = col
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
        stream_row: Uint32,  # which dice
        stream_col: Uint32,
        turns: Int32,  # tiles of a CTA, at most host_quantize_staged.MAX_TURNS
        half_exponents: Uint32,  # of host_quantize_filtered
        stream: Any,
    ) -> None:
        """Launch on `stream`."""
        down = cute.ceil_div(x.shape[1], staged.SIDE)
        across = cute.ceil_div(x.shape[2], staged.SIDE)
        self.kernel(
            x, amax_row, amax_col, seed, values_row, scales_row, values_col, scales_col,
            stream_row, stream_col, turns, half_exponents,
        ).launch(
            grid=(cute.ceil_div(x.shape[0] * down * across, turns), 1, 1),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=CTAS_PER_SM,
            preferred_smem_carveout=100,
        )  # fmt: skip

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
        stream_row: Uint32,
        stream_col: Uint32,
        turns: Int32,
        half_exponents: Uint32,
    ) -> None:
        """One CTA."""
        tid, _, _ = arch.thread_idx()
        bx, _, _ = arch.block_idx()
        down = cute.ceil_div(x.shape[1], staged.SIDE)
        across = cute.ceil_div(x.shape[2], staged.SIDE)
        tile = self.alloc(staged.TILE_BYTES)
        counts, numbers = self.alloc(8), self.alloc(32)
        first = bx * turns
        turns = cutlass.min(turns, x.shape[0] * down * across - first)
        batch, band, bar = position(x, first)
        staged.copy_tile(tile, x, batch, band * staged.SIDE, bar * staged.SIDE, tid)
        key = (Uint32(0), Uint32(0))
        if cutlass.const_expr(self.has_dice):
            key = ptx.load_v2(seed)
        if tid == 0:
            shared.store_v2(counts, Uint32(0), Uint32(0))
            if cutlass.const_expr(self.row is not None):
                store_numbers(numbers, amax_row, self.row.rules.qs)
        if tid == 32:
            if cutlass.const_expr(self.col is not None):
                store_numbers(numbers + 16, amax_col, self.col.rules.qs)
        arch.sync_threads()
        rows = cols = None
        if cutlass.const_expr(self.row is not None):
            rows = self.constants(
                numbers, values_row, scales_row, (x.shape[1], x.shape[2]), stream_row, key, counts
            )
        if cutlass.const_expr(self.col is not None):
            cols = self.constants(
                numbers + 16, values_col, scales_col, (x.shape[2], x.shape[1]), stream_col, key,
                counts + 4,
            )  # fmt: skip
        for turn in cutlass.range(turns):
            shared.wait_copies()
            arch.sync_threads()
            if cutlass.const_expr(self.row is not None):
                out = output(rows, batch, band, bar)
                self.quantize_rows(tile, out, turn, tid, half_exponents)
            if cutlass.const_expr(self.col is not None):
                out = output(cols, batch, bar, band)
                self.quantize_columns(tile, out, turn, tid, half_exponents)
            arch.sync_threads()
            # Two warps write the scales of rows, the next two those of columns.
            if cutlass.const_expr(self.row is not None):
                if tid < 64:
                    out = output(rows, batch, band, bar)
                    staged.write_scales(rows.staged, out.scales, out.blocks, tid)
            if cutlass.const_expr(self.col is not None):
                if tid >= 64 and tid < 128:
                    out = output(cols, batch, bar, band)
                    staged.write_scales(cols.staged, out.scales, out.blocks, tid - 64)
            bar += 1
            if bar == across:
                bar = Int32(0)
                band += 1
                if band == down:
                    band = Int32(0)
                    batch += 1
            if turn + 1 < turns:
                staged.copy_tile(tile, x, batch, band * staged.SIDE, bar * staged.SIDE, tid)
            found = shared.load_v2(counts)
            if found[0] >= ENOUGH or found[1] >= ENOUGH or turn + 1 == turns:
                arch.sync_threads()  # the exact scales come last
                self.finish(x, rows, cols, first, found, tid)
                arch.sync_threads()
                if tid == 0:
                    shared.store_v2(counts, Uint32(0), Uint32(0))

    def alloc(self, size: int) -> Any:
        """Shared address of `size` bytes."""
        return shared.address_of(arch.alloc_smem(cutlass.Uint8, size, alignment=128))

    @cute.jit
    def constants(
        self,
        numbers: Uint32,
        values: Int64,
        scales: Int64,
        shape: tuple[Int32, Int32],
        stream: Uint32,
        key: Any,
        count: Uint32,
    ) -> Any:
        """Of the orientation in which a matrix has this shape."""
        amax, encode, decode, outside = shared.load_v4(numbers)
        return Constants(
            tensor=contract.Tensor(ptx.real(amax), ptx.real(encode), ptx.real(decode)),
            outside=outside,
            values=values,
            scales=scales,
            rows=shape[0],
            chunks=cute.ceil_div(shape[1], 64),
            tiles=cute.ceil_div(shape[0], staged.SIDE),
            stream=stream,
            key=key,
            staged=self.alloc(staged.SCALE_BYTES),
            queue=self.alloc(2 * QUEUE),
            count=count,
        )

    @cute.jit
    def quantize_rows(
        self, tile: Uint32, out: Any, turn: Int32, tid: Int32, half_exponents: Uint32
    ) -> None:
        """All row blocks of a tile."""
        near = Uint32(0)
        for i in cutlass.range(ROUNDS):
            row, block = row_task(tid, i)
            words = staged.row_block(tile, row, block)
            found = self.quantize(words, self.row, out, row, block, half_exponents)
            near = near | (found << Uint32(i))
        self.remember(out.constants, near, turn, tid)

    @cute.jit
    def quantize_columns(
        self, tile: Uint32, out: Any, turn: Int32, tid: Int32, half_exponents: Uint32
    ) -> None:
        """All column blocks of a tile, two neighbours a round."""
        near = Uint32(0)
        this, other = cute.make_rmem_tensor(8, Uint32), cute.make_rmem_tensor(8, Uint32)
        for i in cutlass.range(ROUNDS // 2):
            pair, group = column_task(tid, i)
            even, odd = staged.column_pair(tile, group, pair)
            for j in cutlass.range_constexpr(8):
                this[j], other[j] = even[j], odd[j]
            for side in cutlass.range(2):
                words = [this[j] for j in range(8)]
                column = pair * 2 + side
                found = self.quantize(words, self.col, out, column, group, half_exponents)
                near = near | (found << Uint32(i * 2 + side))
                for j in cutlass.range_constexpr(8):
                    this[j] = other[j]
        self.remember(out.constants, near, turn, tid)

    @cute.jit
    def quantize(
        self,
        words: list[Any],
        side: cutlass.Constexpr,
        out: Any,
        row: Int32,
        block: Int32,
        half_exponents: Uint32,
    ) -> Uint32:
        """Quantize one block as far as a filter can; whether it could not."""
        exists = Uint32(0)
        if row < out.rows and block < out.blocks:
            exists = ptx.u32(0xFF)
        words = fast.rotated(words) if cutlass.const_expr(side.rht) else words
        constants = out.constants
        dice = throw(side, out, row, block)
        done = fast.block(words, constants.tensor, side.rules, dice, half_exponents)
        ptx.store_v2(address(out, row, block), done.low, done.high, exists)
        place = constants.staged + Uint32(staged.place_of_scale(row, block))
        shared.store_u8(place, done.scale & exists)
        return (done.near | constants.outside) & exists

    @cute.jit
    def remember(self, constants: Any, near: Uint32, turn: Int32, tid: Int32) -> None:
        """Queue this thread's undecided blocks of a tile, a bit a round."""
        if near != 0:
            slot = shared.atomic_add(constants.count, ptx.popc(near))
            while near != 0:
                entry = (Uint32(turn) * ROUNDS + ptx.find_low(near)) * THREADS + Uint32(tid)
                shared.store_u16(constants.queue + slot * 2, entry)
                near = near & (near - 1)
                slot += 1

    @cute.jit
    def finish(
        self, x: cute.Tensor, rows: Any, cols: Any, first: Int32, found: Any, tid: Int32
    ) -> None:
        """The undecided blocks: warps take 32 at a time, of rows first."""
        tasks_row, tasks_col = (found[0] + 31) >> 5, (found[1] + 31) >> 5
        lane = Uint32(tid & 31)
        for task in cutlass.range(Uint32(tid >> 5), tasks_row + tasks_col, WARPS):
            if cutlass.const_expr(self.row is not None):
                entry = task * 32 + lane
                if task < tasks_row and entry < found[0]:
                    self.finish_row(x, rows, first, Int32(shared.load_u16(rows.queue + entry * 2)))
            if cutlass.const_expr(self.col is not None):
                entry = (task - tasks_row) * 32 + lane
                if task >= tasks_row and entry < found[1]:
                    self.finish_col(x, cols, first, Int32(shared.load_u16(cols.queue + entry * 2)))

    @cute.jit
    def finish_row(self, x: cute.Tensor, constants: Any, first: Int32, entry: Int32) -> None:
        """One row block."""
        tid, i, turn = parts(entry)
        row, block = row_task(tid, i)
        batch, band, bar = position(x, first + turn)
        col = bar * staged.SIDE + block * 16
        at = x.iterator.toint() + 2 * (
            Int64(batch) * x.stride[0] + Int64(band * staged.SIDE + row) * x.stride[1] + Int64(col)
        )
        words: list[Any] = []
        for half in cutlass.range_constexpr(2):
            wanted = Uint32(1) if col + 8 * half < x.shape[2] else Uint32(0)
            words += ptx.load_stream_v4(at + 16 * half, wanted)
        self.finish_block(words, self.row, output(constants, batch, band, bar), row, block)

    @cute.jit
    def finish_col(self, x: cute.Tensor, constants: Any, first: Int32, entry: Int32) -> None:
        """One column block."""
        tid, i, turn = parts(entry)
        pair, group = column_task(tid, i >> 1)
        column = pair * 2 + (i & 1)
        batch, band, bar = position(x, first + turn)
        row = band * staged.SIDE + group * 16
        at = x.iterator.toint() + 2 * (
            Int64(batch) * x.stride[0]
            + Int64(row) * x.stride[1]
            + Int64(bar * staged.SIDE + column)
        )
        halves = []
        for j in cutlass.range_constexpr(16):
            wanted = Uint32(1) if row + j < x.shape[1] else Uint32(0)
            halves.append(ptx.load_b16(at + j * 2 * x.stride[1], wanted))
        words = [ptx.prmt(halves[j], halves[j + 1], 0x5410) for j in range(0, 16, 2)]
        self.finish_block(words, self.col, output(constants, batch, bar, band), column, group)

    @cute.jit
    def finish_block(
        self, words: list[Any], side: cutlass.Constexpr, out: Any, row: Int32, block: Int32
    ) -> None:
        """By the contract, straight to global memory."""
        words = fast.rotated(words) if cutlass.const_expr(side.rht) else words
        dice = throw(side, out, row, block)
        tensor, outside = out.constants.tensor, out.constants.outside
        codes, scale = fast.exact(words, tensor, side.rules, dice, outside)
        ptx.store_v2(address(out, row, block), codes[0], codes[1], 1)
        ptx.store_u8(out.scales + staged.place_of_scale(row, block), scale, 1)


@cute.jit
def position(x: cute.Tensor, number: Int32) -> Any:
    """(batch, tile down, tile across) of a tile."""
    down = cute.ceil_div(x.shape[1], staged.SIDE)
    across = cute.ceil_div(x.shape[2], staged.SIDE)
    line = number // across
    return line // down, line % down, number % across


def output(constants: Any, batch: Any, down: Any, across: Any) -> Any:
    """The tile at these places in one orientation."""
    chunks = constants.chunks
    line = Int64(batch) * constants.rows + down * staged.SIDE
    band = Int64(batch) * constants.tiles + down
    return Output(
        constants=constants,
        values=constants.values + line * (chunks * 32) + across * (staged.SIDE // 2),
        rows=constants.rows - down * staged.SIDE,
        blocks=chunks * 4 - across * 8,
        group=line * (chunks * 4) + across * 8,
        scales=constants.scales + (band * chunks + across * 2) * 512,
    )


def throw(side: Side, out: Any, row: Any, block: Any) -> list[Any] | None:
    """The dice of a block."""
    if side.rules.rounding == "nearest":
        return None
    group = out.group + Int64(row) * (out.constants.chunks * 4) + block
    return contract.philox(out.constants.key, tiles.words_of(group), out.constants.stream)


def store_numbers(to: Any, amax: Any, qs: float) -> None:
    """What is common to all blocks of an orientation: two divisions, by one thread for all."""
    tensor = contract.tensor_of(ptx.load_f32(amax), qs)
    numbers = [ptx.bits(number) for number in tensor]
    shared.store_v4(to, [*numbers, contract.outside_midrange(tensor)])


def row_task(tid: Any, turn: Any) -> tuple[Any, Any]:
    """(row, block): a warp takes 8 blocks of 4 rows."""
    return (turn * WARPS + (tid >> 5)) * 4 + ((tid & 31) >> 3), tid & 7


def column_task(tid: Any, turn: Any) -> tuple[Any, Any]:
    """(pair of columns, group of 16 rows): a warp takes 8 pairs of 4 groups.

    The four groups of a column are 32 bytes of values, a sector. The pairs are those of two chunks
    that lie 4 words apart, as `staged` wants it.
    """
    warp, lane = tid >> 5, tid & 31
    chunk = ((warp >> 1) * 2 + (lane >> 4)) * 2 + (warp & 1)
    return chunk * 4 + ((lane >> 2) & 3), turn * 4 + (lane & 3)


def parts(entry: Any) -> tuple[Any, Any, Any]:
    """(thread, round, tile of the CTA) of a queue's entry."""
    return entry % THREADS, (entry // THREADS) % ROUNDS, entry // (THREADS * ROUNDS)


def address(out: Any, row: Any, block: Any) -> Any:
    """Of the values of a block."""
    return out.values + Int64(row) * (out.constants.chunks * 32) + block * 8
