"""Kernels that do next to nothing, behind host functions with every kind of argument."""

import tempfile
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Float4E2M1FN, Float8E4M3FN, Float32, Int32, Int64, cute
from cutlass.cute import arch
from cutlass.cute.runtime import make_fake_stream, make_fake_tensor, make_ptr


@cute.kernel
def _tag_kernel(address: cute.Pointer, size: Int32, scale: Float32) -> None:
    if arch.thread_idx()[0] == 0:
        address.store(Float32(size) * scale)


class EveryArgument:
    """Launches once for a tensor and once for a pointer, with chosen shared memory and cluster."""

    def __init__(self, shared_bytes: int, cluster: int) -> None:
        self.shared_bytes, self.cluster = shared_bytes, cluster

    @cute.jit
    def __call__(
        self,
        packed: cute.Tensor,  # [rows, cols] of e2m1
        scales: cute.Pointer,
        result: cute.Pointer,
        sizes: tuple[Int32, Int32],
        address: Int64,
        scale: Float32,
        stream: cuda.CUstream,
    ) -> None:
        rows, cols = packed.shape
        _tag_kernel(result, cols, scale).launch(
            grid=(rows * self.cluster, sizes[0], 1),
            block=(32, 1, 1),
            cluster=(self.cluster, 1, 1),
            smem=self.shared_bytes,
            stream=stream,
        )
        other = cute.make_ptr(Float32, address, cutlass.AddressSpace.gmem, assumed_align=4)
        _tag_kernel(other, sizes[1], scale).launch(grid=(1, 1, 1), block=(64, 2, 1), stream=stream)


@cute.jit
def _maybe(result: cute.Pointer, count: Int32, stream: cuda.CUstream) -> None:
    if count > 0:
        _tag_kernel(result, count, Float32(1)).launch(
            grid=(count, 1, 1), block=(32, 1, 1), stream=stream
        )


def compile_maybe(arch: str, options: str = "") -> Any:
    """(result float*, count): a launch of `count` CTAs, none for 0."""
    result = make_ptr(Float32, 0, cutlass.AddressSpace.gmem, assumed_align=4)
    return _compile(arch, options, _maybe, result, Int32(0), make_fake_stream())


def compile_every_argument(
    arch: str, shared_bytes: int = 0, cluster: int = 1, options: str = ""
) -> Any:
    """(packed [R, C] e2m1, scales e4m3*, result float*, (y, n), address, scale)."""
    memory = cutlass.AddressSpace.gmem
    shape = (cute.sym_int32(), cute.sym_int32(divisibility=32))
    packed = make_fake_tensor(
        Float4E2M1FN, shape, (cute.sym_int64(divisibility=32), 1), assumed_align=16
    )
    scales = make_ptr(Float8E4M3FN, 0, memory, assumed_align=16)
    result = make_ptr(Float32, 0, memory, assumed_align=4)
    numbers = ((Int32(0), Int32(0)), Int64(0), Float32(0), make_fake_stream())
    kernel = EveryArgument(shared_bytes, cluster)
    return _compile(arch, options, kernel, packed, scales, result, *numbers)


def _compile(arch: str, options: str, *function_and_arguments: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        keep = f"--gpu-arch {arch} --keep-ptx --dump-dir {folder} {options}"
        return cute.compile(*function_and_arguments, options=keep)
