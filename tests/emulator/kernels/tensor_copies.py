"""Third rung: tiles through swizzled shared memory, by tensor copies (TMA) and by the threads.

Where only one direction is TMA, the threads find their elements through the layout that the DSL
computes: a swizzle that is wrong but its own inverse would otherwise not show.
"""

from typing import Any, Literal

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Int32, Int64, Uint8, cute
from cutlass.cute import AddressSpace, arch
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_ptr
from cutlass.utils import SmemAllocator

from tests.emulator.kernels import compiled

THREADS = 64
SWIZZLE_BITS = {0: 0, 32: 1, 64: 2, 128: 3}
"""Span in bytes to how many address bits are permuted."""


class TensorCopy:
    """A tile a CTA, or a tile a cluster of two where the load is multicast."""

    def __init__(self, dtype: Any, tile: tuple[int, int], swizzle: int, load: str, store: str):
        self.dtype, self.tile, self.bits = dtype, tile, SWIZZLE_BITS[swizzle]
        self.load, self.store = load, store
        self.ctas = 2 if load == "multicast" else 1
        self.unit = Uint8 if dtype.width < 8 else dtype  # what a thread copies

    @cute.jit
    def __call__(
        self,
        source: cute.Pointer,  # to a matrix [rows, cols]
        destination: cute.Pointer,  # to another one
        rows: Int32,
        cols: Int32,
        pitch: Int64,  # of both, in elements
        stream: cuda.CUstream,
    ) -> None:
        x, y = self.matrix(source, rows, cols, pitch), self.matrix(destination, rows, cols, pitch)
        load = store = None
        if cutlass.const_expr(self.load == "threads"):
            x = self.units(source, rows, cols, pitch)
        elif cutlass.const_expr(self.load == "multicast"):
            op = cpasync.CopyBulkTensorTileG2SMulticastOp()
            load, x = cpasync.make_tiled_tma_atom(op, x, self.placed(), self.tile, 2)
        else:
            op = cpasync.CopyBulkTensorTileG2SOp()
            load, x = cpasync.make_tiled_tma_atom(op, x, self.placed(), self.tile)
        if cutlass.const_expr(self.store == "threads"):
            y = self.units(destination, rows, cols, pitch)
        else:
            op = cpasync.CopyBulkTensorTileS2GOp()
            store, y = cpasync.make_tiled_tma_atom(op, y, self.placed(), self.tile)
        self.kernel(load, x, store, y).launch(
            grid=(
                cute.ceil_div(cols, self.tile[1]) * self.ctas,
                cute.ceil_div(rows, self.tile[0]),
                1,
            ),
            block=(THREADS, 1, 1),
            cluster=(self.ctas, 1, 1),
            stream=stream,
        )

    def matrix(self, pointer: Any, rows: Any, cols: Any, pitch: Any) -> Any:
        """Of elements."""
        pitch = cute.assume(pitch, divby=128 // self.dtype.width)
        return cute.make_tensor(pointer, cute.make_layout((rows, cols), stride=(pitch, 1)))

    def units(self, pointer: Any, rows: Any, cols: Any, pitch: Any) -> Any:
        """The same matrix of what threads copy; one a CTA of a cluster, in the first mode."""
        pointer, size = (
            cute.recast_ptr(pointer, dtype=self.unit),
            self.unit.width // self.dtype.width,
        )
        shape, pitch = (self.ctas, rows, cols // size), pitch // size
        return cute.make_tensor(pointer, cute.make_layout(shape, stride=(rows * pitch, pitch, 1)))

    def placed(self) -> Any:
        """Layout of a tile in shared memory: row-major, swizzled."""
        rows = cute.make_ordered_layout(self.tile, order=(1, 0))
        return cute.make_composed_layout(cute.make_swizzle(self.bits, 4, 3), 0, rows)

    @cute.kernel
    def kernel(self, load: Any, x: cute.Tensor, store: Any, y: cute.Tensor) -> None:
        """One CTA."""
        bx, by, _ = arch.block_idx()
        rank, at = bx % self.ctas, (by, bx // self.ctas)
        smem, layout = SmemAllocator(), self.placed()
        tile = smem.allocate_tensor(self.dtype, layout.outer, 1024, layout.inner)
        if cutlass.const_expr(load is not None):
            arrived = smem.allocate(Int64, 8)
            self.fetch(load, cute.local_tile(x, self.tile, at), tile, arrived, rank)
        else:
            self.walk(x, tile, at, rank, True)
            arch.fence_proxy("async.shared", space="cta")
            arch.sync_threads()
        if cutlass.const_expr(store is not None):
            if arch.thread_idx()[0] < 32:
                source, to = self.split(store, tile, cute.local_tile(y, self.tile, at), 0)
                # The DSL elects a thread for loads, not for stores.
                with arch.elect_one():
                    cute.copy(store, source, to)
                    arch.cp_async_bulk_commit_group()
                    arch.cp_async_bulk_wait_group(0)
        else:
            self.walk(y, tile, at, rank, False)

    @cute.jit
    def fetch(
        self, load: Any, x: cute.Tensor, tile: cute.Tensor, arrived: Any, rank: Int32
    ) -> None:
        """Load a tile; of a cluster's, each CTA loads one half for both."""
        tid, _, _ = arch.thread_idx()
        if tid == 0:
            arch.mbarrier_init(arrived, 1)
            arch.mbarrier_init_fence()
        if cutlass.const_expr(self.ctas == 2):
            arch.cluster_arrive()
            arch.cluster_wait()
        arch.sync_threads()
        if tid < 32:
            with arch.elect_one():
                size = cute.size_in_bytes(self.dtype, tile.layout)
                arch.mbarrier_arrive_and_expect_tx(arrived, size)
            to, source = self.split(load, tile, x, rank)
            if cutlass.const_expr(self.ctas == 2):
                cute.copy(load, source, to, tma_bar_ptr=arrived, mcast_mask=cutlass.Int16(3))
            else:
                cute.copy(load, source, to, tma_bar_ptr=arrived)
        arch.mbarrier_wait(arrived, 0)

    def split(self, atom: Any, tile: Any, matrix: Any, rank: Any) -> Any:
        """Both sides of a tensor copy, as it takes them."""
        tile, matrix = cute.group_modes(tile, 0, 2), cute.group_modes(matrix, 0, 2)
        return cpasync.tma_partition(atom, rank, cute.make_layout(self.ctas), tile, matrix)

    @cute.jit
    def walk(
        self, matrix: cute.Tensor, tile: cute.Tensor, at: Any, rank: Int32, into: cutlass.Constexpr
    ) -> None:
        """Copy between a matrix of units and the tile, into the tile or out of it."""
        height, width = self.tile[0], self.tile[1] * self.dtype.width // self.unit.width
        # `recast_tensor` would drop the swizzle.
        pointer = cute.recast_ptr(tile.iterator, self.placed().inner, dtype=self.unit)
        units = cute.make_tensor(pointer, cute.make_layout((height, width), stride=(width, 1)))
        for i in cutlass.range(arch.thread_idx()[0], height * width, THREADS):
            row, col = i // width, i % width
            place = rank, at[0] * height + row, at[1] * width + col
            if place[1] < matrix.shape[1] and place[2] < matrix.shape[2]:
                if cutlass.const_expr(into):
                    units[row, col] = matrix[place]
                else:
                    matrix[place] = units[row, col]


def compile_tensor_copy(
    arch: str,
    dtype: Any,
    tile: tuple[int, int],
    swizzle: Literal[0, 32, 64, 128],
    load: Literal["tma", "multicast", "threads"] = "tma",
    store: Literal["tma", "threads"] = "tma",
) -> Any:
    """(x [rows, cols], y [rows, cols], rows, cols, pitch): y = x, tile by tile.

    x and y are passed as addresses, at 16-byte boundaries, with rows `pitch` elements apart, which
    is a multiple of 16 bytes; E2M1 are two a byte and `cols` is even. A row of a tile is as long
    as the swizzle's span, without one up to 256 elements. With "multicast" y is [2, rows, cols], a
    copy from each CTA of a cluster, and stored by threads. sm_90a and up, E2M1 sm_100a or sm_120a.
    """
    pointers = [make_ptr(dtype, 0, AddressSpace.gmem, assumed_align=16) for _ in range(2)]
    kernel = TensorCopy(dtype, tile, swizzle, load, store)
    return compiled(arch, kernel, *pointers, Int32(0), Int32(0), Int64(0))
