"""fos::quantize: one orientation of a matrix to FP4 with Four Over Six block scales.

Numerics: docs/contract.md sections 3 to 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.errors import InvalidArgument
from fos_compile.kernels.op import Cost, Example, Op, Status, cute_kernel, define_op, no_kernel
from fos_compile.kernels.reference.quantizer import Spec, quantize_matrix

SCHEMA = (
    "(Tensor x, Tensor amax, Tensor? seed=None, *, str format='nvfp4', str scale_rule='mse', "
    "str rounding='nearest', str block='1d', bool rht=False, bool transpose=False, int stream=0) "
    "-> (Tensor values, Tensor scales)"
)
# Counted on the reference, in float32 operations an element.
FLOPS_STATIC, FLOPS_ADAPTIVE, FLOPS_DICE, FLOPS_RHT = 12, 30, 15, 6


def reference(
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
    """Quantize x (or x.mT) along its last dimension.

    Args:
        x: [R, C] or [B, R, C], bfloat16, float16 or float32, any strides.
        amax: float32 [], of `fos::amax` with the same rht and transpose, or a static bound.
        seed: int64 [1]; needed unless rounding is nearest.
        format: nvfp4 or mxfp4.
        scale_rule: mse, mae, abs_max, static_6, static_4.
        rounding: nearest, stochastic, stochastic_realized, stochastic_unbiased,
            stochastic_hardware.
        block: 1d (16 elements) or 2d (16x16 tiles).
        rht: Hadamard transform over groups of 16 columns first.
        transpose: quantize x.mT.
        stream: which sequence of dice.

    Returns:
        values, scales: uint8 buffers of docs/contract.md section 2.

    Raises:
        InvalidArgument, UnsupportedArgument: see docs/contract.md section 1.
    """
    spec = checked(x, amax, seed, format, scale_rule, rounding, block, rht, transpose, stream)
    values, scales = quantize_matrix(x, amax, seed, spec)
    return values, formats.to_blocked(scales)


def checked(
    x: Tensor,
    amax: Tensor,
    seed: Tensor | None,
    format: str,
    scale_rule: str,
    rounding: str,
    block: str,
    rht: bool,
    transpose: bool,
    stream: int,
) -> Spec:
    """The options of a call whose arguments are good, else InvalidArgument, UnsupportedArgument."""
    formats.check_input("quantize", x)
    formats.check_options(
        "quantize", format=format, scale_rule=scale_rule, rounding=rounding, block=block, seed=seed
    )
    _check_number("amax", amax, torch.float32, x)
    if seed is not None and rounding != "nearest":
        _check_number("seed", seed, torch.int64, x)
    return Spec(
        format=format,
        scale_rule=scale_rule,
        rounding=rounding,
        block=block,
        rht=rht,
        transpose=transpose,
        stream=stream,
    )


def _check_number(name: str, number: Tensor, dtype: torch.dtype, x: Tensor) -> None:
    """Raise InvalidArgument unless a kernel may read `number` where x is."""
    count = number.numel()
    if number.dtype != dtype or (formats.known(count) and count != 1):
        actual = f"{number.dtype} {list(number.shape)}"
        raise InvalidArgument("quantize", name, f"{dtype} with one element", actual)
    if number.device != x.device:
        fix = f"pass {name}.to(x.device)"
        raise InvalidArgument("quantize", name, f"on {x.device} as x is", number.device, fix)


def buffer_shapes(x: Tensor, format: str, transpose: bool) -> tuple[tuple[int, ...], ...]:
    """Shapes of values and scales for x, or for x.mT."""
    *lead, rows, cols = x.shape
    if transpose:
        rows, cols = cols, rows
    values = (*lead, rows, formats.padded_cols(cols, format) // 2)
    return values, (*lead, formats.scale_count(rows, cols, format))


def empty_buffers(x: Tensor, format: str, transpose: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised values and scales for x, or for x.mT."""
    values, scales = buffer_shapes(x, format, transpose)
    return x.new_empty(values, dtype=torch.uint8), x.new_empty(scales, dtype=torch.uint8)


def fake(
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
    """Buffers by formula: tracing the reference would cost hundreds of fake operations a call."""
    checked(x, amax, seed, format, scale_rule, rounding, block, rht, transpose, stream)
    return empty_buffers(x, format, transpose)


def supports(x: Tensor, amax: Tensor, seed: Tensor | None = None, **options: object) -> Status:
    """Whether a device kernel serves this call."""
    quantizable = formats.dtype_status("quantize", x.dtype)
    if quantizable and x.device.type == "cuda":
        return cute_kernel("quantize", x, options)
    return quantizable and no_kernel("quantize", x.device)


def flops_per_element(scale_rule: str, rounding: str, rht: bool) -> int:
    """float32 operations of the definition, an element."""
    flops = FLOPS_ADAPTIVE if scale_rule in formats.ADAPTIVE_RULES else FLOPS_STATIC
    return flops + FLOPS_DICE * (rounding != "nearest") + FLOPS_RHT * rht


def cost(
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
) -> Cost:
    """One read of x, one write of each buffer."""
    written = sum(math.prod(shape) for shape in buffer_shapes(x, format, transpose))
    flops = x.numel() * flops_per_element(scale_rule, rounding, rht)
    return Cost(x.numel() * x.element_size() + written, flops)


def example_inputs() -> list[Example]:
    """Formats, rules, roundings, blocks, orientation, batch, unaligned and empty sizes."""
    x = torch.randn(18, 72)
    amax, seed = x.abs().max(), torch.tensor([7])
    half = x.bfloat16()
    return [
        ((half, amax), {}),
        ((x.half(), amax), {"scale_rule": "mae", "block": "2d"}),
        ((x, amax, seed), {"scale_rule": "abs_max", "rounding": "stochastic", "stream": 3}),
        ((half, amax, seed), {"rounding": "stochastic_realized", "transpose": True}),
        ((half, amax, seed), {"rounding": "stochastic_unbiased", "block": "2d", "rht": True}),
        ((half.view(2, 9, 72), amax, seed), {"rounding": "stochastic", "transpose": True}),
        ((half, amax, seed), {"rounding": "stochastic_hardware"}),
        ((half.mT, amax), {"scale_rule": "static_6", "rht": True}),
        ((half, amax), {"scale_rule": "static_4", "format": "mxfp4"}),
        ((half[:0], amax), {}),
        ((half[:, :0], amax), {"block": "2d"}),
    ]


QUANTIZE = define_op(
    Op(
        name="quantize",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        supports=supports,
        cost=cost,
        example_inputs=example_inputs,
    )
)
