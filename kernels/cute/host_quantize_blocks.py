"""Host side of ``quantize_blocks``: how it is compiled and launched."""

from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute.cache import Kernel, KernelKey


def signature(key: KernelKey) -> tuple[Any, list[Any]]:
    """The kernel and what it is compiled for; sizes are symbolic."""
    from fos_compile.kernels.cute.contract import Rules
    from fos_compile.kernels.cute.quantize_blocks import QuantizeBlocks

    options = general.options_of(key)
    kernel = QuantizeBlocks(
        Rules(*(options[name] for name in Rules._fields)),
        rht=options["rht"],
        by_column=options["by_column"],
        vector=options["vector"],
    )
    return kernel, arguments(key)


def arguments(key: KernelKey) -> list[Any]:
    """Placeholders for the arguments of a general quantizer."""
    from cutlass import Int32, Int64, Uint32

    addresses = [Int64(0) for _ in ("amax", "seed", "values", "scales")]
    return [general.fake_matrix(key), *addresses, Uint32(0), Int32(1), general.env_stream()]


def launch(
    kernel: Kernel,
    num_sms: int,
    key: KernelKey,
    x: Tensor,
    amax: Tensor,
    seed: Tensor | None,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """Quantize x.

    Args:
        kernel: compiled from `signature`.
        num_sms: of the device.
        key: what it was compiled for.
        x: [R, C] or [B, R, C], as it is quantized.
        amax: float32, one element, on the device of x.
        seed: int64, one element, on the device of x; None for nearest.
        stream: which dice.
    """
    options = general.options_of(key)
    format = options["format"]
    *batch, rows, cols = x.shape
    padded = formats.padded_cols(cols, format)
    device = x.device
    values = torch.empty((*batch, rows, padded // 2), dtype=torch.uint8, device=device)
    count = formats.scale_count(rows, cols, format)
    scales = torch.empty((*batch, count), dtype=torch.uint8, device=device)
    if values.numel():
        x = general.batched(x, options.get("vector", False))
        chunks = padded // (4 * formats.WIDTH[format])
        kernel(
            x,
            amax.data_ptr(),
            0 if seed is None else seed.data_ptr(),
            values.data_ptr(),
            scales.data_ptr(),
            stream & 0xFFFFFFFF,
            general.rounds(x.shape[0], rows, chunks, num_sms),
        )
    return values, scales
