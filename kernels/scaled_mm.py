"""fos::scaled_mm: a @ b.mT of two FP4 operands.

Numerics (docs/contract.md section 6): exact products, float32 accumulation in any order, then
alpha, bias, one rounding. The fallback multiplies the exact operands code * scale: float32 on CPU;
elsewhere bfloat16 with float32 accumulation and output, which represents both formats exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.dequantize import unscaled
from fos_compile.kernels.errors import InvalidArgument
from fos_compile.kernels.op import Cost, Example, Op, Status, define_op, no_kernel
from fos_compile.kernels.reference.blocks import same_constant

SCHEMA = (
    "(Tensor a, Tensor scales_a, Tensor amax_a, float qs_a, Tensor b, Tensor scales_b, "
    "Tensor amax_b, float qs_b, Tensor? bias=None, *, str format='nvfp4', SymInt m, SymInt n, "
    "SymInt k, ScalarType out_dtype) -> Tensor"
)


def reference(
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
    """Multiply FP4 operands: alpha * (a @ b.mT) + bias.

    Args:
        a: uint8 [m, P/2] or [B, m, P/2].
        scales_a: uint8 [L] or [B, L], blocked.
        amax_a: float32 [].
        qs_a: of a's quantization (`formats.qs_of`).
        b: uint8 [n, P/2] or [B, n, P/2].
        scales_b: uint8, as scales_a.
        amax_b: float32 [].
        qs_b: of b's quantization.
        bias: [n] or broadcastable to the output, any float dtype.
        format: of both operands.
        m: logical rows of a.
        n: logical rows of b.
        k: logical columns of both; the padding up to P multiplies to zero.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        out_dtype [m, n] or [B, m, n].

    Raises:
        InvalidArgument: buffers and sizes that do not go together, or an unknown format.
    """
    check(a, scales_a, b, scales_b, format, m, n, k)
    exact = exact_dtype(a.device)
    left = unscaled(a, scales_a, format).to(exact)
    right = unscaled(b, scales_b, format).to(exact)
    return multiply(left, right, amax_a, qs_a, amax_b, qs_b, bias, out_dtype)


def exact_dtype(device: torch.device) -> torch.dtype:
    """What the exact operands code * scale are multiplied in: a product of bfloat16 with a float32
    output exists on GPUs only."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def multiply(
    left: Tensor,
    right: Tensor,
    amax_a: Tensor,
    qs_a: float,
    amax_b: Tensor,
    qs_b: float,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """The product of two exact operands [.., m, P] and [.., n, P], and its epilogue.

    Raises:
        InvalidArgument: an amax of more or less than one element.
    """
    for name, amax in (("amax_a", amax_a), ("amax_b", amax_b)):
        if amax.numel() != 1:
            raise InvalidArgument("scaled_mm", name, "one element", f"shape {list(amax.shape)}")
    matmul = torch.mm if left.dim() == 2 else torch.bmm
    if left.dtype is torch.float32:
        product = matmul(left, right.mT)
    else:
        product = matmul(left, right.mT, out_dtype=torch.float32)
    out = product * (_tensor_scale(amax_a, qs_a) * _tensor_scale(amax_b, qs_b))
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(out_dtype)


def _tensor_scale(amax: Tensor, qs: float) -> Tensor:
    finite = torch.where(amax.abs() < float("inf"), amax, 1.0)
    return amax / same_constant(qs, finite)


def check(
    a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor, format: str, m: int, n: int, k: int
) -> None:
    """Raise unless the operands and their logical sizes go together, as far as sizes are known."""
    if format not in formats.FORMATS:
        valid = f"one of {', '.join(formats.FORMATS)}"
        raise InvalidArgument("scaled_mm", "format", valid, repr(format))
    if a.dim() != b.dim() or a.dim() not in (2, 3):
        raise InvalidArgument(
            "scaled_mm",
            "a and b",
            "both [rows, P/2] or both [B, rows, P/2]",
            f"{list(a.shape)} and {list(b.shape)}",
            "flatten leading dims or add a batch dimension",
        )
    formats.check_buffers("scaled_mm", ("a", "scales_a"), a, scales_a, format)
    formats.check_buffers("scaled_mm", ("b", "scales_b"), b, scales_b, format)
    if not formats.known(*a.shape, *b.shape, m, n, k):
        return
    padded = 2 * a.shape[-1]
    if 2 * b.shape[-1] != padded or a.shape[:-2] != b.shape[:-2]:
        actual = f"{list(a.shape)} and {list(b.shape)}"
        raise InvalidArgument("scaled_mm", "a and b", "equal in batch and P", actual)
    if (m, n) != (a.shape[-2], b.shape[-2]):
        rows = f"{a.shape[-2]} and {b.shape[-2]}, the rows of a and b"
        raise InvalidArgument("scaled_mm", "m and n", rows, f"{m} and {n}")
    if not 0 <= k <= padded:
        raise InvalidArgument("scaled_mm", "k", f"at most {padded}, the columns of a and b", k)


def fake(
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
    """[.., m, n] of out_dtype; no operand is materialised while faking."""
    check(a, scales_a, b, scales_b, format, m, n, k)
    return a.new_empty((*a.shape[:-2], m, n), dtype=out_dtype)


def supports(
    a: Tensor,
    scales_a: Tensor,
    amax_a: Tensor,
    qs_a: float,
    b: Tensor,
    scales_b: Tensor,
    amax_b: Tensor,
    qs_b: float,
    bias: Tensor | None = None,
    **options: object,
) -> Status:
    """Whether a device kernel serves this call."""
    return no_kernel("scaled_mm", a.device)


def cost(
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
) -> Cost:
    """One read of each operand, one write; 2 m n k a batch."""
    batch = a.shape[0] if a.dim() == 3 else 1
    moved = a.numel() + scales_a.numel() + b.numel() + scales_b.numel()
    if bias is not None:
        moved += bias.numel() * bias.element_size()
    return Cost(moved + batch * m * n * out_dtype.itemsize, 2 * batch * m * n * k)


def example_inputs() -> list[Example]:
    """Both formats, batched, with bias."""
    a = torch.randint(256, (18, 64), dtype=torch.uint8)
    b = torch.randint(256, (5, 64), dtype=torch.uint8)
    scales = torch.randint(120, (128 * 8,), dtype=torch.uint8)
    amax, sizes = torch.tensor(3.0), {"m": 18, "n": 5, "k": 100}
    two = (a, scales, amax, 1536.0, b, scales, amax, 2688.0)
    mx = (a, scales[:512], amax / amax, 1.0, b, scales[:512], amax / amax, 1.0)
    batched = (a.view(2, 9, 64), scales.repeat(2, 1), amax, 1536.0)
    other = (b[:4].view(2, 2, 64), scales.repeat(2, 1), amax, 1536.0)
    return [
        (two, {**sizes, "out_dtype": torch.bfloat16}),
        ((*two, torch.randn(5)), {**sizes, "out_dtype": torch.float32}),
        ((*batched, *other), {"m": 9, "n": 2, "k": 128, "out_dtype": torch.float16}),
        (mx, {**sizes, "format": "mxfp4", "out_dtype": torch.float32}),
    ]


SCALED_MM = define_op(
    Op(
        name="scaled_mm",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        supports=supports,
        cost=cost,
        example_inputs=example_inputs,
    )
)
