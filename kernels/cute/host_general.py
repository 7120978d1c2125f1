"""What host sides share: placeholders to compile for, and what is prepared for a layout.

`prepare` of a host side is called once for all matrices of one dtype, device, shape and strides.
What it returns launches, and costs the host a few microseconds: so it goes around the dispatcher
to views and buffers, as the code that Inductor generates does.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo import guards

from fos_compile.kernels import formats
from fos_compile.kernels.cute.cache import KernelKey
from fos_compile.kernels.cute.layout import VECTOR_BYTES

CTAS_PER_SM = 8
MAX_ROUNDS = 16
MAX_GRID_YZ = 65535

Launch = Callable[..., Any]
"""What `prepare` returns; takes the tensors of a call."""
Allocator = Callable[[], Tensor]


def fake_matrix(key: KernelKey) -> Any:
    """[B, R, C] of the key's dtype with symbolic sizes and strides."""
    from cutlass import BFloat16, Float16, Float32, cute
    from cutlass.cute.runtime import make_fake_tensor

    dtype = {"bfloat16": BFloat16, "float16": Float16, "float32": Float32}[key.dtype]
    shape = tuple(cute.sym_int32() for _ in range(3))
    size = 4 if dtype is Float32 else 2
    if dict(key.options).get("vector"):
        step = VECTOR_BYTES // size
        batch, row = (cute.sym_int64(divisibility=step) for _ in range(2))
        return make_fake_tensor(dtype, shape, (batch, row, 1), assumed_align=VECTOR_BYTES)
    strides = tuple(cute.sym_int64() for _ in range(3))
    return make_fake_tensor(dtype, shape, strides, assumed_align=size)


def env_stream() -> Any:
    """The placeholder for torch's current stream."""
    from cutlass.cute.runtime import make_fake_stream

    return make_fake_stream(use_tvm_ffi_env_stream=True)


def options_of(key: KernelKey) -> dict[str, Any]:
    """The static options by name."""
    return dict(key.options)


def reader(x: Tensor, vector: bool) -> Callable[[Tensor], Tensor]:
    """Views [B, R, C] with the strides of x, of any tensor that has its elements where x does.

    With `vector`, one that begins anywhere is copied: its vectors would not be aligned.
    """
    sizes, strides = tuple(x.shape), x.stride()
    if x.dim() == 2:
        sizes, strides = (1, *sizes), (sizes[0] * strides[0], *strides)

    def read(x: Tensor) -> Tensor:
        return _view(x, sizes, strides, 0)

    def read_vectors(x: Tensor) -> Tensor:
        matrix = _view(x, sizes, strides, 0)
        if x.data_ptr() % VECTOR_BYTES:
            return matrix.clone(memory_format=torch.contiguous_format)
        return matrix

    return read_vectors if vector else read


def _as_strided(x: Tensor, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Tensor:
    """`_view` in a torch that lacks it."""
    return x.detach().as_strided(sizes, strides, x.storage_offset() + offset)


_view: Callable[..., Tensor] = getattr(guards, "_reinterpret_tensor", _as_strided)
"""A third cheaper than a view through the dispatcher, and never part of an autograd graph."""


def empty_strided(device: torch.device) -> Callable[..., Tensor]:
    """A function (sizes, strides, dtype) to a new tensor on `device`."""
    fast: Callable[..., Tensor] | None = getattr(guards, f"_empty_strided_{device.type}", None)
    if fast is not None and (device.type != "cuda" or torch.cuda.device_count() == 1):
        return fast

    def allocate(sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # The fast one takes the current device, whichever that is.
        if fast is not None and torch.cuda.current_device() == device.index:
            return fast(sizes, strides, dtype)
        return torch.empty_strided(sizes, strides, dtype=dtype, device=device)

    return allocate


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a new tensor."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(size, 1)
    return tuple(reversed(strides))


def allocator(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Allocator:
    """Makes uninitialised tensors."""
    return functools.partial(empty_strided(device), shape, contiguous(shape), dtype)


def buffers(
    shape: tuple[int, ...], format: str, device: torch.device
) -> tuple[Allocator, Allocator]:
    """Make values and scales of a matrix [R, C] or [B, R, C], as it is quantized."""
    *batch, rows, cols = shape
    values = (*batch, rows, formats.padded_cols(cols, format) // 2)
    scales = (*batch, formats.scale_count(rows, cols, format))
    return allocator(values, torch.uint8, device), allocator(scales, torch.uint8, device)


def idle(*new: Allocator) -> Launch:
    """The launch for a matrix without elements: there is nothing to write."""
    return lambda *_: tuple(each() for each in new)


def rounds(batch: int, rows: int, chunks: int, num_sms: int) -> int:
    """Chunks that a CTA takes: up to MAX_ROUNDS where that leaves CTAS_PER_SM on every SM.

    A CTA begins with two divisions and ends with nothing, so more than a few rounds gain little.
    """
    ctas = batch * -(-rows // 128) * 4
    wanted = ctas * chunks // (CTAS_PER_SM * num_sms)
    return max(1, min(MAX_ROUNDS, wanted), -(-chunks // MAX_GRID_YZ))
