"""Eighth rung: an NVFP4 GEMM of warp-level block-scaled MMAs, persistent. sm_120a.

One warp loads by tensor copies into a ring of stages; eight warps multiply. Cooperative: all eight
share a tile. Pingpong: two groups of four take turns, one multiplies while the other writes.

A tile is 128 x 128. Scales are in the 128x4 blocked layout, where the 16 bytes at ``16 r`` are the
scales of rows r, r + 32, r + 64, r + 96 over 64 numbers of K. That is why the MMAs of a warp are 32
rows, and 32 columns, apart: one load of 16 bytes gives a lane its scales for four of them.
"""

from typing import Any, Literal

import cuda.bindings.driver as cuda
import cutlass
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass.cute import arch
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_tensor
from cutlass.memory import SmemAllocator

from fos_compile.kernels.cute import ptx, shared
from tests.emulator.kernels import compiled, vector

TILE, TILE_K, MMA_K = 128, 128, 64
ROW_BYTES = TILE_K // 2
"""Of a tile, the span of the 64-byte swizzle: 16-byte chunk c of row r is at c ^ (r // 2) % 4."""
TILE_BYTES = TILE * ROW_BYTES
SCALE_BYTES = TILE * TILE_K // 16
STAGE_BYTES = 2 * (TILE_BYTES + SCALE_BYTES)
WARPS = 8
"""That multiply: two along M, the others along N."""
MMAS_M = 4
"""Of 16 rows each, that a warp stacks along M."""


def _ldmatrix(address: Any) -> tuple[Any, ...]:
    """Four matrices of 8 rows of 16 bytes; lane l has the address of row l % 8 of matrix l / 8."""
    code = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];"
    return arch.inline_ptx(code, write_only_types=[Uint32] * 4, read_only_args=[address])


def _mma(a: Any, b: Any, c: Any, sfa: Any, sfb: Any, lane: int) -> tuple[Any, ...]:
    """a @ b + c, 16 x 8 x 64. Columns' scales come from the lanes l with l % 4 == `lane`."""
    code = (
        "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col"
        ".f32.e2m1.e2m1.f32.ue4m3 {{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, "
        "{{$r4}, {$r5}}, {{$r6}, {$r7}, {$r8}, {$r9}}, "
        f"{{$r10}}, {{0, 0}}, {{$r11}}, {{0, {lane}}};"
    )
    operands = [*a, *b, *c, sfa, sfb]
    return arch.inline_ptx(code, write_only_types=[Float32] * 4, read_only_args=operands)


class Gemm:
    """c = alpha * (a * sfa) @ (b * sfb).T: `groups` of warps with a tile each."""

    def __init__(self, groups: int, stages: int) -> None:
        self.groups, self.stages = groups, stages
        self.mmas_n = 4 * groups

    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,  # [M, K / 2] bytes, two E2M1 each
        b: cute.Tensor,  # [N, K / 2] likewise
        sfa: cute.Tensor,  # [M / 128 * K / 64 * 512] bytes, rounded up: E4M3, blocked
        sfb: cute.Tensor,  # [N / 128 * K / 64 * 512] likewise
        c: cute.Tensor,  # [M, N] float32, bfloat16 or float16
        alpha: Float32,
        ctas: Int32,  # at most: the number of SMs
        stream: cuda.CUstream,
    ) -> None:
        blocks = cute.ceil_div(a.shape[1], MMA_K // 2)
        a_load, a_tiles = self.values(a)
        b_load, b_tiles = self.values(b)
        sfa_load, sfa_tiles = self.scales(sfa, cute.ceil_div(a.shape[0], TILE), blocks)
        sfb_load, sfb_tiles = self.scales(sfb, cute.ceil_div(b.shape[0], TILE), blocks)
        tiles = cute.ceil_div(c.shape[0], TILE) * cute.ceil_div(c.shape[1], TILE)
        self.kernel(
            (a_load, b_load, sfa_load, sfb_load),
            (a_tiles, b_tiles, sfa_tiles, sfb_tiles),
            c,
            alpha,
        ).launch(
            grid=(min(tiles, ctas), 1, 1),
            block=(32 * (WARPS + 1), 1, 1),
            min_blocks_per_mp=1,  # without it, ptxas ignores setmaxnreg
            stream=stream,
        )

    def values(self, matrix: Any) -> Any:
        """Tensor copies of 128 rows; what is beyond the matrix becomes 0."""
        rows = cute.make_layout((TILE, ROW_BYTES), stride=(ROW_BYTES, 1))
        place = cute.make_composed_layout(cute.make_swizzle(2, 4, 3), 0, rows)
        op = cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(op, matrix, place, (TILE, ROW_BYTES))

    def scales(self, scales: Any, row_blocks: Any, blocks: Any) -> Any:
        """Tensor copies of a block of rows, a word a row for each 64 numbers of K."""
        words = cute.assume(blocks * TILE, divby=TILE)
        layout = cute.make_layout((row_blocks, words), stride=(words, 1))
        matrix = cute.make_tensor(cute.recast_ptr(scales.iterator, dtype=Int32), layout)
        tile = (1, SCALE_BYTES // 4)
        place = cute.make_layout(tile, stride=(tile[1], 1))
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), matrix, place, tile)

    @cute.kernel
    def kernel(self, loads: tuple, operands: tuple, c: cute.Tensor, alpha: Float32) -> None:
        """One CTA: every gridDim-th tile, down the columns of c."""
        warp, smem = arch.make_warp_uniform(arch.warp_idx()), SmemAllocator()
        rows = cute.make_layout((TILE, ROW_BYTES, self.stages), stride=(ROW_BYTES, 1, TILE_BYTES))
        words = SCALE_BYTES // 4
        scales = cute.make_layout((1, words, self.stages), stride=(words, 1, words))
        swizzle = cute.make_swizzle(2, 4, 3)
        stages = (
            smem.allocate_tensor(Uint8, rows, 1024, swizzle),
            smem.allocate_tensor(Uint8, rows, 1024, swizzle),
            smem.allocate_tensor(Int32, scales, 128),
            smem.allocate_tensor(Int32, scales, 128),
        )
        full, empty = (smem.allocate_array(Int64, self.stages) for _ in range(2))
        turns = smem.allocate_array(Int64, self.groups)
        if warp == 0:
            with arch.elect_one():
                for stage in cutlass.range_constexpr(self.stages):
                    arch.mbarrier_init(full + stage, 1)
                    arch.mbarrier_init(empty + stage, WARPS // self.groups)
                for group in cutlass.range_constexpr(self.groups):
                    arch.mbarrier_init(turns + group, WARPS // self.groups)
                arch.mbarrier_init_fence()
        arch.sync_threads()
        if warp == WARPS:
            arch.setmaxregister_decrease(40)
            self.load(loads, operands, stages, full, empty, c)
        else:
            arch.setmaxregister_increase(232)
            steps = cute.ceil_div(operands[0].shape[1], ROW_BYTES)
            self.multiply(warp, stages, full, empty, turns, c, alpha, steps)

    def share(self, c: cute.Tensor) -> Any:
        """Tiles along M, and how many tiles this CTA has."""
        tiles_m = cute.ceil_div(c.shape[0], TILE)
        tiles = tiles_m * cute.ceil_div(c.shape[1], TILE)
        return tiles_m, cute.ceil_div(tiles - arch.block_idx()[0], arch.grid_dim()[0])

    @cute.jit
    def load(
        self,
        loads: tuple,
        operands: tuple,
        stages: tuple,
        full: cute.Pointer,
        empty: cute.Pointer,
        c: cute.Tensor,
    ) -> None:
        """Fill the stages in turn, each as soon as it was read."""
        tiles_m, count = self.share(c)
        a, b, sfa, sfb = (self.split(*each) for each in zip(loads, stages, operands, strict=True))
        stage, phase = Int32(0), Int32(1)
        for i in cutlass.range(count, unroll=1):
            tile = arch.block_idx()[0] + i * arch.grid_dim()[0]
            m, n = tile % tiles_m, tile // tiles_m
            for k in cutlass.range(cute.size(a[1], mode=[2]), unroll=1):
                arch.mbarrier_wait(empty + stage, phase)
                with arch.elect_one():
                    arch.mbarrier_arrive_and_expect_tx(full + stage, STAGE_BYTES)
                for load, parts, at in zip(loads, (a, b, sfa, sfb), (m, n, m, n), strict=True):
                    source, to = parts[1][None, at, k], parts[0][None, stage]
                    cute.copy(load, source, to, tma_bar_ptr=full + stage)
                stage, phase = self.advance(stage, phase)

    def split(self, load: Any, stages: Any, matrix: Any) -> Any:
        """Both sides of a tensor copy: shared memory by stage, the operand by tile."""
        tile = stages.shape[:2]
        tiles = cute.local_tile(matrix, tile, (None, None))
        stages, tiles = cute.group_modes(stages, 0, 2), cute.group_modes(tiles, 0, 2)
        return cpasync.tma_partition(load, 0, cute.make_layout(1), stages, tiles)

    @cute.jit
    def advance(self, stage: Int32, phase: Int32) -> Any:
        """The next stage, and the parity of its use."""
        stage += 1
        if stage == self.stages:
            stage, phase = Int32(0), phase ^ 1
        return stage, phase

    @cute.jit
    def multiply(
        self,
        warp: Int32,
        stages: tuple,
        full: cute.Pointer,
        empty: cute.Pointer,
        turns: cute.Pointer,
        c: cute.Tensor,
        alpha: Float32,
        steps: Int32,
    ) -> None:
        """Multiply the stages of every tile of the group in turn; write what comes out."""
        tiles_m, count = self.share(c)
        warps = WARPS // self.groups
        group, member = warp // warps, warp % warps
        at = member % 2, member // 2
        reads = self.addresses(stages, at)
        a = cute.make_rmem_tensor((4, MMAS_M, 2), Uint32)
        b = cute.make_rmem_tensor((2, self.mmas_n, 2), Uint32)
        scales = cute.make_rmem_tensor((4, 2, 2), Uint32)
        sums = cute.make_rmem_tensor((4, MMAS_M, self.mmas_n), Float32)
        for i in cutlass.range(group, count, self.groups, unroll=1):
            stage, phase = i * steps % self.stages, i * steps // self.stages % 2
            sums.fill(0.0)
            if cutlass.const_expr(self.groups == 2):
                # Until the other group has seen all its stages filled: `phase` is but a parity.
                arch.mbarrier_wait(turns + group, (i // 2 + 1 + group) % 2)
            arch.mbarrier_wait(full + stage, phase)
            self.fetch(reads, stage, 0, a, b, scales)
            for k in cutlass.range(steps, unroll=1):
                self.fetch(reads, stage, 1, a, b, scales)
                arch.sync_warp()  # all lanes have read
                with arch.elect_one():
                    arch.mbarrier_arrive(empty + stage)
                self.accumulate(0, a, b, scales, sums)
                stage, phase = self.advance(stage, phase)
                if k + 1 < steps:
                    arch.mbarrier_wait(full + stage, phase)
                    self.fetch(reads, stage, 0, a, b, scales)
                self.accumulate(1, a, b, scales, sums)
            if cutlass.const_expr(self.groups == 2):
                with arch.elect_one():
                    arch.mbarrier_arrive(turns + 1 - group)
            tile = arch.block_idx()[0] + i * arch.grid_dim()[0]
            place = tile % tiles_m * TILE, tile // tiles_m * TILE
            self.write(sums, alpha, c, place, at)

    def column(self, i: int) -> int:
        """First column of the i-th MMA along N of the first warp."""
        return 32 * (i // self.groups) + 8 * (i % self.groups)

    def addresses(self, stages: Any, at: Any) -> Any:
        """Where a lane reads a, b and their scales in the first stage for the first MMA."""
        lane = arch.lane_idx()
        row, half = 16 * at[0] + lane % 16, lane // 16
        col = 8 * self.groups * at[1] + lane // 16 * self.column(1) + lane % 8
        a, b, sfa, sfb = (shared.address_of(each.iterator) for each in stages)
        a += row * ROW_BYTES + (half ^ row // 2 % 4) * 16
        b += col * ROW_BYTES + (lane // 8 % 2 ^ col // 2 % 4) * 16
        # Lane 4 g + t: of row g + 8 (t % 2); of column g, or with two groups of g + 8 (t % 2).
        sfa += (16 * at[0] + lane % 2 * 8 + lane // 4) * 16
        sfb += (8 * self.groups * at[1] + lane % self.groups * 8 + lane // 4) * 16
        return a, b, sfa, sfb

    def fetch(self, reads: Any, stage: Any, block: int, a: Any, b: Any, scales: Any) -> None:
        """Load the operands of the MMAs over 64 numbers of K, the first or second of a stage."""
        # The second block is two chunks further along a row, which also is an exclusive or.
        at_a, at_b = ((each + stage * TILE_BYTES) ^ (32 * block) for each in reads[:2])
        for i in range(MMAS_M):
            for j, word in enumerate(_ldmatrix(at_a + 32 * ROW_BYTES * i)):
                a[j, i, block] = word
        for i in range(0, self.mmas_n, 2):
            for j, word in enumerate(_ldmatrix(at_b + self.column(i) * ROW_BYTES)):
                b[j % 2, i + j // 2, block] = word
        for side in range(2):
            address = reads[2 + side] + stage * SCALE_BYTES + block * SCALE_BYTES // 2
            for j, word in enumerate(shared.load_v4(address)):
                scales[j, side, block] = word

    def accumulate(self, block: int, a: Any, b: Any, scales: Any, sums: Any) -> None:
        """Add the products over 64 numbers of K."""
        for j in range(self.mmas_n):
            for i in range(MMAS_M):
                result = _mma(
                    [a[each, i, block] for each in range(4)],
                    [b[each, j, block] for each in range(2)],
                    [sums[each, i, j] for each in range(4)],
                    scales[i, 0, block],
                    scales[j // self.groups, 1, block],
                    j % self.groups,
                )
                for each in range(4):
                    sums[each, i, j] = result[each]

    @cute.jit
    def write(self, sums: cute.Tensor, alpha: Float32, c: cute.Tensor, place: tuple, at: tuple):
        """Scale, round and store, two neighbours at a time."""
        lane = arch.lane_idx()
        size = c.element_type.width // 8
        for i in cutlass.range_constexpr(2 * MMAS_M):
            row = place[0] + 16 * at[0] + 32 * (i // 2) + 8 * (i % 2) + lane // 4
            start = c.iterator.toint() + row * Int64(c.stride[0]) * size
            for j in cutlass.range_constexpr(self.mmas_n):
                col = place[1] + 8 * self.groups * at[1] + self.column(j) + lane % 4 * 2
                pair = [ptx.mul(sums[i % 2 * 2 + each, i // 2, j], alpha) for each in range(2)]
                if row < c.shape[0]:
                    if col + 1 < c.shape[1]:
                        _store(start + col * size, pair, c.element_type)
                    elif col < c.shape[1]:
                        c[row, col] = pair[0].to(c.element_type)


def _store(address: Any, pair: Any, dtype: Any) -> None:
    """Two numbers to an aligned address, rounded to `dtype`."""
    if dtype is Float32:
        ptx.store_v2(address, *(ptx.bits(each) for each in pair), 1)
    else:
        convert = {BFloat16: ptx.bfloat16x2, Float16: ptx.half2}[dtype]
        ptx.store_b32(address, convert(*pair), 1)


def _rows(dtype: Any, step: int) -> Any:
    """Placeholder for a row-major matrix whose rows begin at multiples of `step` elements."""
    shape, stride = (cute.sym_int32(), cute.sym_int32()), (cute.sym_int64(divisibility=step), 1)
    return make_fake_tensor(dtype, shape, stride, assumed_align=step * dtype.width // 8)


def compile_block_scaled(
    schedule: Literal["cooperative", "pingpong"], stages: int = 5, output: Any = BFloat16
) -> Any:
    """(a [M, K/2], b [N, K/2], sfa, sfb, c [M, N], alpha, ctas): c = alpha * a @ b.T, scaled.

    a and b are bytes of two E2M1, sfa and sfb bytes of E4M3 in the 128x4 blocked layout; padding
    in it must be finite. K > 0 is a multiple of 32: rows begin at 16 bytes. M and N are any, but
    rows of c begin at an even number. `stages` of 18 KB: 5 fill the 99 KB of an SM.
    """
    kernel = Gemm({"cooperative": 1, "pingpong": 2}[schedule], stages)
    operands = [_rows(Uint8, 16) for _ in range(2)] + [vector(Uint8, 16) for _ in range(2)]
    return compiled("sm_120a", kernel, *operands, _rows(output, 2), Float32(0), Int32(0))
