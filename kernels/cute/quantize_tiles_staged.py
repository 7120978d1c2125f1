"""A bf16 matrix to NVFP4 in 2D blocks, in one or both orientations from one read: nearest, no RHT.

A warp takes 128 rows x 64 columns, 32 rows at a time: it copies them to shared memory, a lane has
four rows of one of eight tiles (`filtered_tiles`), and 64 codes of each orientation come out of one
rounding. It shares nothing with other warps, so it waits for none. Rows of values are stored as
they are found, 32 bytes of each; columns are transposed in shared memory until 64 rows are there.

Tiles that the filter cannot decide are remembered, a bit each, and go through `contract` when the
128 rows are done: if both orientations are wanted, half a warp has the tile and the other half its
transpose, since the order in which the contract adds up errors depends on it.

The two orientations of a pair have an amax each. Those are normally the same number; where they
are not, the warp does everything twice, once for each.
"""

from typing import Any, NamedTuple

import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass.cute import arch

from fos_compile.kernels.cute import (
    contract,
    filtered,
    filtered_tiles,
    ptx,
    shared,
    tensor_constants,
    warp_tiles,
)
from fos_compile.kernels.cute.host_quantize_tiles_staged import CTAS_PER_SM, THREADS

WARPS = THREADS // 32
ROW, COL = 1, 2
"""Bits of orientations."""
NOTHING = 32
"""No tile: there are 32."""


class Corner(NamedTuple):
    """A 2D tile as it is quantized: if `is_col`, rows are columns of x."""

    batch: Any
    row: Any
    col: Any
    rows: Any
    """Of the whole matrix."""
    cols: Any
    is_col: Any
    i: Any
    """Of this thread."""


class Buffers(NamedTuple):
    """Addresses of the outputs."""

    values_row: Any
    scales_row: Any
    values_col: Any
    scales_col: Any


class QuantizeTilesStaged:
    """Kernel for one set of static options.

    Attributes:
        rules: mse or static_6, nearest, 2d.
        row: whether x is quantized.
        col: whether x.mT is.
    """

    def __init__(self, rules: contract.Rules, *, row: bool, col: bool) -> None:
        self.rules = rules
        self.row = row
        self.col = col

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,  # [B, R, C] bfloat16, columns contiguous, all a multiple of 16 bytes
        amax_row: Int64,  # address of float32 []; anything without that orientation, as below
        amax_col: Int64,
        values_row: Int64,  # address of uint8 [B, R, roundup(C, 64) / 2]
        scales_row: Int64,  # address of uint8 [B, L]
        values_col: Int64,  # address of uint8 [B, C, roundup(R, 64) / 2]
        scales_col: Int64,
        half_exponents: Uint32,  # of host_quantize_filtered
        stream: Any,
    ) -> None:
        """Launch on `stream`."""
        groups = self.groups(x)
        self.kernel(
            x, amax_row, amax_col, values_row, scales_row, values_col, scales_col, half_exponents
        ).launch(
            grid=(cute.ceil_div(x.shape[1], warp_tiles.BAND) * groups, x.shape[0], 1),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=CTAS_PER_SM,
            preferred_smem_carveout=100,
        )

    def groups(self, x: cute.Tensor) -> Any:
        """CTAs along a row; columns have scales up to a multiple of 128."""
        chunks = cute.ceil_div(x.shape[2], warp_tiles.COLS)
        if self.col:
            chunks = cute.ceil_div(x.shape[2], 2 * warp_tiles.COLS) * 2
        return cute.ceil_div(chunks, WARPS)

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        amax_row: Int64,
        amax_col: Int64,
        values_row: Int64,
        scales_row: Int64,
        values_col: Int64,
        scales_col: Int64,
        half_exponents: Uint32,
    ) -> None:
        """One CTA."""
        tid, _, _ = arch.thread_idx()
        number, batch, _ = arch.block_idx()
        warp, lane = tid >> 5, tid & 31
        memory = warp_tiles.memory(self.alloc(), warp, WARPS)
        if lane == 0:
            groups = self.groups(x)
            # CTAs walk along rows, then down.
            top = number // groups * warp_tiles.BAND
            left = (number % groups * WARPS + warp) * warp_tiles.COLS
            warp_tiles.store_place(memory.place, batch, top, left)
        arch.sync_warp()
        to = Buffers(values_row, scales_row, values_col, scales_col)
        wanted = Uint32(ROW if self.row else 0) | Uint32(COL if self.col else 0)
        if cutlass.const_expr(self.row and self.col):
            if ptx.load_b32(amax_row, 1) != ptx.load_b32(amax_col, 1):
                wanted = Uint32(ROW)
            while wanted != 0:
                amax = amax_col if wanted == COL else amax_row
                self.quantize(x, memory, to, amax, wanted, lane, half_exponents)
                wanted = Uint32(COL) if wanted == ROW else Uint32(0)
                arch.sync_warp()
        else:
            amax = amax_row if cutlass.const_expr(self.row) else amax_col
            self.quantize(x, memory, to, amax, wanted, lane, half_exponents)

    def alloc(self) -> Any:
        """Shared address of the memory of all warps."""
        size = WARPS * warp_tiles.BYTES
        return shared.address_of(arch.alloc_smem(cutlass.Uint8, size, alignment=128))

    @cute.jit
    def quantize(
        self,
        x: cute.Tensor,
        memory: Any,
        to: Any,
        amax: Int64,
        wanted: Uint32,
        lane: Int32,
        half_exponents: Uint32,
    ) -> None:
        """All that this warp has, in the orientations that are `wanted` with this amax."""
        here = warp_tiles.load_place(memory.place)
        exists = here.left < x.shape[2]
        units = cutlass.min(
            (x.shape[1] - here.top + warp_tiles.UNIT - 1) // warp_tiles.UNIT,
            warp_tiles.BAND // warp_tiles.UNIT,
        )
        rounds = units * (warp_tiles.UNIT // warp_tiles.ROWS) if exists else Int32(0)
        source = warp_tiles.address_in(
            x, here.batch, here.top + (lane >> 3), here.left + (lane & 7) * 8
        )
        if exists:
            warp_tiles.copy(memory.tile, x, here, source, here.top, lane)
        if lane == 0:
            tensor_constants.store(memory.constants, amax, self.rules)
        # A lane has rows 4 u, ... of the tile in column c, and writes 8 bytes of each.
        u, c = lane >> 2, lane & 3
        mine = memory.tile + Uint32(u * 512 + ((c * 2) ^ (u & 1)) * 16)
        pitch = cute.ceil_div(x.shape[2], warp_tiles.COLS) * (warp_tiles.COLS // 2)
        line = Int64(here.batch) * x.shape[1] + here.top + u * 4
        values = to.values_row + line * pitch + (here.left >> 1) + c * 8
        head = Uint32(1) if (u & 3) == 0 else Uint32(0)  # writes the scale of the tile
        for j in cutlass.range(rounds, unroll=1):
            warp_tiles.wait()
            tensor, outside = tensor_constants.load(memory.constants)
            choice = self.choose(mine, tensor, half_exponents)
            found = warp_tiles.ballot(choice.near | outside)
            if lane == 0:
                shared.store_b32(memory.near + Uint32(j * 4), found)
            existing = x.shape[1] - (
                here.top + j * warp_tiles.ROWS + u * 4
            )  # of this lane's rows, or more
            words = self.encode(
                mine, choice, values, pitch, existing if (wanted & ROW) != 0 else Int32(0)
            )
            values += warp_tiles.ROWS * Int64(pitch)
            if cutlass.const_expr(self.col):
                warp_tiles.store_columns(memory.columns, words, j & 1, lane)
                if head != 0:
                    at = c * 4 + (j & 1) * 2 + (u >> 2)
                    shared.store_u8(memory.scales_col + Uint32(at), choice.scale)
            if cutlass.const_expr(self.row):
                if head != 0:
                    at = (u >> 2) * 16 + j * 4 + c
                    shared.store_u8(memory.scales_row + Uint32(at), choice.scale)
            arch.sync_warp()
            if j + 1 < rounds:
                source += warp_tiles.ROWS * x.stride[1] * 2
                warp_tiles.copy(
                    memory.tile, x, here, source, here.top + (j + 1) * warp_tiles.ROWS, lane
                )
            if cutlass.const_expr(self.col):
                if (j & 1) == 1 and (wanted & COL) != 0:
                    there = warp_tiles.load_place(memory.place)
                    at = warp_tiles.again(lane)
                    unit = (there.top + j * warp_tiles.ROWS) // warp_tiles.UNIT
                    warp_tiles.flush_columns(memory.columns, x, there, to.values_col, unit, at)
                    warp_tiles.flush_scales_col(
                        memory.scales_col, x, there, to.scales_col, unit, at
                    )
        arch.sync_warp()
        here, lane = warp_tiles.load_place(memory.place), warp_tiles.again(lane)
        if cutlass.const_expr(self.row):
            if exists and (wanted & ROW) != 0:
                warp_tiles.flush_scales_row(memory.scales_row, x, here, to.scales_row, lane)
        if cutlass.const_expr(self.col):
            if not exists and (wanted & COL) != 0:
                # Zeros for columns that do not exist, beside those that do.
                if (here.left & warp_tiles.COLS) != 0 and here.left - warp_tiles.COLS < x.shape[2]:
                    for unit in cutlass.range(units):
                        at = here.top // warp_tiles.UNIT + unit
                        warp_tiles.flush_scales_col(
                            memory.scales_col, x, here, to.scales_col, at, lane
                        )
        # Of the lanes of a tile one counts: bits 0 to 3 for the four upper tiles, 16 to 19 for the
        # lower ones.
        near = Uint32(0)
        for j in cutlass.range(rounds):
            found = shared.load_b32(memory.near + Uint32(j * 4))
            near = near | ((found & 0x000F000F) << Uint32(j * 4))
        if near != 0:
            arch.sync_warp()
            self.finish(x, memory, to, near, wanted, lane)

    @cute.jit
    def choose(self, mine: Uint32, tensor: Any, half_exponents: Uint32) -> Any:
        """Scale of this lane's tile, and whether that is certain."""
        rows = [warp_tiles.load_row(mine, i) for i in range(filtered_tiles.ROWS)]
        peak = filtered_tiles.top(rows)
        if cutlass.const_expr(not self.rules.adaptive):
            choice = filtered_tiles.single(peak, tensor)
        else:
            tile = filtered_tiles.tile_of(peak, tensor)
            error6, error4, norm = Float32(0), Float32(0), Float32(0)
            for i in cutlass.range(filtered_tiles.ROWS, unroll=1):
                six, four, squares = filtered_tiles.errors(
                    warp_tiles.load_row(mine, i), tile, half_exponents
                )
                error6, error4 = ptx.add(error6, six), ptx.add(error4, four)
                norm = ptx.add(norm, squares)
            choice = filtered_tiles.decide(tile, error6, error4, norm)
        return choice

    @cute.jit
    def encode(self, mine: Uint32, choice: Any, values: Int64, pitch: Int32, rows: Int32) -> Any:
        """Codes of this lane's rows: stores `rows` of them and returns the words of the columns."""
        signs = filtered_tiles.signs_of(choice)
        upper, lower = cute.make_rmem_tensor(4, Uint32), cute.make_rmem_tensor(4, Uint32)
        for k in cutlass.range_constexpr(4):
            lower[k] = Uint32(0)
        for pair in cutlass.range(filtered_tiles.ROWS // 2, unroll=1):
            a = filtered.without_negative_zeros(warp_tiles.load_row(mine, pair * 2))
            b = filtered.without_negative_zeros(warp_tiles.load_row(mine, pair * 2 + 1))
            codes = filtered_tiles.codes(a, b, choice.inverse, signs)
            for k in cutlass.range_constexpr(4):
                upper[k] = lower[k]
                lower[k] = codes[k]
            if cutlass.const_expr(self.row):
                above, below = filtered_tiles.row_words(codes)
                at = values + Int64(pair * 2) * pitch
                one = Uint32(1) if pair * 2 < rows else Uint32(0)
                two = Uint32(1) if pair * 2 + 1 < rows else Uint32(0)
                ptx.store_v2(at, above[0], above[1], one)
                ptx.store_v2(at + pitch, below[0], below[1], two)
        words = []
        if cutlass.const_expr(self.col):
            words = filtered_tiles.column_words(
                [upper[k] for k in range(4)], [lower[k] for k in range(4)]
            )
        return words

    @cute.jit
    def finish(
        self,
        x: cute.Tensor,
        memory: Any,
        to: Any,
        near: Uint32,
        wanted: Uint32,
        lane: Int32,
    ) -> None:
        """Tiles by the contract, straight to global memory.

        Half a warp takes a tile, the other half its transpose, or the next tile where only one
        orientation is of interest. A thread has column i of what is quantized, and writes row i.
        Everything is computed anew on both sides of the contract, which takes many registers.
        """
        while near != 0:
            entry = ptx.find_low(near)
            near = near & (near - 1)
            if cutlass.const_expr(not (self.row and self.col)):
                if lane >= 16:
                    entry = ptx.where_nonzero(near, ptx.find_low(near), NOTHING)
                near = near & ptx.where_nonzero(near, near - 1, 0)
            tensor, outside = tensor_constants.load(memory.constants)
            given = self.load_tile(x, memory, entry, lane)
            words, scale = contract.quantize_either(given, tensor, self.rules, None, outside)
            low, high = contract.transpose_bits(words, 4)
            entry, lane = warp_tiles.again(entry), warp_tiles.again(lane)
            self.store_tile(x, memory, to, entry, wanted, lane, (low, high), scale)

    @cute.jit
    def corner(self, x: cute.Tensor, memory: Any, entry: Uint32, lane: Int32) -> Any:
        """Where an undecided tile lies."""
        here = warp_tiles.load_place(memory.place)
        # Bits as `quantize` puts them: which half of 32 rows, which 32 rows, which columns.
        row = here.top + Int32(((entry >> 2) & 3) * warp_tiles.ROWS + ((entry >> 4) & 1) * 16)
        col = here.left + Int32((entry & 3) * 16)
        rows, cols = x.shape[1], x.shape[2]
        is_col = Int32(int(self.col))
        if cutlass.const_expr(self.row and self.col):
            is_col = lane >> 4
        if is_col != 0:
            row, col, rows, cols = col, row, cols, rows
        return Corner(here.batch, row, col, rows, cols, is_col, lane & 15)

    @cute.jit
    def load_tile(self, x: cute.Tensor, memory: Any, entry: Uint32, lane: Int32) -> Any:
        """Column i of a tile as float32, zeros outside the matrix."""
        at = self.corner(x, memory, entry, lane)
        down, along = x.stride[1], Int64(1)
        if at.is_col != 0:
            down, along = along, down
        offset = Int64(at.batch) * x.stride[0] + at.row * down + (at.col + at.i) * along
        first = x.iterator.toint() + offset * 2
        count = at.rows - at.row if at.col + at.i < at.cols else Int32(0)
        given = []
        for k in cutlass.range_constexpr(16):
            exists = Uint32(1) if k < count else Uint32(0)
            given.append(ptx.real(ptx.load_b16(first + k * 2 * down, exists) << 16))
        return given

    @cute.jit
    def store_tile(
        self,
        x: cute.Tensor,
        memory: Any,
        to: Any,
        entry: Uint32,
        wanted: Uint32,
        lane: Int32,
        words: Any,
        scale: Uint32,
    ) -> None:
        """Codes of row i of a tile and its scale, if it is one."""
        at = self.corner(x, memory, entry, lane)
        values, scales, side = to.values_row, to.scales_row, ROW
        if at.is_col != 0:
            values, scales, side = to.values_col, to.scales_col, COL
        row = at.row + at.i
        exists = Uint32(0)
        if row < at.rows and entry != NOTHING and (wanted & side) != 0:
            exists = Uint32(1)
        chunks = cute.ceil_div(at.cols, 64)
        line = Int64(at.batch) * at.rows + row
        ptx.store_v2(values + line * (chunks * 32) + (at.col >> 1), words[0], words[1], exists)
        tile = (Int64(at.batch) * cute.ceil_div(at.rows, 128) + (row >> 7)) * chunks + (at.col >> 6)
        place = (row & 31) * 16 + ((row >> 5) & 3) * 4 + ((at.col >> 4) & 3)
        ptx.store_u8(scales + tile * 512 + place, scale, exists)
