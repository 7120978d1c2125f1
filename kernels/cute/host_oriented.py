"""What the host sides share of kernels that quantize bf16 rows, columns or both from one read."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute import layout
from fos_compile.kernels.cute.cache import KernelKey

Run = Callable[..., None]
"""Launches: (matrix [B, R, C], amax_row, amax_col, seed, addresses of values_row, scales_row,
values_col, scales_col, stream); those of an orientation that is not wanted are 0."""


def columns(x: Tensor) -> str:
    """Why the columns of x are not whole vectors of 16 bytes, or nothing."""
    return layout.anything(x) or layout.vector(x.mT)


def sides(key: KernelKey) -> tuple[bool, bool]:
    """Whether the matrix that the kernel reads is quantized, and whether its transpose is."""
    options = general.options_of(key)
    if "rounding" not in options:  # of quantize_pair
        return True, True
    return not options["by_column"], options["by_column"]


def prepare(run: Run, key: KernelKey, x: Tensor) -> general.Launch:
    """The launch of quantize, for matrices like x as it is quantized, or of quantize_pair."""
    row, col = sides(key)
    return _pair(run, x) if row and col else _single(run, x, col)


def _single(run: Run, x: Tensor, col: bool) -> general.Launch:
    new_values, new_scales = general.buffers(x.shape, "nvfp4", x.device)
    if not x.numel():
        return general.idle(new_values, new_scales)
    read = general.reader(x.mT if col else x, True)

    def launch(x: Tensor, amax: Tensor, seed: Any, stream: int) -> tuple[Tensor, Tensor]:
        values, scales = new_values(), new_scales()
        own = values.data_ptr(), scales.data_ptr()
        run(read(x), amax, amax, seed, *((0, 0, *own) if col else (*own, 0, 0)), stream)
        return values, scales

    return launch


def _pair(run: Run, x: Tensor) -> general.Launch:
    new_values_row, new_scales_row = general.buffers(x.shape, "nvfp4", x.device)
    new_values_col, new_scales_col = general.buffers(x.mT.shape, "nvfp4", x.device)
    if not x.numel():
        return general.idle(new_values_row, new_scales_row, new_values_col, new_scales_col)
    read = general.reader(x, True)

    def launch(
        x: Tensor, amax_row: Tensor, amax_col: Tensor, seed: Any, stream: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values_row, scales_row = new_values_row(), new_scales_row()
        values_col, scales_col = new_values_col(), new_scales_col()
        run(
            read(x),
            amax_row,
            amax_col,
            seed,
            values_row.data_ptr(),
            scales_row.data_ptr(),
            values_col.data_ptr(),
            scales_col.data_ptr(),
            stream,
        )
        return values_row, scales_row, values_col, scales_col

    return launch
