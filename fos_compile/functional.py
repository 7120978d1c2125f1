"""FP4 tensors by hand: quantize, dequantize, matmul.

Plain functions over the operators of the library ``fos``; they work under
``torch.compile(fullgraph=True)`` and are not differentiable. Numerics: docs/contract.md.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fos_compile.kernels  # noqa: F401, registers the operators
from fos_compile.kernels.errors import InvalidArgument, UnsupportedArgument
from fos_compile.kernels.formats import (
    DTYPES,
    WIDTH,
    check_input,
    check_options,
    from_blocked,
    qs_of,
)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class QuantizedTensor:
    """A quantized matrix and what is needed to read it; a plain record, not a tensor subclass."""

    values: Tensor
    """uint8 [rows, P/2]: two E2M1 codes a byte, the even column in the low nibble."""
    scales: Tensor
    """uint8 [L]: scale bytes in the 128x4 blocked layout."""
    amax: Tensor
    """float32 []: what the tensor scale derives from; 1 for mxfp4."""
    shape: tuple[int, ...]
    """Of the quantized tensor; its leading dimensions are the rows."""
    dtype: torch.dtype
    """Of the tensor before; the default of `dequantize`."""
    format: str
    """nvfp4 or mxfp4."""
    scale_rule: str
    """Which with `rounding` decides `qs`."""
    rounding: str
    """As given to `quantize`."""
    rht: bool
    """Whether the columns are Hadamard-transformed; `dequantize` does not undo that."""

    @property
    def qs(self) -> float:
        """Divisor of amax: dequantized = (code * scale) * amax / qs."""
        return qs_of(self.format, self.scale_rule, self.rounding)

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.values.device

    def to(self, device: str | torch.device) -> QuantizedTensor:
        """The same numbers on another device."""
        values, scales, amax = (t.to(device) for t in (self.values, self.scales, self.amax))
        return dataclasses.replace(self, values=values, scales=scales, amax=amax)

    def scales_2d(self) -> Tensor:
        """Scale bytes row-major: uint8 [rows, P/16] (mxfp4: [rows, P/32])."""
        rows, half = self.values.shape
        return from_blocked(self.scales, rows, half * 2 // WIDTH[self.format])

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """See :func:`dequantize`."""
        return dequantize(self, dtype)


_FLOAT_MAX = torch.finfo(torch.float32).max


def quantize(
    x: Tensor,
    scale_rule: str = "mse",
    format: str = "nvfp4",
    rounding: str = "nearest",
    block: str = "1d",
    rht: bool = False,
    transpose: bool = False,
    amax: float | Tensor | None = None,
    seed: int | Tensor | None = None,
) -> QuantizedTensor:
    """Quantize `x` along its last dimension, choosing between 4 and 6 in every block.

    Not differentiable.

    Args:
        x: [.., C], bfloat16, float16 or float32, any strides, any size. Leading dimensions count as
            rows of one matrix [R, C]; a vector is one row.
        scale_rule: mse, mae or abs_max (4/6); static_6 or static_4 (plain NVFP4, mxfp4).
        format: nvfp4 (blocks of 16, E4M3 scales) or mxfp4 (32, E8M0).
        rounding: nearest, stochastic, stochastic_realized, stochastic_unbiased or
            stochastic_hardware (docs/contract.md section 5).
        block: 1d, or 2d for 16x16 tiles.
        rht: Hadamard transform over groups of 16 columns first; both operands of a product need it.
        transpose: quantize the transposed matrix [C, R] instead.
        amax: static bound >= 0 instead of the largest magnitude; larger values saturate.
        seed: int or int64 [1], for stochastic rounding; None draws from torch's default generator.

    Returns:
        The quantized tensor, of shape x.shape, or [C, R] with `transpose`.

    Raises:
        InvalidArgument: an unknown option or a bad value, or a seed with nearest rounding.
        UnsupportedArgument: a dtype or combination of options that is not implemented.
    """
    matrix = _as_matrix("quantize", x)
    _check_flags(rht=rht, transpose=transpose)
    dice = _dice(rounding, seed, x.device)
    options = {"format": format, "scale_rule": scale_rule, "rounding": rounding, "block": block}
    check_options("quantize", **options, seed=dice)
    bound = _bound(matrix, 1.0 if format == "mxfp4" else amax, rht, transpose)
    values, scales = torch.ops.fos.quantize(
        matrix, bound, dice, **options, rht=rht, transpose=transpose
    )
    return QuantizedTensor(
        values=values,
        scales=scales,
        amax=bound,
        shape=tuple(matrix.mT.shape) if transpose else tuple(x.shape),
        dtype=x.dtype,
        format=format,
        scale_rule=scale_rule,
        rounding=rounding,
        rht=rht,
    )


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Values of a quantized tensor: ((code * scale) * amax) / qs in float32, rounded once.

    Not differentiable.

    Args:
        q: of :func:`quantize`. With rht its values are those of the transformed tensor.
        dtype: bfloat16, float16 or float32; None: that of the tensor before.

    Returns:
        dtype, q.shape.

    Raises:
        InvalidArgument: `q` is not of :func:`quantize`, or its buffers were changed.
        UnsupportedArgument: another dtype.
    """
    if not isinstance(q, QuantizedTensor):
        raise InvalidArgument("dequantize", "q", "a QuantizedTensor", type(q).__name__)
    dtype = _float_dtype("dequantize", "dtype", dtype or q.dtype)
    amax = None if q.format == "mxfp4" else q.amax
    rows, cols = q.values.shape[0], q.shape[-1]
    out = torch.ops.fos.dequantize(
        q.values, q.scales, amax, rows, cols, format=q.format, qs=q.qs, dtype=dtype
    )
    return out.reshape(q.shape)


def matmul(
    a: Tensor | QuantizedTensor,
    b: Tensor | QuantizedTensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """FP4 product a @ b.mT + bias, as a linear layer with weight `b`.

    Not differentiable, in `bias` neither: gradients come with ``torch.compile``'s backend.

    Args:
        a: [.., K], a tensor or quantized. A tensor is quantized (nearest, 1d) with the format,
            scale rule and rht of the other operand, or the defaults of :func:`quantize`.
        b: [N, K], likewise.
        bias: [N], any float dtype, on the operands' device, added in float32.
        out_dtype: bfloat16, float16 or float32; None: the promoted dtype of the operands.

    Returns:
        out_dtype [.., N].

    Raises:
        InvalidArgument: operands that differ in K, format, rht or device, b not a matrix, or a
            bias that does not fit.
        UnsupportedArgument: an operand dtype that cannot be quantized, or another out_dtype.
    """
    left, right = _quantized_like("a", a, b), _quantized_like("b", b, a)
    _check_operands(left, right)
    if bias is not None:
        bias = _checked_bias(bias, right)
    dtype = out_dtype or torch.promote_types(left.dtype, right.dtype)
    out = torch.ops.fos.scaled_mm(
        left.values,
        left.scales,
        left.amax,
        left.qs,
        right.values,
        right.scales,
        right.amax,
        right.qs,
        bias,
        format=left.format,
        m=left.values.shape[0],
        n=right.values.shape[0],
        k=left.shape[-1],
        out_dtype=_float_dtype("matmul", "out_dtype", dtype),
    )
    return out.reshape(*left.shape[:-1], right.shape[0])


def _as_matrix(op: str, x: Tensor) -> Tensor:
    """[.., C] -> [R, C], detached: what quantization does has no gradient."""
    if not isinstance(x, Tensor):
        raise InvalidArgument(op, "x", "a tensor", type(x).__name__)
    if x.dim() == 0:
        raise InvalidArgument(op, "x", "at least one-dimensional", "a scalar", "x.reshape(1)")
    rows = math.prod(x.shape[:-1])
    matrix = x.detach().reshape(rows, x.shape[-1])
    check_input(op, matrix)
    return matrix


def _check_flags(**flags: object) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise InvalidArgument("quantize", name, "True or False", repr(flag))


def _dice(rounding: str, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    if rounding == "nearest":
        if seed is not None:
            fix = "drop it or ask for rounding='stochastic'"
            raise InvalidArgument("quantize", "seed", "None with rounding='nearest'", seed, fix)
        return None
    if seed is None:
        return torch.ops.fos.seed(device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            actual = f"{seed.dtype} {list(seed.shape)}"
            raise InvalidArgument("quantize", "seed", "one int64", actual)
        return seed.reshape(1).to(device)
    return torch.full((1,), _int64(seed), dtype=torch.int64, device=device)


def _int64(seed: Any) -> int:
    """The seed as torch.full takes it; a symbolic one passes, because comparing would guard."""
    whole = isinstance(seed, (int, torch.SymInt)) or hasattr(seed, "__index__")
    if not whole or isinstance(seed, bool):
        raise InvalidArgument("quantize", "seed", "an integer or an int64 tensor", repr(seed))
    if torch.compiler.is_dynamo_compiling() or isinstance(seed, torch.SymInt):
        return seed
    number = operator.index(seed)
    if not -(2**63) <= number < 2**63:
        fix = "take seed % 2**63"
        raise InvalidArgument("quantize", "seed", "an integer of 64 bits, signed", number, fix)
    return number


def _bound(matrix: Tensor, amax: float | Tensor | None, rht: bool, transpose: bool) -> Tensor:
    if amax is None:
        return torch.ops.fos.amax(matrix, rht, transpose)
    if not isinstance(amax, Tensor):
        return torch.full((), _bounded(amax), dtype=torch.float32, device=matrix.device)
    if amax.numel() != 1 or amax.is_complex() or amax.dtype == torch.bool:
        actual = f"{amax.dtype} {list(amax.shape)}"
        fix = "one amax serves the whole tensor"
        raise InvalidArgument("quantize", "amax", "one real number", actual, fix)
    return amax.detach().reshape(()).to(device=matrix.device, dtype=torch.float32)


def _bounded(amax: Any) -> float:
    """The number as torch.full takes it; a symbolic one passes, because comparing would guard."""
    if torch.compiler.is_dynamo_compiling() or isinstance(amax, (torch.SymFloat, torch.SymInt)):
        return amax
    valid = isinstance(amax, numbers.Real) and not isinstance(amax, bool)
    if not valid or amax < 0 or _FLOAT_MAX < amax < math.inf:
        required = "a number from 0 to the largest float32, infinity or NaN"
        raise InvalidArgument("quantize", "amax", required, repr(amax))
    return float(amax)


def _float_dtype(op: str, name: str, dtype: Any) -> torch.dtype:
    if dtype not in DTYPES:
        fix = "cast the result"
        raise UnsupportedArgument(op, name, "bfloat16, float16 or float32", repr(dtype), fix)
    return dtype


def _checked_bias(bias: Any, b: QuantizedTensor) -> Tensor:
    size, device = b.shape[0], b.device
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        actual = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise InvalidArgument("matmul", "bias", "a floating-point tensor", actual)
    if bias.dim() != 1 or bias.shape[0] != size:
        fix = "add any other shape to the result"
        raise InvalidArgument(
            "matmul", "bias", f"[{size}], a number for each row of b", list(bias.shape), fix
        )
    if bias.device != device:
        raise InvalidArgument("matmul", "bias", f"on {device}", bias.device, "move it")
    return bias.detach()


def _quantized_like(
    name: str, x: Tensor | QuantizedTensor, other: Tensor | QuantizedTensor
) -> QuantizedTensor:
    if isinstance(x, QuantizedTensor):
        return x
    if not isinstance(x, Tensor):
        raise InvalidArgument("matmul", name, "a tensor or a QuantizedTensor", type(x).__name__)
    if isinstance(other, QuantizedTensor):
        return quantize(x, other.scale_rule, other.format, rht=other.rht)
    return quantize(x)


def _check_operands(a: QuantizedTensor, b: QuantizedTensor) -> None:
    if a.device != b.device:
        raise InvalidArgument(
            "matmul", "a and b", "on one device", f"{a.device} and {b.device}", "move one of them"
        )
    if len(b.shape) != 2:
        raise InvalidArgument("matmul", "b", "a matrix [N, K]", list(b.shape), "reshape it")
    if a.shape[-1] != b.shape[-1]:
        actual = f"{a.shape[-1]} and {b.shape[-1]}"
        raise InvalidArgument(
            "matmul", "a and b", "equal in K, their last dimension", actual, "transpose b"
        )
    if a.format != b.format:
        fix = "quantize both with one format"
        raise InvalidArgument("matmul", "format", "the same in a and b", (a.format, b.format), fix)
    if a.rht != b.rht:
        fix = "the transform cancels only if both operands have it"
        raise InvalidArgument("matmul", "rht", "the same in a and b", (a.rht, b.rht), fix)
