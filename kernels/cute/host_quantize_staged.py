"""Host side of ``quantize_staged``: which matrices it reads, how it is compiled and launched."""

from typing import Any

from torch import Tensor

from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute import layout
from fos_compile.kernels.cute.cache import Kernel, KernelKey
from fos_compile.kernels.cute.host_quantize_filtered import HALF_EXPONENTS

CTAS_PER_SM = 2
"""What registers are limited for: 128 a thread. Three or four spill, and took 1 and 3% longer for a
pair on an H100."""
SIDES = ("row", "col")


def columns(x: Tensor) -> str:
    """Why the columns of x are not whole vectors of 16 bytes, or nothing."""
    return layout.anything(x) or layout.vector(x.mT)


def signature(key: KernelKey) -> tuple[Any, list[Any]]:
    """The kernel and what it is compiled for; sizes are symbolic."""
    from cutlass import Int64, Uint32

    from fos_compile.kernels.cute.contract import Rules
    from fos_compile.kernels.cute.quantize_staged import QuantizeStaged, Side

    options = general.options_of(key)
    sides: dict[str, Side | None] = dict.fromkeys(SIDES)
    for side in _sides(options):
        suffix = "" if "rounding" in options else f"_{side}"
        rules = Rules(
            format=options["format"],
            scale_rule=options["scale_rule"],
            rounding=options["rounding" + suffix],
            block=options["block"],
        )
        sides[side] = Side(rules, options["rht" + suffix])
    addresses = [Int64(0)] * (2 + 1 + 4)
    numbers = [Uint32(0), Uint32(0), Uint32(HALF_EXPONENTS)]
    arguments = [general.fake_matrix(key), *addresses, *numbers, general.env_stream()]
    return QuantizeStaged(sides["row"], sides["col"]), arguments


def _sides(options: dict[str, Any]) -> tuple[str, ...]:
    """Which orientations there are; the options of a single one have no suffix."""
    if "rounding" not in options:
        return SIDES
    return ("col",) if options["by_column"] else ("row",)


def prepare(kernel: Kernel, num_sms: int, key: KernelKey, x: Tensor) -> general.Launch:
    """The launch of quantize, or of quantize_pair if the options are those of two orientations."""
    options = general.options_of(key)
    make = _prepare_single if "rounding" in options else _prepare_pair
    return make(kernel, options, x)


def _prepare_pair(kernel: Kernel, options: dict[str, Any], x: Tensor) -> general.Launch:
    """The launch for matrices like x [R, C] or [B, R, C] bfloat16 in both orientations."""
    new_values_row, new_scales_row = general.buffers(x.shape, "nvfp4", x.device)
    new_values_col, new_scales_col = general.buffers(x.mT.shape, "nvfp4", x.device)
    if not x.numel():
        return general.idle(new_values_row, new_scales_row, new_values_col, new_scales_col)
    read = general.reader(x, True)
    has_dice = any(options[f"rounding_{side}"] != "nearest" for side in SIDES)

    def launch(
        x: Tensor, amax_row: Tensor, amax_col: Tensor, seed: Any, stream: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values_row, scales_row = new_values_row(), new_scales_row()
        values_col, scales_col = new_values_col(), new_scales_col()
        kernel(
            read(x),
            amax_row.data_ptr(),
            amax_col.data_ptr(),
            seed.data_ptr() if has_dice else 0,
            values_row.data_ptr(),
            scales_row.data_ptr(),
            values_col.data_ptr(),
            scales_col.data_ptr(),
            stream & 0xFFFFFFFF,
            (stream + 1) & 0xFFFFFFFF,
            HALF_EXPONENTS,
        )
        return values_row, scales_row, values_col, scales_col

    return launch


def _prepare_single(kernel: Kernel, options: dict[str, Any], x: Tensor) -> general.Launch:
    """The launch for matrices like x [R, C] or [B, R, C] bfloat16, seen as it is quantized."""
    new_values, new_scales = general.buffers(x.shape, "nvfp4", x.device)
    if not x.numel():
        return general.idle(new_values, new_scales)
    by_column = options["by_column"]
    read = general.reader(x.mT if by_column else x, True)
    has_dice = options["rounding"] != "nearest"

    def launch(x: Tensor, amax: Tensor, seed: Any, stream: int) -> tuple[Tensor, Tensor]:
        values, scales = new_values(), new_scales()
        addresses = values.data_ptr(), scales.data_ptr()
        kernel(
            read(x),
            amax.data_ptr(),
            amax.data_ptr(),
            seed.data_ptr() if has_dice else 0,
            *((0, 0, *addresses) if by_column else (*addresses, 0, 0)),
            stream & 0xFFFFFFFF,
            stream & 0xFFFFFFFF,
            HALF_EXPONENTS,
        )
        return values, scales

    return launch
