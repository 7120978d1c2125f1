"""First rung: loads and stores, shared memory, shuffles, atomics, divergence and clusters."""

from typing import Any, Literal

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cute import arch
from cutlass.utils import SmemAllocator

from fos_compile.kernels.cute import shared
from tests.emulator.kernels import compiled, matrix, vector

THREADS = 128
WARPS = THREADS // 32
TILE = 32
"""Rows and columns of a tile that is transposed."""
BINS = 64


def _index() -> Any:
    """The thread's number in the grid."""
    return arch.block_idx()[0] * THREADS + arch.thread_idx()[0]


def _grid(count: Any) -> tuple[Any, int, int]:
    """CTAs for a lane an element."""
    return cute.ceil_div(count, THREADS), 1, 1


@cute.kernel
def _add_kernel(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor) -> None:
    i = _index()
    if i < c.shape[0]:
        c[i] = a[i] + b[i]


@cute.jit
def _add(a: cute.Tensor, b: cute.Tensor, c: cute.Tensor, stream: cuda.CUstream) -> None:
    kernel = _add_kernel(a, b, c)
    kernel.launch(grid=_grid(c.shape[0]), block=(THREADS, 1, 1), stream=stream)


def compile_add(arch: str) -> Any:
    """(a [n], b [n], c [n]), float32: c = a + b, a lane an element."""
    return compiled(arch, _add, *(vector(Float32) for _ in range(3)))


@cute.kernel
def _strided_kernel(x: cute.Tensor, y: cute.Tensor) -> None:
    tx, ty, _ = arch.thread_idx()
    bx, by, _ = arch.block_idx()
    width, height, _ = arch.block_dim()
    row, col = by * height + ty, bx * width + tx
    if row < x.shape[0] and col < x.shape[1]:
        y[row, col] = x[row, col]


@cute.jit
def _strided(x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream) -> None:
    grid = (cute.ceil_div(x.shape[1], 32), cute.ceil_div(x.shape[0], 4), 1)
    _strided_kernel(x, y).launch(grid=grid, block=(32, 4, 1), stream=stream)


def compile_strided(arch: str, dtype: Any = Float32) -> Any:
    """(x [R, C], y [R, C]) of any strides: y = x, blocks of 32 x 4 threads."""
    return compiled(arch, _strided, matrix(dtype), matrix(dtype))


@cute.kernel
def _vectors_kernel(x: cute.Tensor, y: cute.Tensor) -> None:
    i = _index()
    if i * 4 < x.shape[0]:
        cute.autovec_copy(cute.local_tile(x, (4,), (i,)), cute.local_tile(y, (4,), (i,)))


@cute.jit
def _vectors(x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream) -> None:
    grid = _grid(cute.ceil_div(x.shape[0], 4))
    _vectors_kernel(x, y).launch(grid=grid, block=(THREADS, 1, 1), stream=stream)


def compile_vectors(arch: str) -> Any:
    """(x [n], y [n]), float32 at 16-byte boundaries, n a multiple of 4: y = x, 128 bits a lane."""
    return compiled(arch, _vectors, vector(Float32, 16), vector(Float32, 16))


@cute.kernel
def _transpose_kernel(x: cute.Tensor, y: cute.Tensor) -> None:
    tx, ty, _ = arch.thread_idx()
    bx, by, _ = arch.block_idx()
    # A pitch of an odd number of words: no two lanes of a column share a bank.
    layout = cute.make_layout((TILE, TILE), stride=(TILE + 1, 1))
    tile = SmemAllocator().allocate_tensor(Float32, layout, byte_alignment=16)
    for i in cutlass.range_constexpr(0, TILE, 8):
        row, col = by * TILE + ty + i, bx * TILE + tx
        if row < x.shape[0] and col < x.shape[1]:
            tile[ty + i, tx] = x[row, col]
    arch.sync_threads()
    for i in cutlass.range_constexpr(0, TILE, 8):
        row, col = bx * TILE + ty + i, by * TILE + tx
        if row < y.shape[0] and col < y.shape[1]:
            y[row, col] = tile[tx, ty + i]


@cute.jit
def _transpose(x: cute.Tensor, y: cute.Tensor, stream: cuda.CUstream) -> None:
    grid = (cute.ceil_div(x.shape[1], TILE), cute.ceil_div(x.shape[0], TILE), 1)
    _transpose_kernel(x, y).launch(grid=grid, block=(TILE, 8, 1), stream=stream)


def compile_transpose(arch: str) -> Any:
    """(x [R, C], y [C, R]), float32 of any strides: y = x.T, through shared memory."""
    return compiled(arch, _transpose, matrix(Float32), matrix(Float32))


@cute.kernel
def _sums_kernel(x: cute.Tensor, sums: cute.Tensor, count: Int32) -> None:
    tid, _, _ = arch.thread_idx()
    cta, _, _ = arch.block_idx()
    partial = cute.make_tensor(arch.alloc_smem(Float32, WARPS), cute.make_layout(WARPS))
    total = Float32(0)
    for i in cutlass.range(cta * count + tid, cutlass.min((cta + 1) * count, x.shape[0]), THREADS):
        total += x[i]
    for step in (16, 8, 4, 2, 1):
        total += arch.shuffle_sync_bfly(total, offset=step)
    if arch.lane_idx() == 0:
        partial[tid // 32] = total
    arch.sync_threads()
    if tid == 0:
        for i in cutlass.range_constexpr(1, WARPS):
            total += partial[i]
        sums[cta] = total


@cute.jit
def _sums(x: cute.Tensor, sums: cute.Tensor, count: Int32, stream: cuda.CUstream) -> None:
    grid = (sums.shape[0], 1, 1)
    _sums_kernel(x, sums, count).launch(grid=grid, block=(THREADS, 1, 1), stream=stream)


def compile_sums(arch: str) -> Any:
    """(x [n], sums [ceil(n / count)], count), float32 and int: the sum of every `count` numbers.

    A CTA a sum: a loop, shuffles inside the warps, shared memory between them.
    """
    return compiled(arch, _sums, vector(Float32), vector(Float32), Int32(1))


@cute.kernel
def _votes_kernel(x: cute.Tensor, positive: cute.Tensor, largest: cute.Tensor) -> None:
    i = _index()
    number = Int32(0)
    if i < x.shape[0]:
        number = x[i]
    count = arch.popc(arch.vote_ballot_sync(number > 0))
    most = arch.warp_redux_sync(number, "max")
    if i < x.shape[0]:
        positive[i], largest[i] = count, most


@cute.jit
def _votes(
    x: cute.Tensor, positive: cute.Tensor, largest: cute.Tensor, stream: cuda.CUstream
) -> None:
    kernel = _votes_kernel(x, positive, largest)
    kernel.launch(grid=_grid(x.shape[0]), block=(THREADS, 1, 1), stream=stream)


def compile_votes(arch: str) -> Any:
    """(x [n], positive [n], largest [n]), int32: of every 32 numbers, to each of them.

    How many are positive, and the largest one or 0, which stands for numbers past the end.
    """
    return compiled(arch, _votes, *(vector(Int32) for _ in range(3)))


@cute.kernel
def _histogram_kernel(x: cute.Tensor, counts: cute.Tensor) -> None:
    i = _index()
    tid, _, _ = arch.thread_idx()
    mine = cute.make_tensor(arch.alloc_smem(Int32, BINS), cute.make_layout(BINS))
    if tid < BINS:
        mine[tid] = Int32(0)
    arch.sync_threads()
    if i < x.shape[0]:
        arch.atomic_add(mine.iterator + x[i], Int32(1), scope="cta")
    arch.sync_threads()
    if tid < BINS:
        arch.red(
            counts.iterator + tid, mine[tid], op="add", dtype="s32", sem="relaxed", scope="gpu"
        )


@cute.jit
def _histogram(x: cute.Tensor, counts: cute.Tensor, stream: cuda.CUstream) -> None:
    kernel = _histogram_kernel(x, counts)
    kernel.launch(grid=_grid(x.shape[0]), block=(THREADS, 1, 1), stream=stream)


def compile_histogram(arch: str) -> Any:
    """(x [n], counts [64]), int32: adds to counts[b] how many of x, 0 <= x < 64, are b.

    Atomics in shared memory, then reductions in global memory.
    """
    return compiled(arch, _histogram, vector(Int32), vector(Int32))


@cute.kernel
def _collatz_kernel(x: cute.Tensor, steps: cute.Tensor) -> None:
    i = _index()
    if i < x.shape[0]:
        number, count = x[i], Int32(0)
        while number > 1:
            while number % 2 == 0:
                number, count = number // 2, count + 1
            if number > 1:
                number, count = number * 3 + 1, count + 1
        steps[i] = count


@cute.jit
def _collatz(x: cute.Tensor, steps: cute.Tensor, stream: cuda.CUstream) -> None:
    kernel = _collatz_kernel(x, steps)
    kernel.launch(grid=_grid(x.shape[0]), block=(THREADS, 1, 1), stream=stream)


def compile_collatz(arch: str) -> Any:
    """(x [n], steps [n]), int32 positive: the steps to 1; trips of nested loops differ by lane."""
    return compiled(arch, _collatz, vector(Int32), vector(Int32))


@cute.kernel
def _exchange_kernel(x: cute.Tensor, y: cute.Tensor, by_mbarrier: cutlass.Constexpr) -> None:
    i = _index()
    tid, _, _ = arch.thread_idx()
    peer = arch.block_idx_in_cluster() ^ 1
    received = arch.alloc_smem(Int32, THREADS)
    arrived = arch.alloc_smem(Int64, 1, alignment=8)
    if tid == 0:
        arch.mbarrier_init(arrived, THREADS)
    arch.mbarrier_init_fence()
    arch.cluster_arrive()
    arch.cluster_wait()
    theirs = shared.address_of(arch.map_dsmem_ptr(received + tid, peer))
    arch.inline_ptx("st.shared::cluster.b32 [{$r0}], {$r1};", read_only_args=[theirs, x[i]])
    if cutlass.const_expr(by_mbarrier):
        arch.fence_acq_rel_cluster()
        arch.mbarrier_arrive(arrived, peer)
        arch.mbarrier_wait(arrived, 0)
        arch.fence_acq_rel_cluster()
    else:
        arch.cluster_arrive()
        arch.cluster_wait()
    y[i] = cute.make_tensor(received, cute.make_layout(THREADS))[tid]


@cute.jit
def _exchange(
    x: cute.Tensor, y: cute.Tensor, by_mbarrier: cutlass.Constexpr, stream: cuda.CUstream
) -> None:
    kernel = _exchange_kernel(x, y, by_mbarrier)
    kernel.launch(grid=_grid(x.shape[0]), block=(THREADS, 1, 1), cluster=(2, 1, 1), stream=stream)


def compile_exchange(arch: str, barrier: Literal["cluster", "mbarrier"] = "cluster") -> Any:
    """(x [n], y [n]), int32, n a multiple of 256: CTAs of a cluster of two swap their 128 numbers.

    Each writes to its peer's shared memory; what follows is a barrier of the cluster, or one in
    the peer's shared memory. sm_90a and up.
    """
    return compiled(arch, _exchange, vector(Int32), vector(Int32), barrier == "mbarrier")
