"""fos::unpacked_mm: what is left of fos::scaled_mm when fos::dequantize has unpacked its operands.

Where no kernel multiplies FP4 but one unpacks it, the lowering pass splits the product: two
launches of that kernel, and this, which the compiler turns into cuBLAS and an epilogue fused with
what follows. Inductor's own code for the unpacking is slower.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.errors import InvalidArgument
from fos_compile.kernels.op import Cost, Example, Op, Status, define_op
from fos_compile.kernels.scaled_mm import exact_dtype, multiply

SCHEMA = (
    "(Tensor left, Tensor right, Tensor amax_a, float qs_a, Tensor amax_b, float qs_b, "
    "Tensor? bias=None, *, ScalarType out_dtype) -> Tensor"
)


def reference(
    left: Tensor,
    right: Tensor,
    amax_a: Tensor,
    qs_a: float,
    amax_b: Tensor,
    qs_b: float,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """Multiply exact operands: alpha * (left @ right.mT) + bias (docs/contract.md section 6).

    Args:
        left: code * scale of a, [m, P] or [B, m, P], of `scaled_mm.exact_dtype`.
        right: of b, [n, P] or [B, n, P], of the same dtype.
        amax_a: float32 [].
        qs_a: of a's quantization (`formats.qs_of`).
        amax_b: float32 [].
        qs_b: of b's quantization.
        bias: [n] or broadcastable to the output, any float dtype.
        out_dtype: bfloat16, float16 or float32.

    Returns:
        out_dtype [m, n] or [B, m, n].

    Raises:
        InvalidArgument: operands that do not go together.
    """
    check(left, right)
    return multiply(left, right, amax_a, qs_a, amax_b, qs_b, bias, out_dtype)


def check(left: Tensor, right: Tensor) -> None:
    """Raise unless the operands have one dtype, batch and depth, as far as sizes are known."""
    exact = {torch.float32, exact_dtype(left.device)}
    if left.dtype is not right.dtype or left.dtype not in exact:
        required = " or both ".join(sorted(map(str, exact)))
        actual = f"{left.dtype} and {right.dtype}"
        raise InvalidArgument("unpacked_mm", "left and right", f"both {required}", actual)
    sizes = (*left.shape[:-2], left.shape[-1]), (*right.shape[:-2], right.shape[-1])
    fits = left.dim() == right.dim() and left.dim() in (2, 3)
    if not fits or (formats.known(*sizes[0], *sizes[1]) and sizes[0] != sizes[1]):
        required = "[m, P] and [n, P] or [B, m, P] and [B, n, P]"
        actual = f"{list(left.shape)} and {list(right.shape)}"
        raise InvalidArgument("unpacked_mm", "left and right", required, actual)


def fake(
    left: Tensor,
    right: Tensor,
    amax_a: Tensor,
    qs_a: float,
    amax_b: Tensor,
    qs_b: float,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Tensor:
    """[.., m, n] of out_dtype."""
    check(left, right)
    shape = (*left.shape[:-1], right.shape[-2])
    return left.new_empty(shape, dtype=out_dtype)


def supports(left: Tensor, right: Tensor, *_: object, **_options: object) -> Status:
    """Never: torch.mm multiplies, and compiled code does the rest."""
    return Status(f"unpacked_mm: torch.mm and compiled code serve on {left.device.type}")


def cost(
    left: Tensor,
    right: Tensor,
    amax_a: Tensor,
    qs_a: float,
    amax_b: Tensor,
    qs_b: float,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype,
) -> Cost:
    """One read of each operand, one write; 2 m n P a batch."""
    batch = left.shape[0] if left.dim() == 3 else 1
    m, n, depth = left.shape[-2], right.shape[-2], left.shape[-1]
    moved = (left.numel() + right.numel()) * left.element_size()
    if bias is not None:
        moved += bias.numel() * bias.element_size()
    return Cost(moved + batch * m * n * out_dtype.itemsize, 2 * batch * m * n * depth)


def example_inputs() -> list[Example]:
    """With bias, batched."""
    left, right, amax = torch.randn(18, 64), torch.randn(5, 64), torch.tensor(3.0)
    two = (left, right, amax, 1536.0, amax, 2688.0)
    batched = (left.view(2, 9, 64), right[:4].reshape(2, 2, 64), amax, 1536.0, amax, 1536.0)
    return [
        (two, {"out_dtype": torch.bfloat16}),
        ((*two, torch.randn(5)), {"out_dtype": torch.float32}),
        (batched, {"out_dtype": torch.float16}),
    ]


UNPACKED_MM = define_op(
    Op(
        name="unpacked_mm",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        supports=supports,
        cost=cost,
        example_inputs=example_inputs,
    )
)
