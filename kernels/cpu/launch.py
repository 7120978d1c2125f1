"""The CPU implementations of the operators: allocate, call the C++ kernel, return.

Validation and the definition are in the operator files; where the kernel is not available these
functions call the reference.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels import dequantize, formats, quantize, scaled_mm
from fos_compile.kernels.amax import reference as amax_reference
from fos_compile.kernels.cpu.build import loaded, status
from fos_compile.kernels.errors import InvalidArgument
from fos_compile.kernels.op import LIBRARY, without_autocast

_DTYPE = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_RULE = {"mse": 0, "mae": 1, "abs_max": 2, "static_6": 3, "static_4": 3}
_ROUNDING = {"nearest": 0, "stochastic": 1, "stochastic_realized": 2, "stochastic_unbiased": 1}
_i64 = ctypes.c_int64


def _matrix(x: Tensor, transpose: bool) -> tuple[list[Any], int, int, int]:
    """Leading kernel arguments for x or x.mT, and batch, rows, cols."""
    x = x.mT if transpose else x
    batched = x if x.dim() == 3 else x.unsqueeze(0)
    batch, rows, cols = batched.shape
    sizes = [_i64(v) for v in (batch, rows, cols, *batched.stride())]
    return [ctypes.c_void_p(x.data_ptr()), _DTYPE[x.dtype], *sizes], batch, rows, cols


def _threads(x: Tensor) -> int:
    """Starting a thread costs as much as some ten thousand elements."""
    return max(1, min(torch.get_num_threads(), x.numel() // 2**15))


def _pointer(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def cpu_amax(x: Tensor, rht: bool = False, transpose: bool = False) -> Tensor:
    """``fos::amax``; without the transform torch's own reduction is as fast."""
    if not rht or not status():
        return amax_reference(x, rht, transpose)
    formats.check_input("amax", x)
    matrix, _, _, cols = _matrix(x, transpose)
    padded = formats.padded_cols(cols, "nvfp4")
    most = loaded().fos_amax(*matrix, _i64(padded), 1, _threads(x))
    return torch.tensor(most, dtype=torch.float32)


def cpu_quantize(
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
    # What has no number here is not served, or no rounding at all, which the reference says.
    if not status() or rounding not in _ROUNDING:
        options = {"format": format, "scale_rule": scale_rule, "rounding": rounding, "block": block}
        return quantize.reference(
            x, amax, seed, **options, rht=rht, transpose=transpose, stream=stream
        )
    quantize.checked(x, amax, seed, format, scale_rule, rounding, block, rht, transpose, stream)
    matrix, _, _, cols = _matrix(x, transpose)
    shape_values, shape_scales = quantize.buffer_shapes(x, format, transpose)
    values = torch.empty(shape_values, dtype=torch.uint8)
    scales = torch.zeros(shape_scales, dtype=torch.uint8)
    q = formats.value_max(scale_rule, rounding)
    loaded().fos_quantize(
        *matrix,
        _i64(formats.padded_cols(cols, format)),
        int(format == "mxfp4"),
        _RULE[scale_rule],
        _ROUNDING[rounding],
        int(block == "2d"),
        int(rht),
        ctypes.c_uint32(stream),
        ctypes.c_uint64(
            int(seed) & (2**64 - 1) if seed is not None and rounding != "nearest" else 0
        ),
        ctypes.c_float(float(amax)),
        ctypes.c_float(q),
        ctypes.c_float(formats.qs_of(format, scale_rule, rounding)),
        _pointer(values),
        _pointer(scales),
        _threads(x),
    )
    return values, scales


def cpu_quantize_pair(
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
    """``fos::quantize_pair``, as its definition says."""
    shared: dict[str, Any] = {"format": format, "scale_rule": scale_rule, "block": block}
    row = cpu_quantize(
        x, amax_row, seed, **shared, rounding=rounding_row, rht=rht_row, stream=stream
    )
    col = cpu_quantize(
        x,
        amax_col,
        seed,
        **shared,
        rounding=rounding_col,
        rht=rht_col,
        transpose=True,
        stream=stream + 1,
    )
    return *row, *col


def cpu_unscaled(values: Tensor, scales: Tensor, format: str) -> Tensor:
    """code * scale, float32 [.., R, P]: what the matmul and ``fos::dequantize`` start from."""
    values, scales = values.contiguous(), scales.contiguous()
    *lead, rows, half = values.shape
    out = torch.empty((*lead, rows, 2 * half), dtype=torch.float32)
    batch = lead[0] if lead else 1
    # The kernel trusts its pointers.
    length = batch * formats.scale_count(rows, 2 * half, format)
    if scales.numel() != length or scales.dtype != torch.uint8 or values.dtype != torch.uint8:
        actual = f"{scales.numel()} of {scales.dtype}"
        raise InvalidArgument("cpu kernel", "scales", f"{length} bytes", actual)
    if out.numel():
        loaded().fos_unscaled(
            _pointer(values),
            _pointer(scales),
            _i64(batch),
            _i64(rows),
            _i64(2 * half),
            int(format == "mxfp4"),
            _pointer(out),
            _threads(out),
        )
    return out


def cpu_dequantize(
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
    if not status():
        return dequantize.reference(
            values, scales, amax, rows, cols, format=format, qs=qs, dtype=dtype
        )
    dequantize.check(values, scales, rows, cols, format, dtype)
    return dequantize.rescaled(cpu_unscaled(values, scales, format), amax, cols, qs, dtype)


def cpu_scaled_mm(
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
    """``fos::scaled_mm``: exact operands by the kernel, float32 product by torch."""
    if not status():
        return scaled_mm.reference(
            a, scales_a, amax_a, qs_a, b, scales_b, amax_b, qs_b, bias,
            format=format, m=m, n=n, k=k, out_dtype=out_dtype,
        )  # fmt: skip
    scaled_mm.check(a, scales_a, b, scales_b, format, m, n, k)
    left, right = cpu_unscaled(a, scales_a, format), cpu_unscaled(b, scales_b, format)
    return scaled_mm.multiply(left, right, amax_a, qs_a, amax_b, qs_b, bias, out_dtype)


def register() -> None:
    """Make these the CPU implementations of the operators."""
    served: dict[str, Callable[..., Any]] = {
        "amax": cpu_amax,
        "quantize": cpu_quantize,
        "quantize_pair": cpu_quantize_pair,
        "dequantize": cpu_dequantize,
        "scaled_mm": cpu_scaled_mm,
    }
    for name, function in served.items():
        torch.library.impl(f"{LIBRARY}::{name}", "CPU", without_autocast(function))
