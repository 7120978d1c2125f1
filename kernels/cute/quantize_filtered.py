"""A bf16 matrix to NVFP4, 1D blocks, nearest, mse or static_6: one read, one write.

A warp takes a quarter of what 16 warps need for 128 rows x 64 columns (`tiles.place`), a thread a
block of 16. The warps of a CTA walk along the same rows, loading a round ahead. Blocks that
`filtered` cannot decide are remembered, one bit a round, and go through `contract` at the end,
dense: a thread a block, whichever warp found it.
"""

from typing import Any, NamedTuple

import cutlass
from cutlass import Int32, Int64, Uint16, Uint32, cute
from cutlass.cute import arch

from fos_compile.kernels.cute import contract, fast, ptx, tiles
from fos_compile.kernels.cute.host_quantize_filtered import MAX_ROUNDS, ctas_per_sm

WARPS = tiles.WARPS
THREADS = tiles.THREADS
CHUNK = 64
"""Columns that a warp takes at a time."""


class Start(NamedTuple):
    """Where a thread works in its first round; addresses in bytes."""

    row: Any
    chunk: Any
    col: Any
    x: Any
    values: Any
    scales: Any


class QuantizeFiltered:
    """Kernel for one set of static options.

    Attributes:
        rules: mse or static_6, nearest.
        rht: whether groups of 16 are rotated first.
        by_column: whether the rows, not the columns, are contiguous in memory.
        vector: whether 16-byte loads along the columns are possible.
        count: whether to count the blocks that the filter could not decide (for benchmarks).
    """

    def __init__(
        self,
        rules: contract.Rules,
        *,
        rht: bool,
        by_column: bool,
        vector: bool,
        count: bool = False,
    ) -> None:
        self.rules = rules
        self.rht = rht
        self.by_column = by_column
        self.vector = vector
        self.count = count

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,  # [B, R, C] bfloat16
        amax: Int64,  # address of float32 []
        values: Int64,  # address of uint8 [B, R, P/2]
        scales: Int64,  # address of uint8 [B, L]
        undecided: Int64,  # address of int32 [1] to add to; anything unless `count`
        rounds: Int32,
        half_exponents: Uint32,  # of host_quantize_filtered
        stream: Any,
    ) -> None:
        """Launch on `stream`."""
        chunks = cute.ceil_div(x.shape[2], CHUNK)
        tall = tiles.TASKS * cute.ceil_div(x.shape[1], 128)
        self.kernel(x, amax, values, scales, undecided, rounds, half_exponents).launch(
            grid=(tall, cute.ceil_div(chunks, WARPS * rounds), x.shape[0]),
            block=(THREADS, 1, 1),
            stream=stream,
            min_blocks_per_mp=ctas_per_sm(self.vector),
            preferred_smem_carveout=50,
        )

    @cute.kernel
    def kernel(
        self,
        x: cute.Tensor,
        amax: Int64,
        values: Int64,
        scales: Int64,
        undecided: Int64,
        rounds: Int32,
        half_exponents: Uint32,
    ) -> None:
        """One CTA."""
        tid, _, _ = arch.thread_idx()
        here = self.start(x, values, scales, tid, rounds)
        chunks = cute.ceil_div(x.shape[2], CHUNK)
        turns = cutlass.min(rounds, (chunks - here.chunk + WARPS - 1) // WARPS)
        exists = ptx.u32(0xFF) if here.row < x.shape[1] else ptx.u32(0)
        # No column of a row that does not exist is wanted.
        cols = x.shape[2] if here.row < x.shape[1] else Int32(0)
        col, at, to, mark = here.col, here.x, here.values, here.scales
        ahead = cute.make_rmem_tensor(8, Uint32)
        # Before anything that waits for amax: a small matrix has no other warps to hide it.
        self.load(ahead, x, at, col, cols)
        tensor = contract.tensor_of(ptx.load_f32(amax), self.rules.qs)
        outside = contract.outside_midrange(tensor)
        count_ptr = arch.alloc_smem(Uint32, 1)
        count = cute.make_tensor(count_ptr, cute.make_layout(1))
        queue = cute.make_tensor(
            arch.alloc_smem(Uint16, THREADS * MAX_ROUNDS), cute.make_layout(THREADS * MAX_ROUNDS)
        )
        if tid == 0:
            count[0] = Uint32(0)
        arch.sync_threads()

        near = Uint32(0)
        for i in cutlass.range(turns, unroll=1):
            words = fast.ready([ahead[k] for k in range(8)], self.rules, self.rht)
            at += WARPS * CHUNK * 2 * x.stride[2]
            col += WARPS * CHUNK
            self.load(ahead, x, at, col, cols)
            done = fast.block(words, tensor, self.rules, None, half_exponents)
            near = near | ((done.near | outside) << Uint32(i))
            ptx.store_v2(to, done.low, done.high, exists)
            ptx.store_u8(mark, done.scale & exists, 1)
            to += WARPS * CHUNK // 2
            mark += WARPS * 512
        if here.row >= x.shape[1]:
            near = Uint32(0)
        if near != 0:
            slot = arch.atomic_add(count_ptr.llvm_ptr, ptx.popc(near), scope="cta")
            while near != 0:
                queue[slot] = Uint16(ptx.find_low(near) * THREADS + tid)
                near = near & (near - 1)
                slot += 1
        arch.sync_threads()
        total = count[0]
        if cutlass.const_expr(self.count) and tid == 0:
            ptx.atomic_add_u32(undecided, total)
        for j in cutlass.range(Uint32(tid), total, THREADS):
            entry = Uint32(queue[j])
            who, turn = Int32(entry % THREADS), Int32(entry // THREADS)
            there = self.start(x, values, scales, who, rounds)
            again = cute.make_rmem_tensor(8, Uint32)
            col = there.col + turn * (WARPS * CHUNK)
            at = there.x + turn * (WARPS * CHUNK * 2) * x.stride[2]
            self.load(again, x, at, col, x.shape[2])
            words = fast.ready([again[k] for k in range(8)], self.rules, self.rht)
            words, scale = fast.exact(words, tensor, self.rules, None, outside)
            ptx.store_v2(there.values + turn * (WARPS * CHUNK // 2), words[0], words[1], 1)
            ptx.store_u8(there.scales + turn * (WARPS * 512), scale, 1)

    @cute.jit
    def start(self, x: cute.Tensor, values: Int64, scales: Int64, tid: Int32, rounds: Int32) -> Any:
        """Where thread `tid` of this CTA starts."""
        bx, by, batch = arch.block_idx()
        place = tiles.place(bx & 15, tid & 31, self.by_column)
        row = (bx >> 4) * 128 + place.row
        chunk = by * (WARPS * rounds) + (tid >> 5)
        col = (chunk * 4 + place.block) * 16
        chunks = cute.ceil_div(x.shape[2], CHUNK)
        line = Int64(batch) * x.shape[1] + row
        tile = (Int64(batch) * cute.ceil_div(x.shape[1], 128) + (bx >> 4)) * chunks + chunk
        offset = Int64(batch) * x.stride[0] + Int64(row) * x.stride[1] + Int64(col) * x.stride[2]
        return Start(
            row=row,
            chunk=chunk,
            col=col,
            x=x.iterator.toint() + offset * 2,
            values=values + line * (chunks * (CHUNK // 2)) + col // 2,
            scales=scales + tile * 512 + place.scale,
        )

    @cute.jit
    def load(self, into: cute.Tensor, x: cute.Tensor, at: Int64, col: Int32, cols: Int32) -> None:
        """A block of 16 from column `col` at address `at`; zeros from column `cols` on."""
        if cutlass.const_expr(self.vector):
            for half in cutlass.range_constexpr(2):
                wanted = Uint32(1) if col + 8 * half < cols else Uint32(0)
                four = ptx.load_stream_v4(at + 16 * half, wanted)
                for i in cutlass.range_constexpr(4):
                    into[4 * half + i] = four[i]
        else:
            for i in cutlass.range_constexpr(8):
                pair = []
                for j in cutlass.range_constexpr(2):
                    wanted = Uint32(1) if col + 2 * i + j < cols else Uint32(0)
                    pair.append(ptx.load_b16(at + (2 * i + j) * 2 * x.stride[2], wanted))
                into[i] = ptx.prmt(pair[0], pair[1], 0x5410)
