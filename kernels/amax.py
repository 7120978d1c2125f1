"""fos::amax: the largest magnitude of a tensor, the numerator of its tensor scale.

Numerics: exact; after transpose, padding and RHT, so only under RHT does the orientation matter.
Plain aten without RHT, rows first, so that Inductor fuses it into the producer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.op import Cost, Example, Op, Status, cute_kernel, define_op, no_kernel
from fos_compile.kernels.reference.blocks import group_lanes

SCHEMA = "(Tensor x, bool rht=False, bool transpose=False) -> Tensor"


def reference(x: Tensor, rht: bool = False, transpose: bool = False) -> Tensor:
    """Largest magnitude of the tensor that is quantized.

    Args:
        x: [R, C] or [B, R, C], bfloat16, float16 or float32.
        rht: after the Hadamard transform.
        transpose: of x.mT; matters with rht.

    Returns:
        float32 []; NaN if any element is NaN, 0 if x is empty.
    """
    formats.check_input("amax", x)
    # Only sizes known while tracing can be 0: symbolic ones are at least 2.
    if any(isinstance(size, int) and size == 0 for size in x.shape):
        return x.new_zeros((), dtype=torch.float32)
    if rht:
        x = group_lanes(x, "nvfp4", rht, transpose)
    return x.abs().amax(-1).amax().to(torch.float32)


def fake(x: Tensor, rht: bool = False, transpose: bool = False) -> Tensor:
    """float32 []."""
    formats.check_input("amax", x)
    return x.new_empty((), dtype=torch.float32)


def supports(x: Tensor, rht: bool = False, transpose: bool = False) -> Status:
    """Whether a device kernel serves this call."""
    quantizable = formats.dtype_status("amax", x.dtype)
    if quantizable and x.device.type == "cuda":
        return cute_kernel("amax", x, {"rht": rht, "transpose": transpose})
    return quantizable and no_kernel("amax", x.device)


def cost(x: Tensor, rht: bool = False, transpose: bool = False) -> Cost:
    """One read; one comparison an element, and four additions for the transform."""
    return Cost(x.numel() * x.element_size() + 4, x.numel() * (6 if rht else 2))


def example_inputs() -> list[Example]:
    """All dtypes, both orientations, batched, empty."""
    x = torch.randn(18, 70)
    return [
        ((x.bfloat16(),), {}),
        ((x.half(), True), {}),
        ((x, True, True), {}),
        ((x.view(2, 9, 70),), {}),
        ((x.mT, False, True), {}),
        ((x[:0],), {}),
    ]


AMAX = define_op(
    Op(
        name="amax",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        supports=supports,
        cost=cost,
        example_inputs=example_inputs,
    )
)
