"""Host side of ``quantize_tiles_staged``: how it is compiled and launched."""

from typing import Any

from torch import Tensor

from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute import host_oriented as oriented
from fos_compile.kernels.cute.cache import Kernel, KernelKey
from fos_compile.kernels.cute.host_quantize_filtered import HALF_EXPONENTS

THREADS = 128
CTAS_PER_SM = 7
"""What registers are limited for."""


def signature(key: KernelKey) -> tuple[Any, list[Any]]:
    """The kernel and what it is compiled for; sizes are symbolic."""
    from cutlass import Int64, Uint32

    from fos_compile.kernels.cute.contract import Rules
    from fos_compile.kernels.cute.quantize_tiles_staged import QuantizeTilesStaged

    options = general.options_of(key)
    rules = Rules(options["format"], options["scale_rule"], "nearest", "2d")
    row, col = oriented.sides(key)
    addresses = [Int64(0)] * 6
    return QuantizeTilesStaged(rules, row=row, col=col), [
        general.fake_matrix(key), *addresses, Uint32(HALF_EXPONENTS), general.env_stream(),
    ]  # fmt: skip


def prepare(kernel: Kernel, num_sms: int, key: KernelKey, x: Tensor) -> general.Launch:
    """The launch of quantize or quantize_pair for matrices like x [R, C] or [B, R, C] bfloat16."""

    def run(
        matrix: Tensor, amax_row: Tensor, amax_col: Tensor, _seed: Any, *addresses_and_stream: int
    ) -> None:
        *addresses, _ = addresses_and_stream
        kernel(matrix, amax_row.data_ptr(), amax_col.data_ptr(), *addresses, HALF_EXPONENTS)

    return oriented.prepare(run, key, x)
