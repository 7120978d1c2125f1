"""CUDA implementations of the operators: a CuTe kernel where one serves, else the reference.

The lowering pass asks `supports` of the operator and sends what no kernel serves to compiled code,
so the eager reference is met here by direct calls only. The device code is imported by the first
call that could use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels import amax as amax_op
from fos_compile.kernels import dequantize as dequantize_op
from fos_compile.kernels import quantize as quantize_op
from fos_compile.kernels import scaled_mm as scaled_mm_op
from fos_compile.kernels.op import LIBRARY


@functools.cache
def _device_code() -> Any:
    from fos_compile.kernels.cute import launch

    return launch


def cuda_amax(x: Tensor, rht: bool = False, transpose: bool = False) -> Tensor:
    """``fos::amax``; without the transform torch's own reduction is as fast."""
    done = _device_code().amax(x, transpose) if rht else None
    return done if done is not None else amax_op.reference(x, rht, transpose)


def cuda_quantize(
    x: Tensor,
    amax: Tensor,
    seed: Tensor | None = None,
    *,
    format: str = "nvfp4",
    scale_rule: str = "mse",
    rounding: str = "nearest",
    block: str = "1d",
    rht: bool = False,
    transpose: bool = False,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    """``fos::quantize``."""
    options = (format, scale_rule, rounding, block, rht, transpose)
    done = _device_code().quantize(x, amax, seed, options, stream)
    if done is not None:
        return done
    # The reference checks the arguments, and says what is wrong with those that no kernel took.
    return quantize_op.reference(
        x, amax, seed,
        format=format, scale_rule=scale_rule, rounding=rounding, block=block,
        rht=rht, transpose=transpose, stream=stream,
    )  # fmt: skip


def cuda_quantize_pair(
    x: Tensor,
    amax_row: Tensor,
    amax_col: Tensor,
    seed: Tensor | None = None,
    *,
    format: str = "nvfp4",
    scale_rule: str = "mse",
    rounding_row: str = "nearest",
    rounding_col: str = "nearest",
    block: str = "1d",
    rht_row: bool = False,
    rht_col: bool = False,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``fos::quantize_pair``: one launch or two, or what serves each orientation."""
    options = (format, scale_rule, block, rounding_row, rounding_col, rht_row, rht_col)
    done = _device_code().quantize_pair(x, amax_row, amax_col, seed, options, stream)
    if done is not None:
        return done
    shared: dict[str, Any] = {"format": format, "scale_rule": scale_rule, "block": block}
    row = cuda_quantize(
        x, amax_row, seed, **shared, rounding=rounding_row, rht=rht_row, stream=stream
    )
    col = cuda_quantize(
        x, amax_col, seed,
        **shared, rounding=rounding_col, rht=rht_col, transpose=True, stream=stream + 1,
    )  # fmt: skip
    return *row, *col


def cuda_dequantize(
    values: Tensor,
    scales: Tensor,
    amax: Tensor | None,
    rows: int,
    cols: int,
    *,
    format: str = "nvfp4",
    qs: float = 1.0,
    dtype: torch.dtype,
) -> Tensor:
    """``fos::dequantize``."""
    done = _device_code().dequantize(values, scales, amax, rows, cols, format, qs, dtype)
    if done is not None:
        return done
    return dequantize_op.reference(
        values, scales, amax, rows, cols, format=format, qs=qs, dtype=dtype
    )


def cuda_scaled_mm(
    a: Tensor,
    scales_a: Tensor,
    amax_a: Tensor,
    qs_a: float,
    b: Tensor,
    scales_b: Tensor,
    amax_b: Tensor,
    qs_b: float,
    bias: Tensor | None = None,
    *,
    format: str = "nvfp4",
    m: int,
    n: int,
    k: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """``fos::scaled_mm``: operands unpacked by a kernel where one serves, and torch's matmul."""
    scaled_mm_op.check(a, scales_a, b, scales_b, format, m, n, k)
    exact = scaled_mm_op.exact_dtype(a.device)
    left, right = (
        cuda_dequantize(
            values, scales, None, values.shape[-2], 2 * values.shape[-1],
            format=format, dtype=exact,
        )
        for values, scales in ((a, scales_a), (b, scales_b))
    )  # fmt: skip
    return scaled_mm_op.multiply(left, right, amax_a, qs_a, amax_b, qs_b, bias, out_dtype)


def register() -> None:
    """Make these the CUDA implementations of the operators."""
    served: dict[str, Callable[..., Any]] = {
        "amax": cuda_amax,
        "quantize": cuda_quantize,
        "quantize_pair": cuda_quantize_pair,
        "dequantize": cuda_dequantize,
        "scaled_mm": cuda_scaled_mm,
    }
    for name, function in served.items():
        torch.library.impl(f"{LIBRARY}::{name}", "CUDA", function)
