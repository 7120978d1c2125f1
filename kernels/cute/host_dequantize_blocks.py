"""Host side of ``dequantize_blocks``: the buffers it takes, how it is compiled and launched."""

from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute.cache import Kernel, KernelKey
from fos_compile.kernels.cute.layout import anything


def layout(values: Tensor) -> str:
    """Why the kernel cannot read these values, or nothing."""
    return anything(values)


def signature(key: KernelKey) -> tuple[Any, list[Any]]:
    """The kernel and what it is compiled for; sizes are symbolic."""
    import cutlass
    from cutlass import Float32, Int32, Int64, cute
    from cutlass.cute.runtime import make_fake_compact_tensor

    from fos_compile.kernels.cute.dequantize_blocks import DequantizeBlocks

    options = general.options_of(key)
    dtypes = {
        "bfloat16": cutlass.BFloat16,
        "float16": cutlass.Float16,
        "float32": cutlass.Float32,
    }
    kernel = DequantizeBlocks(
        options["format"], scaled=options["scaled"], dtype=dtypes[options["dtype"]]
    )
    half = cute.sym_int32(divisibility=32)
    values = make_fake_compact_tensor(
        cutlass.Uint8,
        (cute.sym_int32(), cute.sym_int32(), half),
        stride_order=(2, 1, 0),
        assumed_align=8,
    )
    numbers = [Int64(0), Int64(0), Float32(1.0), Int64(0), Int32(1), Int32(1)]
    return kernel, [values, *numbers, general.env_stream()]


def prepare(kernel: Kernel, num_sms: int, key: KernelKey, values: Tensor) -> general.Launch:
    """The launch for buffers whose values are like these; takes arguments of fos::dequantize."""
    *batch, rows, half = values.shape
    chunks = half // (2 * formats.WIDTH[general.options_of(key)["format"]])
    turns = general.rounds(batch[0] if batch else 1, rows, chunks, num_sms)
    empty, is_compact = general.empty_strided(values.device), values.is_contiguous()
    read = general.reader(values.contiguous(), True)

    def launch(
        values: Tensor,
        scales: Tensor,
        amax: Tensor | None,
        cols: int,
        qs: float,
        dtype: torch.dtype,
    ) -> Tensor:
        shape = (*batch, rows, cols)
        out = empty(shape, general.contiguous(shape), dtype)
        if out.numel():
            kernel(
                read(values if is_compact else values.contiguous()),
                scales.data_ptr(),
                0 if amax is None else amax.data_ptr(),
                qs,
                out.data_ptr(),
                cols,
                turns,
            )
        return out

    return launch
