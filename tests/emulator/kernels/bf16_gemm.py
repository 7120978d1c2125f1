"""Fourth rung: a bfloat16 GEMM with tcgen05, float32 accumulators in tensor memory. sm_100a."""

from typing import Any, Literal

import cuda.bindings.driver as cuda
import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, cute
from cutlass.cute import arch
from cutlass.cute.nvgpu import cpasync, make_tiled_tma_atom_A, make_tiled_tma_atom_B, tcgen05
from cutlass.cute.runtime import make_fake_tensor
from cutlass.utils import SmemAllocator, blackwell_helpers

from tests.emulator.kernels import compiled

THREADS = 128
TILE_M, TILE_K = 128, 64
"""Rows are the lanes of tensor memory; 64 numbers are the span of the 128-byte swizzle."""
COLUMNS = 32
"""Of accumulators that a thread has in registers at a time."""


class Gemm:
    """c = a @ b.T: warp 0 loads, warp 1 multiplies, all four write the tile of a CTA."""

    def __init__(self, tile_n: int, stages: int) -> None:
        self.tile, self.stages = (TILE_M, tile_n, TILE_K), stages

    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,  # [M, K] bfloat16
        b: cute.Tensor,  # [N, K] bfloat16
        c: cute.Tensor,  # [M, N] float32 or bfloat16
        stream: cuda.CUstream,
    ) -> None:
        mma = cute.make_tiled_mma(
            tcgen05.MmaF16BF16Op(
                BFloat16,
                Float32,
                (*self.tile[:2], 16),
                tcgen05.CtaGroup.ONE,
                tcgen05.OperandSource.SMEM,
                tcgen05.OperandMajorMode.K,
                tcgen05.OperandMajorMode.K,
            )
        )
        a_smem = blackwell_helpers.make_smem_layout_a(mma, self.tile, BFloat16, self.stages)
        b_smem = blackwell_helpers.make_smem_layout_b(mma, self.tile, BFloat16, self.stages)
        op = cpasync.CopyBulkTensorTileG2SOp()
        a_stage, b_stage = (cute.select(each, mode=[0, 1, 2]) for each in (a_smem, b_smem))
        load_a, a = make_tiled_tma_atom_A(op, a, a_stage, self.tile, mma)
        load_b, b = make_tiled_tma_atom_B(op, b, b_stage, self.tile, mma)
        self.kernel(mma, load_a, a, load_b, b, c, a_smem, b_smem).launch(
            grid=(cute.ceil_div(c.shape[0], TILE_M), cute.ceil_div(c.shape[1], self.tile[1]), 1),
            block=(THREADS, 1, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        load_a: cute.CopyAtom,
        a: cute.Tensor,
        load_b: cute.CopyAtom,
        b: cute.Tensor,
        c: cute.Tensor,
        a_smem: cute.ComposedLayout,
        b_smem: cute.ComposedLayout,
    ) -> None:
        """One CTA."""
        warp, at = arch.make_warp_uniform(arch.warp_idx()), (*arch.block_idx()[:2], None)
        smem = SmemAllocator()
        a_tiles = smem.allocate_tensor(BFloat16, a_smem.outer, 1024, a_smem.inner)
        b_tiles = smem.allocate_tensor(BFloat16, b_smem.outer, 1024, b_smem.inner)
        full, empty = (smem.allocate_array(Int64, self.stages) for _ in range(2))
        done, address = smem.allocate(Int64, 8), smem.allocate(Int32, 4)
        if warp == 0:
            arch.alloc_tmem(self.tile[1], address)
            arch.relinquish_tmem_alloc_permit()
            with arch.elect_one():
                for stage in cutlass.range_constexpr(self.stages):
                    arch.mbarrier_init(full + stage, 1)
                    arch.mbarrier_init(empty + stage, 1)
                arch.mbarrier_init(done, 1)
                arch.mbarrier_init_fence()
        arch.sync_threads()
        columns = arch.retrieve_tmem_ptr(Float32, 16, address)
        shape = mma.partition_shape_C(self.tile[:2])
        sums = cute.make_tensor(columns, mma.make_fragment_C(shape).layout)
        part, places = mma.get_slice(0), cute.make_identity_tensor(c.shape)
        a_parts = part.partition_A(cute.local_tile(a, self.tile, at, (1, None, 1)))
        b_parts = part.partition_B(cute.local_tile(b, self.tile, at, (None, 1, 1)))
        places = part.partition_C(cute.local_tile(places, self.tile, at, (1, 1, None)))
        if warp == 0:
            a_copy, b_copy = split(load_a, a_tiles, a_parts), split(load_b, b_tiles, b_parts)
            self.load((load_a, *a_copy), (load_b, *b_copy), full, empty)
        if warp == 1:
            count = cute.size(a_parts, mode=[3])
            self.multiply(mma, sums, a_tiles, b_tiles, count, full, empty, done)
        arch.mbarrier_wait(done, 0)
        arch.inline_ptx("tcgen05.fence::after_thread_sync;")
        self.write(sums, places, c)
        arch.sync_threads()
        if warp == 0:
            arch.dealloc_tmem(columns, self.tile[1])

    @cute.jit
    def load(self, a: Any, b: Any, full: cute.Pointer, empty: cute.Pointer) -> None:
        """Fill the stages in turn, each as soon as it was multiplied."""
        for k in cutlass.range(cute.size(a[2], mode=[1]), unroll=1):
            stage, turn = k % self.stages, k // self.stages
            arch.mbarrier_wait(empty + stage, (turn + 1) % 2)
            with arch.elect_one():
                size = (TILE_M + self.tile[1]) * TILE_K * BFloat16.width // 8
                arch.mbarrier_arrive_and_expect_tx(full + stage, size)
            for atom, tiles, parts in (a, b):
                cute.copy(atom, parts[None, k], tiles[None, stage], tma_bar_ptr=full + stage)

    @cute.jit
    def multiply(
        self,
        mma: cute.TiledMma,
        sums: cute.Tensor,
        a_tiles: cute.Tensor,
        b_tiles: cute.Tensor,
        count: Int32,
        full: cute.Pointer,
        empty: cute.Pointer,
        done: cute.Pointer,
    ) -> None:
        """Multiply the stages in turn; each MMA takes 16 of the 64 numbers of a row."""
        a, b = mma.make_fragment_A(a_tiles), mma.make_fragment_B(b_tiles)
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for k in cutlass.range(count, unroll=1):
            stage, turn = k % self.stages, k // self.stages
            arch.mbarrier_wait(full + stage, turn % 2)
            for block in cutlass.range_constexpr(cute.size(a, mode=[2])):
                part = (None, None, block, stage)
                cute.gemm(mma, sums, a[part], b[part], sums)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            with arch.elect_one():
                tcgen05.commit(empty + stage)
        with arch.elect_one():
            tcgen05.commit(done)

    @cute.jit
    def write(self, sums: cute.Tensor, places: cute.Tensor, c: cute.Tensor) -> None:
        """Tensor memory to registers to c, a row a thread."""
        piece = ((cute.size(sums, mode=[0, 0]), COLUMNS),)
        sums, places = cute.zipped_divide(sums, piece), cute.zipped_divide(places, piece)
        op = tcgen05.Ld32x32bOp(tcgen05.Repetition(COLUMNS))
        copy = tcgen05.make_tmem_copy(cute.make_copy_atom(op, Float32), sums[None, 0])
        mine = copy.get_slice(arch.thread_idx()[0])
        sums, places = mine.partition_S(sums), mine.partition_D(places)
        for i in cutlass.range(self.tile[1] // COLUMNS, unroll=1):
            row = cute.make_rmem_tensor(places[None, None, i].shape, Float32)
            cute.copy(copy, sums[None, None, i], row)
            arch.fence_view_async_tmem_load()
            for j in cutlass.range_constexpr(COLUMNS):
                place = places[None, None, i][j]
                if cute.elem_less(place, c.shape):
                    c[place] = row[j].to(c.element_type)


def split(atom: Any, tiles: Any, parts: Any) -> Any:
    """Both sides of a tensor copy: shared memory by stage, the operand by tile along K."""
    tiles, parts = cute.group_modes(tiles, 0, 3), cute.group_modes(parts, 0, 3)
    return cpasync.tma_partition(atom, 0, cute.make_layout(1), tiles, parts)


def operand(dtype: Any, align: int) -> Any:
    """Placeholder for a row-major matrix whose rows begin at `align` bytes."""
    step = align * 8 // dtype.width
    shape = tuple(cute.sym_int32() for _ in range(2))
    stride = (cute.sym_int64(divisibility=step), 1)
    return make_fake_tensor(dtype, shape, stride, assumed_align=align)


def compile_bf16_gemm(
    arch: str, tile_n: Literal[32, 64, 128, 256] = 64, stages: int = 3, output: Any = Float32
) -> Any:
    """(a [M, K], b [N, K], c [M, N]): c = a @ b.T, bfloat16 to float32 or bfloat16.

    K > 0; all sizes may be ragged, but rows of a and b begin at 16 bytes.
    """
    inputs = [operand(BFloat16, 16) for _ in range(2)]
    return compiled(arch, Gemm(tile_n, stages), *inputs, operand(output, output.width // 8))
