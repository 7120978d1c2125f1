"""Host side of ``quantize_blocks``: how it is compiled and launched."""

from typing import Any

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


def prepare(kernel: Kernel, num_sms: int, key: KernelKey, x: Tensor) -> general.Launch:
    """The launch for matrices like x [R, C] or [B, R, C], which is seen as it is quantized."""
    options = general.options_of(key)
    format, has_dice = options["format"], options["rounding"] != "nearest"
    new_values, new_scales = general.buffers(x.shape, format, x.device)
    if not x.numel():
        return general.idle(new_values, new_scales)
    read = general.reader(x, options.get("vector", False))
    *batch, rows, cols = x.shape
    chunks = formats.padded_cols(cols, format) // (4 * formats.WIDTH[format])
    turns = general.rounds(batch[0] if batch else 1, rows, chunks, num_sms)

    def launch(x: Tensor, amax: Tensor, seed: Tensor | None, stream: int) -> tuple[Tensor, Tensor]:
        values, scales = new_values(), new_scales()
        kernel(
            read(x),
            amax.data_ptr(),
            seed.data_ptr() if has_dice and seed is not None else 0,
            values.data_ptr(),
            scales.data_ptr(),
            stream & 0xFFFFFFFF,
            turns,
        )
        return values, scales

    return launch
