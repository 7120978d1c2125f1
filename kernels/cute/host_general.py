"""What the host sides of the general kernels (`tiles`) share."""

from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels.cute.cache import KernelKey
from fos_compile.kernels.cute.layout import VECTOR_BYTES

CTAS_PER_SM = 8
MAX_ROUNDS = 16
MAX_GRID_YZ = 65535


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


def batched(x: Tensor, vector: bool) -> Tensor:
    """x as [B, R, C], where its vectors are aligned."""
    if vector and x.data_ptr() % VECTOR_BYTES:  # a view that begins anywhere
        x = x.clone(memory_format=torch.contiguous_format)
    return x if x.dim() == 3 else x.unsqueeze(0)


def rounds(batch: int, rows: int, chunks: int, num_sms: int) -> int:
    """Chunks that a CTA takes: up to MAX_ROUNDS where that leaves CTAS_PER_SM on every SM.

    A CTA begins with two divisions and ends with nothing, so more than a few rounds gain little.
    """
    ctas = batch * -(-rows // 128) * 4
    wanted = ctas * chunks // (CTAS_PER_SM * num_sms)
    return max(1, min(MAX_ROUNDS, wanted), -(-chunks // MAX_GRID_YZ))
