"""Host side of ``quantize_tiles_staged``: how it is compiled and launched."""

from typing import Any

from torch import Tensor

from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute.cache import Kernel, KernelKey
from fos_compile.kernels.cute.host_quantize_filtered import HALF_EXPONENTS

THREADS = 128
CTAS_PER_SM = 7
"""What registers are limited for."""


def sides(key: KernelKey) -> tuple[bool, bool]:
    """Whether what the kernel reads is quantized, and whether its transpose is."""
    options = general.options_of(key)
    if "rounding" not in options:
        return True, True
    return not options["by_column"], options["by_column"]


def signature(key: KernelKey) -> tuple[Any, list[Any]]:
    """The kernel and what it is compiled for; sizes are symbolic."""
    from cutlass import Int64, Uint32

    from fos_compile.kernels.cute.contract import Rules
    from fos_compile.kernels.cute.quantize_tiles_staged import QuantizeTilesStaged

    options = general.options_of(key)
    rules = Rules(options["format"], options["scale_rule"], "nearest", "2d")
    row, col = sides(key)
    addresses = [Int64(0)] * 6
    return QuantizeTilesStaged(rules, row=row, col=col), [
        general.fake_matrix(key), *addresses, Uint32(HALF_EXPONENTS), general.env_stream(),
    ]  # fmt: skip


def prepare(kernel: Kernel, num_sms: int, key: KernelKey, x: Tensor) -> general.Launch:
    """The launch for matrices like x [R, C] or [B, R, C] bfloat16, seen as it is quantized."""
    row, col = sides(key)
    if row and col:
        return _pair(kernel, x)
    new_values, new_scales = general.buffers(x.shape, "nvfp4", x.device)
    if not x.numel():
        return general.idle(new_values, new_scales)
    read = general.reader(x.mT if col else x, True)

    def launch(x: Tensor, amax: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        values, scales = new_values(), new_scales()
        own, none = (values.data_ptr(), scales.data_ptr()), (0, 0)
        outputs = (*none, *own) if col else (*own, *none)
        number = amax.data_ptr()
        kernel(read(x), number, number, *outputs, HALF_EXPONENTS)
        return values, scales

    return launch


def _pair(kernel: Kernel, x: Tensor) -> general.Launch:
    *batch, rows, cols = x.shape
    new_values, new_scales = general.buffers(x.shape, "nvfp4", x.device)
    new_values_col, new_scales_col = general.buffers((*batch, cols, rows), "nvfp4", x.device)
    if not x.numel():
        return general.idle(new_values, new_scales, new_values_col, new_scales_col)
    read = general.reader(x, True)

    def launch(
        x: Tensor, amax_row: Tensor, amax_col: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, scales = new_values(), new_scales()
        values_col, scales_col = new_values_col(), new_scales_col()
        kernel(
            read(x),
            amax_row.data_ptr(),
            amax_col.data_ptr(),
            values.data_ptr(),
            scales.data_ptr(),
            values_col.data_ptr(),
            scales_col.data_ptr(),
            HALF_EXPONENTS,
        )
        return values, scales, values_col, scales_col

    return launch
