"""fos::dequantize: FP4 buffers back to a matrix.

Numerics: without amax code * scale, exact in every dtype for nvfp4; with amax
((code * scale) * amax) / qs in float32; one rounding to dtype (docs/contract.md section 6).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.errors import InvalidArgument, UnsupportedArgument
from fos_compile.kernels.op import Cost, Example, Op, Status, cute_kernel, define_op, no_kernel
from fos_compile.kernels.reference.blocks import same_constant

SCHEMA = (
    "(Tensor values, Tensor scales, Tensor? amax, SymInt rows, SymInt cols, *, "
    "str format='nvfp4', float qs=1.0, ScalarType dtype) -> Tensor"
)


def unscaled(values: Tensor, scales: Tensor, format: str) -> Tensor:
    """code * scale of every padded column: float32 [.., R, P]."""
    *lead, rows, half = values.shape
    width = formats.WIDTH[format]
    groups = half * 2 // width
    scale = formats.decode_scale(formats.from_blocked(scales, rows, groups), format)
    q = formats.decode_e2m1(formats.unpack(values)).unflatten(-1, (groups, width))
    return (q * scale.unsqueeze(-1)).reshape(*lead, rows, half * 2)


def reference(
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
    """Decode FP4 buffers.

    Args:
        values: uint8 [rows, P/2] or [B, rows, P/2].
        scales: uint8 [L] or [B, L], blocked.
        amax: float32 [] for the values of the quantized tensor; None for the unscaled operand.
        rows: logical rows.
        cols: logical columns, at most P.
        format: nvfp4 or mxfp4.
        qs: of the quantization (`formats.qs_of`); unused without amax.
        dtype: bfloat16, float16 or float32.

    Returns:
        dtype [rows, cols] or [B, rows, cols].
    """
    check(values, scales, rows, cols, format, dtype)
    return rescaled(unscaled(values, scales, format), amax, cols, qs, dtype)


def rescaled(out: Tensor, amax: Tensor | None, cols: int, qs: float, dtype: torch.dtype) -> Tensor:
    """What follows :func:`unscaled`: tensor scale, padding cut off, one rounding to dtype."""
    if amax is not None:
        one = same_constant(1.0, torch.where(amax.abs() < float("inf"), amax, 1.0))
        # (code * scale) * amax overflows from amax = 2^117 on where the result does not. Shifting
        # both factors by 2^12 changes no bit for amax > 1: nothing gets near the subnormals.
        shift = torch.where(amax > 1.0, 2.0**-12, formats.constant(1.0, amax))
        out = (out * (amax * shift)) / (one * qs * shift)
    cut = out.narrow(-1, 0, cols)
    return torch.ops.aten._to_copy(cut, dtype=dtype, memory_format=torch.contiguous_format)


def check(
    values: Tensor, scales: Tensor, rows: int, cols: int, format: str, dtype: torch.dtype
) -> None:
    """Raise unless the buffers can be decoded to [rows, cols] of ``dtype``."""
    if format not in formats.FORMATS:
        raise InvalidArgument(
            "dequantize", "format", f"one of {', '.join(formats.FORMATS)}", repr(format)
        )
    if dtype not in formats.DTYPES:
        raise UnsupportedArgument(
            "dequantize", "dtype", "bfloat16, float16 or float32", dtype, "cast the result"
        )
    formats.check_buffers("dequantize", ("values", "scales"), values, scales, format)
    height, half = values.shape[-2:]
    if formats.known(rows, height) and rows != height:
        raise InvalidArgument("dequantize", "rows", f"{height}, those of values", rows)
    if formats.known(cols, half) and not 0 <= cols <= 2 * half:
        raise InvalidArgument("dequantize", "cols", f"at most {2 * half}, those of values", cols)


def fake(
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
    """[.., rows, cols] of dtype."""
    check(values, scales, rows, cols, format, dtype)
    return values.new_empty((*values.shape[:-2], rows, cols), dtype=dtype)


def supports(
    values: Tensor,
    scales: Tensor,
    amax: Tensor | None,
    rows: int,
    cols: int,
    *,
    format: str = "nvfp4",
    qs: float = 1.0,
    dtype: torch.dtype,
) -> Status:
    """Whether a device kernel serves this call."""
    if values.device.type == "cuda":
        options = {"format": format, "scaled": amax is not None, "dtype": dtype}
        return cute_kernel("dequantize", values, options)
    return no_kernel("dequantize", values.device)


def cost(
    values: Tensor,
    scales: Tensor,
    amax: Tensor | None,
    rows: int,
    cols: int,
    *,
    format: str = "nvfp4",
    qs: float = 1.0,
    dtype: torch.dtype,
) -> Cost:
    """One read of the buffers, one write of the matrix."""
    elements = values.numel() * 2
    moved = values.numel() + scales.numel() + elements * dtype.itemsize
    return Cost(moved, elements * (1 if amax is None else 3))


def example_inputs() -> list[Example]:
    """Both formats, with and without amax, batched."""
    values = torch.randint(256, (18, 64), dtype=torch.uint8)
    scales = torch.randint(120, (128 * 8,), dtype=torch.uint8)
    amax = torch.tensor(3.0)
    batched = (values.view(2, 9, 64), scales.repeat(2, 1))
    return [
        ((values, scales, None, 18, 100), {"dtype": torch.bfloat16}),
        ((values, scales, amax, 18, 128), {"qs": 1536.0, "dtype": torch.float32}),
        ((*batched, amax, 9, 70), {"qs": 2688.0, "dtype": torch.float16}),
        ((values, scales[:512], None, 18, 70), {"format": "mxfp4", "dtype": torch.float32}),
    ]


DEQUANTIZE = define_op(
    Op(
        name="dequantize",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        supports=supports,
        cost=cost,
        example_inputs=example_inputs,
    )
)
