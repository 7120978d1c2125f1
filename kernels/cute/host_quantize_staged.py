"""Host side of ``quantize_staged``: how it is compiled and launched."""

from typing import Any

from torch import Tensor

from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute import host_oriented as oriented
from fos_compile.kernels.cute.cache import Kernel, KernelKey
from fos_compile.kernels.cute.host_quantize_filtered import HALF_EXPONENTS

CTAS_PER_SM = 2
"""What registers are limited for: 128 a thread. Three or four spill, and took 1 and 3% longer for a
pair on an H100."""


def signature(key: KernelKey) -> tuple[Any, list[Any]]:
    """The kernel and what it is compiled for; sizes are symbolic."""
    from cutlass import Int64, Uint32

    from fos_compile.kernels.cute.quantize_staged import QuantizeStaged

    row, col = oriented.sides(key)
    addresses = [Int64(0)] * (2 + 1 + 4)
    numbers = [Uint32(0), Uint32(0), Uint32(HALF_EXPONENTS)]
    arguments = [general.fake_matrix(key), *addresses, *numbers, general.env_stream()]
    kernel = QuantizeStaged(_side(key, "row") if row else None, _side(key, "col") if col else None)
    return kernel, arguments


def _side(key: KernelKey, name: str) -> Any:
    from fos_compile.kernels.cute.contract import Rules
    from fos_compile.kernels.cute.quantize_staged import Side

    options = general.options_of(key)
    suffix = "" if "rounding" in options else f"_{name}"  # those of quantize have none
    rules = Rules(
        format=options["format"],
        scale_rule=options["scale_rule"],
        rounding=options["rounding" + suffix],
        block=options["block"],
    )
    return Side(rules, options["rht" + suffix])


def prepare(kernel: Kernel, num_sms: int, key: KernelKey, x: Tensor) -> general.Launch:
    """The launch of quantize or quantize_pair for matrices like x [R, C] or [B, R, C] bfloat16."""
    options = general.options_of(key)
    is_single = "rounding" in options
    has_dice = any(
        value != "nearest" for name, value in options.items() if name.startswith("rounding")
    )

    def run(
        matrix: Tensor, amax_row: Tensor, amax_col: Tensor, seed: Any, *addresses_and_stream: int
    ) -> None:
        *addresses, stream = addresses_and_stream
        kernel(
            matrix,
            amax_row.data_ptr(),
            amax_col.data_ptr(),
            seed.data_ptr() if has_dice else 0,
            *addresses,
            stream & 0xFFFFFFFF,
            (stream if is_single else stream + 1) & 0xFFFFFFFF,
            HALF_EXPONENTS,
        )

    return oriented.prepare(run, key, x)
