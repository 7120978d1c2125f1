"""Kernels that are wrong in a known way, each with its correct twin, for the diagnosis tests.

A fault changes a number or drops one line; without it the kernel is correct, which shows that a
diagnosis is due to the fault.
"""

from typing import Any

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass.cute import arch
from cutlass.cute.nvgpu import cpasync
from cutlass.cute.runtime import make_fake_tensor
from cutlass.utils import SmemAllocator

from fos_compile.kernels.cute import ptx, shared
from tests.emulator.kernels import compiled, vector

THREADS = 128
TILE = (8, 32)
"""Rows and columns of float32 that a tensor copy moves."""
TMEM_COLUMNS = 32


def _numbers() -> Any:
    """Shared memory for a number a thread."""
    return SmemAllocator().allocate_tensor(Int32, cute.make_layout(THREADS), 16)


def _place() -> tuple[Any, Any]:
    """The thread's number in the CTA and in the grid."""
    tid, _, _ = arch.thread_idx()
    return tid, arch.block_idx()[0] * THREADS + tid


@cute.jit
def _race(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """Another warp's numbers are read without a barrier."""
    (tid, i), tile = _place(), _numbers()
    tile[tid] = tid
    if cutlass.const_expr(not broken):
        arch.sync_threads()
    y[i] = tile[THREADS - 1 - tid]


@cute.jit
def _uninitialised(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """Half of the shared memory that is read was never written."""
    (tid, i), tile = _place(), _numbers()
    if tid < (THREADS // 2 if broken else THREADS):
        tile[tid] = tid
    arch.sync_threads()
    y[i] = tile[tid]


@cute.jit
def _past_output(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """Nothing predicates the tail. Wrong unless n is a multiple of 128."""
    _, i = _place()
    if i < (arch.grid_dim()[0] * THREADS if broken else y.shape[0]):
        y[i] = i


@cute.jit
def _past_shared(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """A word behind the shared memory of the launch is written."""
    (tid, i), tile = _place(), _numbers()
    tile[tid] = tid
    arch.sync_threads()
    place = THREADS if broken else 0
    if tid == 0:
        tile[place] = Int32(1)
    arch.sync_threads()
    y[i] = tile[tid]


@cute.jit
def _missing_arrival(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """An mbarrier counts one thread more than arrive: deadlock."""
    tid, i = _place()
    arrived = arch.alloc_smem(Int64, 1, alignment=8)
    if tid == 0:
        arch.mbarrier_init(arrived, THREADS + 1 if broken else THREADS)
    arch.sync_threads()
    arch.mbarrier_arrive(arrived)
    arch.mbarrier_wait(arrived, 0)
    y[i] = tid


@cute.jit
def _divergent_barrier(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """Half of every warp executes `bar.sync`."""
    tid, i = _place()
    if tid % 32 < (16 if broken else 32):
        arch.sync_threads()
    y[i] = tid


@cute.jit
def _divergent_shuffle(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """A shuffle reads from the half of the warp that does not execute it."""
    tid, i = _place()
    if tid % 32 < (16 if broken else 32):
        y[i] = arch.shuffle_sync_bfly(tid, offset=16)
    else:
        y[i] = tid


@cute.jit
def _misaligned(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """A vector of 16 bytes is stored 4 bytes behind its boundary. n is a multiple of 4."""
    _, i = _place()
    first = 4 * i + (1 if broken else 0)
    if first + 4 <= y.shape[0]:
        ptx.store_v4(y.iterator.toint() + 4 * Int64(first), [Uint32(i)] * 4, 1)


@cute.jit
def _written_twice(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """The first thread writes its neighbour's element too, with the same number."""
    tid, i = _place()
    y[i] = i
    if cutlass.const_expr(broken):
        if tid == 0:
            y[i + 1] = i + 1


@cute.jit
def _never_written(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """The last element is left out."""
    _, i = _place()
    if i < (y.shape[0] - 1 if broken else y.shape[0]):
        y[i] = i


@cute.jit
def _early_exit(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """The first CTA of a cluster does not wait for what its peer writes to its shared memory."""
    tid, i = _place()
    numbers = arch.alloc_smem(Int32, THREADS)
    arch.cluster_arrive()
    arch.cluster_wait()
    if arch.block_idx_in_cluster() == 1:
        theirs = shared.address_of(arch.map_dsmem_ptr(numbers + tid, 0))
        arch.inline_ptx("st.shared::cluster.b32 [{$r0}], {$r1};", read_only_args=[theirs, tid])
    if cutlass.const_expr(not broken):
        arch.cluster_arrive()
        arch.cluster_wait()
    y[i] = i


@cute.jit
def _leaked_columns(y: cute.Tensor, broken: cutlass.Constexpr) -> None:
    """Tensor memory is not freed. sm_100a."""
    tid, i = _place()
    address = arch.alloc_smem(Int32, 1)
    if tid < 32:
        arch.alloc_tmem(TMEM_COLUMNS, address)
        arch.relinquish_tmem_alloc_permit()
    arch.sync_threads()
    columns = arch.retrieve_tmem_ptr(Float32, 16, address)
    y[i] = i
    if cutlass.const_expr(not broken):
        if tid < 32:
            arch.dealloc_tmem(columns, TMEM_COLUMNS)


FAULTS = {
    "race": _race,
    "uninitialised": _uninitialised,
    "past output": _past_output,
    "past shared": _past_shared,
    "missing arrival": _missing_arrival,
    "divergent barrier": _divergent_barrier,
    "divergent shuffle": _divergent_shuffle,
    "misaligned": _misaligned,
    "written twice": _written_twice,
    "never written": _never_written,
    "early exit": _early_exit,
    "leaked columns": _leaked_columns,
}


class _Fault:
    def __init__(self, name: str, broken: bool) -> None:
        self.body, self.broken = FAULTS[name], broken
        self.ctas = 2 if name == "early exit" else 1

    @cute.jit
    def __call__(self, y: cute.Tensor, stream: cuda.CUstream) -> None:
        grid = (cute.ceil_div(y.shape[0], THREADS), 1, 1)
        cluster, block = (self.ctas, 1, 1), (THREADS, 1, 1)
        self.kernel(y).launch(grid=grid, block=block, cluster=cluster, stream=stream)

    @cute.kernel
    def kernel(self, y: cute.Tensor) -> None:
        self.body(y, self.broken)


def compile_fault(arch: str, name: str, broken: bool = True) -> Any:
    """(y [n]), int32, n a multiple of 256 unless the fault says otherwise: one of FAULTS."""
    return compiled(arch, _Fault(name, broken), vector(Int32, 16))


class _Load:
    """A tensor copy into shared memory, from which the threads write."""

    def __init__(self, extra: int = 0, parity: int = 0) -> None:
        self.extra, self.parity = extra, parity

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream) -> None:
        tile, op = cute.make_ordered_layout(TILE, order=(1, 0)), cpasync.CopyBulkTensorTileG2SOp()
        load, x = cpasync.make_tiled_tma_atom(op, x, tile, TILE)
        self.kernel(load, x, y).launch(grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, load: cute.CopyAtom, x: cute.Tensor, y: cute.Tensor) -> None:
        tid, _, _ = arch.thread_idx()
        tile, arrived = _tile(), arch.alloc_smem(Int64, 1, alignment=8)
        if tid == 0:
            arch.mbarrier_init(arrived, 1)
            arch.mbarrier_init_fence()
        arch.sync_threads()
        if tid < 32:
            with arch.elect_one():
                size = cute.size_in_bytes(Float32, tile.layout)
                arch.mbarrier_arrive_and_expect_tx(arrived, size + self.extra)
            to, source = _split(load, tile, cute.local_tile(x, TILE, (0, 0)))
            cute.copy(load, source, to, tma_bar_ptr=arrived)
        arch.mbarrier_wait(arrived, self.parity)
        for row in cutlass.range_constexpr(0, TILE[0], 4):
            y[row + tid // 32, tid % 32] = tile[row + tid // 32, tid % 32]


class _Store:
    """Tensor copies of a tile of ones, then of one of twos that the threads wrote over it."""

    def __init__(self, fence: bool = True, waits: tuple[bool, bool] = (True, True)) -> None:
        self.fence, self.waits = fence, waits

    @cute.jit
    def __call__(self, y: cute.Tensor, stream: cuda.CUstream) -> None:
        tile, op = cute.make_ordered_layout(TILE, order=(1, 0)), cpasync.CopyBulkTensorTileS2GOp()
        store, y = cpasync.make_tiled_tma_atom(op, y, tile, TILE)
        self.kernel(store, y).launch(grid=(1, 1, 1), block=(THREADS, 1, 1), stream=stream)

    @cute.kernel
    def kernel(self, store: cute.CopyAtom, y: cute.Tensor) -> None:
        tid, _, _ = arch.thread_idx()
        tile = _tile()
        for turn in cutlass.range_constexpr(2):
            for row in cutlass.range_constexpr(0, TILE[0], 4):
                tile[row + tid // 32, tid % 32] = Float32(turn + 1)
            if cutlass.const_expr(self.fence):
                arch.fence_proxy("async.shared", space="cta")
            arch.sync_threads()
            if tid < 32:
                source, to = _split(store, tile, cute.local_tile(y, TILE, (turn, 0)))
                with arch.elect_one():
                    cute.copy(store, source, to)
                    arch.cp_async_bulk_commit_group()
                    if cutlass.const_expr(self.waits[turn]):
                        arch.cp_async_bulk_wait_group(0, read=True)
            arch.sync_threads()


def _tile() -> Any:
    """Shared memory for a tile."""
    return SmemAllocator().allocate_tensor(Float32, cute.make_ordered_layout(TILE, (1, 0)), 128)


def _split(atom: Any, tile: Any, matrix: Any) -> Any:
    """Both sides of a tensor copy, as it takes them."""
    tile, matrix = cute.group_modes(tile, 0, 2), cute.group_modes(matrix, 0, 2)
    return cpasync.tma_partition(atom, 0, cute.make_layout(1), tile, matrix)


LOAD_FAULTS = {
    "correct": _Load(),
    "expects more": _Load(extra=16),  # than the copy delivers: deadlock
    "reads early": _Load(parity=1),  # which a fresh mbarrier says has passed
}
STORE_FAULTS = {
    "correct": _Store(),
    "no proxy fence": _Store(fence=False),
    "overwritten": _Store(waits=(False, True)),  # while the first copy may still read
    "exits": _Store(waits=(True, False)),  # while the second copy may still read
}


def _rows() -> Any:
    """Placeholder for a matrix whose rows begin at 16 bytes: static ones would be one dimension."""
    shape, pitch = tuple(cute.sym_int32() for _ in range(2)), cute.sym_int64(divisibility=4)
    return make_fake_tensor(Float32, shape, (pitch, 1), assumed_align=16)


def compile_load_fault(arch: str, name: str) -> Any:
    """(x [8, 32], y [8, 32]), float32: y = x, one of LOAD_FAULTS. sm_90a and up."""
    return compiled(arch, LOAD_FAULTS[name], _rows(), _rows())


def compile_store_fault(arch: str, name: str) -> Any:
    """(y [16, 32]), float32: ones, then twos, one of STORE_FAULTS. sm_90a and up."""
    return compiled(arch, STORE_FAULTS[name], _rows())
