"""FP4 matmul on sm_100a and sm_103a: TMA, tcgen05 block-scaled MMA, epilogue, each in its warps.

A cluster takes tile after tile. In each of its CTAs one warp fills a ring of stages in shared
memory (A, B and their scales, 256 columns at a time), one warp copies the scales of a stage to
tensor memory and multiplies, and four warps take what accumulated there through alpha, bias and one
rounding to the output. There are two accumulators, so that the last part of a tile runs while the
first part of the next one does.

Scales need no rearrangement: 128 rows and four blocks of the blocked layout (docs/contract.md) are
512 contiguous bytes, which is what `tcgen05.cp.32x128b` takes to four columns of tensor memory.

An epilogue warp shares nothing with the other three. It reads the 32 lanes of tensor memory that
only it can read, and has its own boxes of shared memory and its own stores, so no barrier of more
than a warp is in its way.
"""

from typing import Any

import cutlass
from cutlass import Float4E2M1FN, Float32, Int16, Int32, Int64, Uint32, cute, pipeline
from cutlass.cute import AddressSpace, arch
from cutlass.cute.nvgpu import (
    OperandMajorMode,
    cpasync,
    make_tiled_tma_atom_A,
    make_tiled_tma_atom_B,
    tcgen05,
)
from cutlass.memory import SmemAllocator
from cutlass.utils import blackwell_helpers, blockscaled_layout

from fos_compile.kernels import formats
from fos_compile.kernels.cute import matmul_layout, pairs, ptx, shared, tensor_memory
from fos_compile.kernels.cute.matmul_layout import (
    BAND,
    BOX,
    BUFFERS,
    CHUNK_BYTES,
    EPILOGUE_WARPS,
    TILE_K,
    Tiling,
)

MMA_WARP, LOAD_WARP = EPILOGUE_WARPS, EPILOGUE_WARPS + 1
THREADS = 32 * (EPILOGUE_WARPS + 2)
_WORD = 4
"""Bytes of what scales are copied in; TMA has no wider integer for boxes of 512 bytes."""


class MatmulSm100:
    """Kernel for one set of static options.

    Attributes:
        tiling: tile, cluster and format.
        dtype: of the output: BFloat16, Float16 or Float32.
        bias: dtype of the bias, or None.
        boxes: whether the output is stored by TMA, which needs rows of whole 16 bytes; else
            element by element.
    """

    def __init__(self, tiling: Tiling, *, dtype: Any, bias: Any, boxes: bool) -> None:
        self.tiling, self.dtype, self.bias, self.boxes = tiling, dtype, bias, boxes
        nvfp4 = tiling.format == "nvfp4"
        self.scale = cutlass.Float8E4M3FN if nvfp4 else cutlass.Float8E8M0FNU
        self.width = formats.WIDTH[tiling.format]
        self.tile = (tiling.rows, tiling.cols, TILE_K)
        self.along_m, self.along_n = tiling.cluster
        self.group = tcgen05.CtaGroup.TWO if tiling.ctas == 2 else tcgen05.CtaGroup.ONE
        # CTAs that get the same piece of an operand, each of which loads a part of it for all.
        self.share_a, self.share_b = self.along_n, self.along_m // tiling.ctas
        self.share_scales_b = self.along_m  # both CTAs of a tile need the scales of all columns

    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,  # [B, M, P/2] uint8
        b: Int64,  # address of uint8 [B, N, P/2]
        scales_a: Int64,  # address of uint8 [B, L]
        scales_b: Int64,
        amax_a: Int64,  # address of float32 []
        amax_b: Int64,
        qs_a: Float32,
        qs_b: Float32,
        bias: Int64,  # address of the bias's dtype [N]; anything if there is none
        out: Int64,  # address of dtype [B, M, N]
        cols: Int32,  # N
        clusters: Int32,  # at most so many run at a time
        stream: Any,
    ) -> None:
        """Launch on `stream`. No size is 0; operands and scales begin at 16 bytes."""
        batch, rows, inner = a.shape[0], a.shape[1], a.shape[2] * 2
        mma = blackwell_helpers.make_blockscaled_trivial_tiled_mma(
            Float4E2M1FN,
            Float4E2M1FN,
            OperandMajorMode.K,
            OperandMajorMode.K,
            self.scale,
            self.width,
            self.group,
            self.tile[:2],
        )
        cluster = cute.tiled_divide(
            cute.make_layout((*self.tiling.cluster, 1)), (mma.thr_id.shape,)
        )
        stages, bands = self.tiling.stages, self.tiling.bands
        a_smem = blackwell_helpers.make_smem_layout_a(mma, self.tile, Float4E2M1FN, stages)
        b_smem = blackwell_helpers.make_smem_layout_b(mma, self.tile, Float4E2M1FN, stages)
        a_tma, a_global = make_tiled_tma_atom_A(
            self.load_op(self.share_a),
            self.operand(a.iterator.toint(), rows, inner, batch),
            cute.select(a_smem, mode=[0, 1, 2]),
            self.tile,
            mma,
            cluster.shape,
        )
        b_tma, b_global = make_tiled_tma_atom_B(
            self.load_op(self.share_b),
            self.operand(b, cols, inner, batch),
            cute.select(b_smem, mode=[0, 1, 2]),
            self.tile,
            mma,
            cluster.shape,
        )
        tiles_m = cute.ceil_div(rows, BAND * self.along_m)
        tiles_n = cute.ceil_div(cols, self.tiling.cols * self.along_n)
        tiles = (tiles_m, tiles_n, tiles_m * tiles_n * batch)
        self.kernel(
            mma,
            cluster,
            (a_tma, a_global, a_smem),
            (b_tma, b_global, b_smem),
            self.scale_copy(scales_a, rows, inner, batch, 1, self.share_a),
            self.scale_copy(scales_b, cols, inner, batch, bands, self.share_scales_b),
            self.output(out, rows, cols, batch),
            (amax_a, amax_b, qs_a, qs_b, bias),
            tiles,
            cute.ceil_div(inner, TILE_K),
        ).launch(
            grid=(self.along_m, self.along_n, cutlass.min(tiles[2], clusters)),
            block=(THREADS, 1, 1),
            cluster=(self.along_m, self.along_n, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    # Tensors in global memory -----------------------------------------------------------------

    def load_op(self, sharing: int) -> Any:
        """A tensor copy to this CTA, or to all `sharing` ones."""
        if sharing > 1:
            return cpasync.CopyBulkTensorTileG2SMulticastOp(self.group)
        return cpasync.CopyBulkTensorTileG2SOp(self.group)

    def operand(self, address: Any, rows: Any, inner: Any, batch: Any) -> Any:
        """[rows, inner, batch] of E2M1."""
        pointer = cute.make_ptr(Float4E2M1FN, address, AddressSpace.gmem, assumed_align=16)
        row = cute.assume(Int64(inner), divby=64)
        matrix = cute.assume(Int64(rows) * inner, divby=64)
        layout = cute.make_layout((rows, inner, batch), stride=(row, 1, matrix))
        return cute.make_tensor(pointer, layout)

    def scale_copy(
        self, address: Any, rows: Any, inner: Any, batch: Any, bands: int, sharing: int
    ) -> tuple[Any, Any]:
        """A copy of a stage's scales of so many bands, and where in memory they are:
        [words of a chunk, chunk, band, stage, first band, batch].
        """
        words, chunks = CHUNK_BYTES // _WORD, self.tiling.chunks
        pointer = cute.make_ptr(Uint32, address, AddressSpace.gmem, assumed_align=16)
        shape = (words, inner // (4 * self.width), cute.ceil_div(rows, BAND), batch)
        band = cute.assume(Int64(shape[1]) * words, divby=words)
        matrix = cute.assume(band * shape[2], divby=words)
        layout = cute.make_layout(shape, stride=(1, words, band, matrix))
        piece = (words, chunks, bands)
        copy, whole, *_ = cpasync.make_tiled_tma_atom(
            self.load_op(sharing),
            cute.make_tensor(pointer, layout),
            cute.make_layout(piece),
            piece,
            sharing,
        )
        # Pieces overlap: tiles of 192 columns begin one and a half bands apart and touch two.
        word, chunk, band, matrix = whole.stride
        pieces = cute.make_layout(
            (*piece, cute.ceil_div(shape[1], chunks), *shape[2:]),
            stride=(word, chunk, band, chunks * chunk, band, matrix),
        )
        return copy, cute.make_tensor(whole.iterator, pieces)

    def output(self, address: Any, rows: Any, cols: Any, batch: Any) -> tuple[Any, Any]:
        """A copy of a box, if TMA stores them, and [rows, cols, batch]."""
        size = self.dtype.width // 8
        step = 16 // size if self.boxes else 1
        row = cute.assume(Int64(cols), divby=step)
        matrix = cute.assume(Int64(rows) * cols, divby=step)
        pointer = cute.make_ptr(self.dtype, address, AddressSpace.gmem, assumed_align=step * size)
        layout = cute.make_layout((rows, cols, batch), stride=(row, 1, matrix))
        whole = cute.make_tensor(pointer, layout)
        if not self.boxes:
            return None, whole
        store = cpasync.CopyBulkTensorTileS2GOp()
        return tuple(cpasync.make_tiled_tma_atom(store, whole, self.box(), (BOX, BOX)))[:2]

    # The kernel -------------------------------------------------------------------------------

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        cluster: cute.Layout,
        a: Any,
        b: Any,
        scales_a: Any,
        scales_b: Any,
        out: Any,
        scalars: Any,
        tiles: Any,
        steps: Int32,
    ) -> None:
        """One CTA."""
        tiling = self.tiling
        warp = arch.make_warp_uniform(arch.warp_idx())
        if warp == LOAD_WARP:
            for atom in (a[0], b[0], scales_a[0], scales_b[0]):
                cpasync.prefetch_descriptor(atom)
        smem = SmemAllocator()
        full = smem.allocate_array(Int64, 2 * tiling.stages)
        done = smem.allocate_array(Int64, 2 * tiling.accumulators)
        address = smem.allocate(Int32, 4)
        a_tiles = smem.allocate_tensor(Float4E2M1FN, a[2].outer, 1024, a[2].inner)
        b_tiles = smem.allocate_tensor(Float4E2M1FN, b[2].outer, 1024, b[2].inner)
        piece = (CHUNK_BYTES // _WORD, tiling.chunks)
        a_scales = smem.allocate_tensor(Uint32, cute.make_layout((*piece, 1, tiling.stages)), 1024)
        b_scales = smem.allocate_tensor(
            Uint32, cute.make_layout((*piece, tiling.bands, tiling.stages)), 1024
        )
        boxes = smem.allocate_tensor(
            self.dtype, self.boxes_layout().outer, 1024, self.boxes_layout().inner
        )
        biases = smem.allocate_array(Float32, EPILOGUE_WARPS * tiling.cols)
        loads, products = self.pipelines(full, done, cluster)
        if warp == MMA_WARP:
            arch.alloc_tmem(tiling.tensor_columns, address, is_two_cta=tiling.ctas == 2)
            arch.relinquish_tmem_alloc_permit(is_two_cta=tiling.ctas == 2)
        arch.mbarrier_init_fence()
        arch.sync_threads()
        if cutlass.const_expr(cute.size(cluster) > 1):
            arch.cluster_arrive()
            arch.cluster_wait()
        columns = arch.retrieve_tmem_ptr(Float32, 16, address)
        if warp == LOAD_WARP:
            self.load(
                mma,
                loads,
                (a[0], a[1], a_tiles),
                (b[0], b[1], b_tiles),
                (scales_a[0], scales_a[1], a_scales),
                (scales_b[0], scales_b[1], b_scales),
                tiles,
                steps,
            )
        if warp == MMA_WARP:
            self.multiply(
                mma, loads, products, columns, (a_tiles, b_tiles), (a_scales, b_scales), tiles,
                steps,
            )  # fmt: skip
        if warp < EPILOGUE_WARPS:
            self.write(products, columns, boxes, biases, out, scalars, tiles)
        # A CTA whose memory the other one's MMAs may still reach must not give it away.
        if cutlass.const_expr(tiling.ctas == 2):
            arch.cluster_arrive()
            arch.cluster_wait()
        else:
            arch.sync_threads()
        if warp == MMA_WARP:
            arch.dealloc_tmem(columns, tiling.tensor_columns, is_two_cta=tiling.ctas == 2)

    def pipelines(self, full: Any, done: Any, cluster: Any) -> Any:
        """Barriers between loads and MMAs, and between MMAs and epilogue."""
        thread = pipeline.Agent.Thread
        loads = pipeline.PipelineTmaUmma.create(
            barrier_storage=full,
            num_stages=self.tiling.stages,
            producer_group=pipeline.CooperativeGroup(thread),
            consumer_group=pipeline.CooperativeGroup(thread, self.share_a + self.share_b - 1),
            tx_count=self.tiling.load_bytes * self.tiling.ctas,
            cta_layout_vmnk=cluster,
            defer_sync=True,
        )
        products = pipeline.PipelineUmmaAsync.create(
            barrier_storage=done,
            num_stages=self.tiling.accumulators,
            producer_group=pipeline.CooperativeGroup(thread),
            consumer_group=pipeline.CooperativeGroup(thread, EPILOGUE_WARPS * self.tiling.ctas),
            cta_layout_vmnk=cluster,
            defer_sync=True,
        )
        return loads, products

    def tile_of(self, index: Any, tiles: Any) -> Any:
        """(band of rows, tile of columns, batch) of this CTA."""
        x, y, _ = arch.block_idx()
        # Floor division of signed numbers takes twice the instructions.
        index, rows, cols = (Uint32(each) for each in (index, tiles[0], tiles[1]))
        row, col, batch = map(Int32, matmul_layout.place(index, rows, cols, cutlass.min))
        return row * self.along_m + x, col * self.along_n + y, batch

    # Loads ------------------------------------------------------------------------------------

    @cute.jit
    def load(
        self,
        mma: cute.TiledMma,
        loads: Any,
        a: Any,
        b: Any,
        scales_a: Any,
        scales_b: Any,
        tiles: Any,
        steps: Int32,
    ) -> None:
        """Fill the stages in turn, tile after tile."""
        x, y, first = arch.block_idx()
        _, _, count = arch.grid_dim()
        ctas, tile_n = self.tiling.ctas, self.tiling.cols
        part = mma.get_slice(x % ctas)
        every = (None, None, None)
        a_parts = part.partition_A(cute.local_tile(a[1], (self.tile[0], TILE_K), every))
        b_parts = part.partition_B(cute.local_tile(b[1], (self.tile[1], TILE_K), every))
        a_to, a_from = split(a[0], y, self.share_a, a[2], a_parts, 3)
        b_to, b_from = split(b[0], x // ctas, self.share_b, b[2], b_parts, 3)
        sa_to, sa_from = split(scales_a[0], y, self.share_a, scales_a[2], scales_a[1], 3)
        sb_to, sb_from = split(scales_b[0], x, self.share_scales_b, scales_b[2], scales_b[1], 3)
        # Ranks of a cluster run along M first.
        to_a = to_b = to_sb = None
        if cutlass.const_expr(self.share_a > 1):
            to_a = Int16(sum(1 << i * self.along_m for i in range(self.share_a)) << x)
        if cutlass.const_expr(self.share_b > 1):
            ranks = sum(1 << i * ctas for i in range(self.share_b))
            to_b = Int16(ranks << (y * self.along_m + x % ctas))
        if cutlass.const_expr(self.share_scales_b > 1):
            to_sb = Int16((1 << self.along_m) - 1 << (y * self.along_m))
        producer = loads.make_producer()
        for index in cutlass.range(first, tiles[2], count, unroll=1):
            row, col, batch = self.tile_of(index, tiles)
            for k in cutlass.range(steps, unroll=1):
                stage = producer.acquire_and_advance()
                at, barrier = stage.index, stage.barrier
                transfer(a[0], a_from[None, row // ctas, k, batch], a_to[None, at], barrier, to_a)
                transfer(b[0], b_from[None, col, k, batch], b_to[None, at], barrier, to_b)
                transfer(scales_a[0], sa_from[None, k, row, batch], sa_to[None, at], barrier, to_a)
                band = col * tile_n // BAND
                transfer(
                    scales_b[0], sb_from[None, k, band, batch], sb_to[None, at], barrier, to_sb
                )
        producer.tail()

    # Products ---------------------------------------------------------------------------------

    @cute.jit
    def multiply(
        self,
        mma: cute.TiledMma,
        loads: Any,
        products: Any,
        columns: cute.Pointer,
        operands: Any,
        scales: Any,
        tiles: Any,
        steps: Int32,
    ) -> None:
        """Multiply the stages in turn; of two CTAs the first one does it for both."""
        tiling = self.tiling
        x, _, first = arch.block_idx()
        _, _, count = arch.grid_dim()
        a, b = mma.make_fragment_A(operands[0]), mma.make_fragment_B(operands[1])
        layout = mma.make_fragment_C(mma.partition_shape_C(self.tile[:2])).layout
        behind = columns + tiling.scales_at
        copy_a, a_from, a_to, sa = self.scales_to_tensor_memory(mma, scales[0], behind, True)
        behind = behind + 4 * tiling.chunks
        copy_b, b_from, b_to, sb = self.scales_to_tensor_memory(mma, scales[1], behind, False)
        consumer, producer = loads.make_consumer(), products.make_producer()
        if x % tiling.ctas == 0:
            turn = Int32(0)
            for index in cutlass.range(first, tiles[2], count, unroll=1):
                _, col, _ = self.tile_of(index, tiles)
                # Where a tile begins inside of a band, so do its scales.
                shift = col * tiling.cols % BAND // 32
                tile_sb = cute.make_tensor(
                    cute.recast_ptr(behind + shift, dtype=self.scale), sb.layout
                )
                sums = cute.make_tensor(columns + turn * tiling.accumulator_step, layout)
                free = producer.acquire_and_advance()
                tensor_memory.fence_after()
                for k in cutlass.range(steps, unroll=1):
                    stage = consumer.wait_and_advance()
                    at = stage.index
                    cute.copy(copy_a, a_from[None, None, None, None, at], a_to)
                    cute.copy(copy_b, b_from[None, None, None, None, at], b_to)
                    mma.set(tcgen05.Field.ACCUMULATE, k != 0)
                    cute.gemm(
                        mma,
                        sums,
                        [a[None, None, None, at], sa],
                        [b[None, None, None, at], tile_sb],
                        sums,
                    )
                    stage.release()
                free.commit()
                turn = turn ^ 1
            # Until its barriers have heard all that the other CTA has to say, this one stays.
            for _ in cutlass.range_constexpr(tiling.accumulators):
                producer.acquire_and_advance()

    def scales_to_tensor_memory(
        self, mma: Any, words: Any, behind: Any, of_a: bool
    ) -> tuple[Any, Any, Any, Any]:
        """A copy of a stage's scales: (copy, from, to, what an MMA takes)."""
        names = blockscaled_layout
        if of_a:
            in_shared, in_tensor = names.make_smem_layout_sfa, names.make_tmem_layout_sfa
        else:
            in_shared, in_tensor = names.make_smem_layout_sfb, names.make_tmem_layout_sfb
        layout = in_shared(mma, self.tile, self.width, self.tiling.stages)
        one = cute.select(layout, mode=[0, 1, 2])
        to = cute.make_tensor(
            cute.recast_ptr(behind, dtype=self.scale), in_tensor(mma, self.tile, self.width, one)
        )
        source = cute.make_tensor(cute.recast_ptr(words.iterator, dtype=self.scale), layout)
        atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(self.group), self.scale)
        # Each scale is in these layouts once for every element of its block.
        once = cute.filter_zeros(to)
        copy = tcgen05.make_s2t_copy(atom, once)
        part = copy.get_slice(0)
        source = part.partition_S(cute.filter_zeros(source))
        return copy, tcgen05.get_s2t_smem_desc_tensor(copy, source), part.partition_D(once), to

    # Epilogue ---------------------------------------------------------------------------------

    def box(self) -> Any:
        """Layout of a box: rows of 64 or 128 bytes, swizzled, so that the same 16 bytes of eight
        rows lie in different banks."""
        rows = cute.make_ordered_layout((BOX, BOX), order=(1, 0))
        bits = 2 if self.dtype.width == 16 else 3
        return cute.make_composed_layout(cute.make_swizzle(bits, 4, 3), 0, rows)

    def boxes_layout(self) -> Any:
        """Of all boxes."""
        box = cute.make_ordered_layout((BOX, BOX, EPILOGUE_WARPS * BUFFERS), order=(1, 0, 2))
        return cute.make_composed_layout(self.box().inner, 0, box)

    @cute.jit
    def write(
        self,
        products: Any,
        columns: cute.Pointer,
        boxes: cute.Tensor,
        biases: cute.Pointer,
        out: Any,
        scalars: Any,
        tiles: Any,
    ) -> None:
        """Tensor memory to the output: 32 rows of a tile, box after box, a row a thread."""
        tiling = self.tiling
        _, _, first = arch.block_idx()
        _, _, count = arch.grid_dim()
        warp = arch.make_warp_uniform(arch.warp_idx())
        amax_a, amax_b, qs_a, qs_b, bias = scalars
        alpha = ptx.mul(ptx.div(ptx.load_f32(amax_a), qs_a), ptx.div(ptx.load_f32(amax_b), qs_b))
        biases = biases + warp * tiling.cols
        here = Uint32(columns.toint()) + (warp << 21)  # lanes are in the high half
        consumer = products.make_consumer()
        turn, buffer = Int32(0), Int32(0)
        for index in cutlass.range(first, tiles[2], count, unroll=1):
            row, col, batch = self.tile_of(index, tiles)
            row = row * EPILOGUE_WARPS + warp  # in units of 32
            if cutlass.const_expr(self.bias is not None):
                self.fetch_bias(bias, biases, col, out[1].shape[1])
            full = consumer.wait_and_advance()
            tensor_memory.fence_after()
            # Two at a time: which buffer of the two is then no matter of addresses.
            for i in cutlass.range(tiling.cols // BOX, unroll=BUFFERS):
                # The end that the next tile's accumulator overlaps is read first.
                box = i
                if cutlass.const_expr(tiling.accumulators == 1):
                    box = cutlass.select_(turn == 0, tiling.cols // BOX - 1 - i, i)
                at = here + turn * tiling.accumulator_step + box * BOX
                numbers = tensor_memory.load_32x32(at)
                if i == tiling.free_after - 1:
                    tensor_memory.fence_before()
                    arch.sync_warp()
                    with arch.elect_one():
                        full.release()
                numbers = self.scaled(numbers, alpha, biases + box * BOX)
                self.store(numbers, boxes, warp * BUFFERS + buffer, out, row, col, box, batch)
                buffer = buffer ^ 1
            turn = turn ^ 1
        if cutlass.const_expr(self.boxes):
            arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def fetch_bias(self, bias: Int64, to: cute.Pointer, col: Int32, cols: Int32) -> None:
        """The bias of a tile's columns as float32, in this warp's shared memory."""
        source = cute.make_tensor(
            cute.make_ptr(self.bias, bias, AddressSpace.gmem), cute.make_layout(cols)
        )
        target = cute.make_tensor(to, cute.make_layout(self.tiling.cols))
        for i in cutlass.range_constexpr(self.tiling.cols // 32):
            at = i * 32 + arch.lane_idx()
            number = Float32(0.0)
            if col * self.tiling.cols + at < cols:
                number = source[col * self.tiling.cols + at].to(Float32)
            target[at] = number
        arch.sync_warp()

    @cute.jit
    def scaled(self, numbers: Any, alpha: Float32, biases: cute.Pointer) -> Any:
        """alpha * x + bias, each operation rounded."""
        found = []
        address = shared.address_of(biases)
        for i in cutlass.range_constexpr(0, BOX, 4):
            low = pairs.mul((numbers[i], numbers[i + 1]), pairs.twice(alpha))
            high = pairs.mul((numbers[i + 2], numbers[i + 3]), pairs.twice(alpha))
            if cutlass.const_expr(self.bias is not None):
                w, x, y, z = (ptx.real(word) for word in shared.load_v4(address + 4 * i))
                low, high = pairs.add(low, (w, x)), pairs.add(high, (y, z))
            found += [*low, *high]
        return found

    @cute.jit
    def store(
        self,
        numbers: Any,
        boxes: cute.Tensor,
        buffer: Int32,
        out: Any,
        row: Int32,
        col: Int32,
        box: Int32,
        batch: Int32,
    ) -> None:
        """Round 32 numbers a thread, through shared memory to the output."""
        lane = arch.lane_idx()
        if cutlass.const_expr(self.dtype is Float32):
            words, swizzle = [ptx.bits(x) for x in numbers], lane % 8
        else:
            packed = ptx.bfloat16x2 if self.dtype is cutlass.BFloat16 else ptx.half2
            words, swizzle = [packed(*pair) for pair in pairs.of(numbers)], lane // 2 % 4
        size = self.dtype.width // 8
        base = shared.address_of(boxes.iterator) + buffer * (BOX * BOX * size)
        # The box before the last one that was stored from here has been read; lanes that stored
        # nothing have nothing to wait for.
        if cutlass.const_expr(self.boxes):
            arch.cp_async_bulk_wait_group(BUFFERS - 1, read=True)
        arch.sync_warp()
        for i in cutlass.range_constexpr(len(words) // 4):
            at = base + lane * (BOX * size) + ((i ^ swizzle) << 4)
            shared.store_v4(at, words[4 * i : 4 * i + 4])
        if cutlass.const_expr(self.boxes):
            arch.fence_proxy("async.shared", space="cta")
            arch.sync_warp()
            tiler = cute.local_tile(out[1], (BOX, BOX), (None, None, None))
            source, to = split(out[0], 0, 1, boxes, tiler, 2)
            col = col * (self.tiling.cols // BOX) + box
            # Of a whole warp the same lane is elected every time, so its groups are all there are.
            with arch.elect_one():
                cute.copy(out[0], source[None, buffer], to[None, row, col, batch])
                arch.cp_async_bulk_commit_group()
        else:
            arch.sync_warp()
            self.store_elements(base, out[1], row * BOX, col * self.tiling.cols + box * BOX, batch)

    @cute.jit
    def store_elements(
        self, base: Uint32, out: cute.Tensor, row: Int32, col: Int32, batch: Int32
    ) -> None:
        """A box, row by row, a column a thread."""
        lane, size = arch.lane_idx(), self.dtype.width // 8
        rows, cols, _ = out.shape
        to = out.iterator.toint() + ((Int64(batch) * rows + row) * cols + col + lane) * size
        for i in cutlass.range(BOX, unroll=4):
            swizzle = i % 8 if self.dtype is Float32 else i // 2 % 4
            chunk = (lane * size // 16) ^ swizzle
            at = base + i * (BOX * size) + chunk * 16 + lane * size % 16
            if row + i < rows and col + lane < cols:
                if cutlass.const_expr(self.dtype is Float32):
                    ptx.store_b32(to, shared.load_b32(at), 1)
                else:
                    ptx.store_b16(to, shared.load_u16(at), 1)
            to = to + Int64(cols) * size


def split(atom: Any, rank: Any, sharing: int, tiles: Any, parts: Any, modes: int) -> Any:
    """Both sides of a tensor copy, (shared, global); the first modes are what is copied."""
    tiles, parts = cute.group_modes(tiles, 0, modes), cute.group_modes(parts, 0, modes)
    return cpasync.tma_partition(atom, rank, cute.make_layout(sharing), tiles, parts)


def transfer(atom: Any, source: Any, to: Any, barrier: Any, mask: Any) -> None:
    """Start a tensor copy that reports to a barrier."""
    if mask is None:
        cute.copy(atom, source, to, tma_bar_ptr=barrier)
    else:
        cute.copy(atom, source, to, tma_bar_ptr=barrier, mcast_mask=mask)
