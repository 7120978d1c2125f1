"""Who multiplies in `bench matmul`: each way to compute a product, or why it cannot here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fos_compile.bench.cases import Operands, Shape, quantized
from fos_compile.kernels import target

Multiply = Callable[[Operands], Tensor]


@dataclasses.dataclass(frozen=True, slots=True)
class Provider:
    """A way to multiply.

    Attributes:
        name: in the table.
        make: what multiplies operands like those of a shape, and a word about it (a tile).
        refuses: why it cannot serve a shape, a device and a format, or nothing.
        counts: whether its result is of the quantized operands, and therefore compared.
    """

    name: str
    make: Callable[[Operands], tuple[Multiply, str]]
    refuses: Callable[[Shape, torch.device, str], str]
    counts: bool = True


def everything() -> tuple[Provider, ...]:
    """Every provider, in the order of the table."""
    return (
        Provider("bf16 torch.mm", _bf16, _never, counts=False),
        Provider("fos::scaled_mm", _operator, _never),
        Provider("ours", _ours, _ours_refuses),
        Provider("cuBLASLt", _cublaslt, _cublaslt_refuses),
        Provider("dequantize + torch.mm", _split, _never),
        Provider("quantize both + fos::scaled_mm", _total, _never),
    )


def said(error: BaseException) -> str:
    """What an error is and the first line of what it says."""
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0]}"


def _never(shape: Shape, device: torch.device, format: str) -> str:
    return ""


def _bf16(given: Operands) -> tuple[Multiply, str]:
    return lambda it: torch.mm(it.x, it.w.T), ""


def _operator(given: Operands) -> tuple[Multiply, str]:
    return lambda it: torch.ops.fos.scaled_mm(*it.packed, **it.sizes), ""


def _split(given: Operands) -> tuple[Multiply, str]:
    """What the lowering pass makes of a product where no kernel multiplies FP4."""
    from fos_compile.kernels.scaled_mm import exact_dtype
    from fos_compile.kernels.scaled_mm import multiply as product

    dtype, depth = exact_dtype(given.a.device), 2 * given.a.shape[1]
    compiled = torch.compile(product) if given.a.is_cuda else product

    def multiply(it: Operands) -> Tensor:
        kept = {"cols": depth, "format": it.format, "dtype": dtype}
        left = torch.ops.fos.dequantize(it.a, it.scales_a, None, rows=it.shape.m, **kept)
        right = torch.ops.fos.dequantize(it.b, it.scales_b, None, rows=it.shape.n, **kept)
        scales = it.amax_a, it.qs, it.amax_b, it.qs
        return compiled(left, right, *scales, None, torch.bfloat16)

    return multiply, ""


def _total(given: Operands) -> tuple[Multiply, str]:
    """As for activations and weights that change in every call."""

    def multiply(it: Operands) -> Tensor:
        a, b = quantized(it.x, it.format), quantized(it.w, it.format)
        return torch.ops.fos.scaled_mm(*a, it.qs, *b, it.qs, **it.sizes)

    return multiply, "amax, quantize, multiply"


# Ours ---------------------------------------------------------------------------------------------


def _ours_refuses(shape: Shape, device: torch.device, format: str) -> str:
    if device.type != "cuda":
        return "needs a GPU"
    status = target.status(device)
    if not status:
        return status.reason
    arch = target.arch(device)
    if arch not in ("sm_100a", "sm_103a"):
        return f"no kernel of ours multiplies FP4 on {arch}"
    return ""


def our_launch(given: Operands, choice: Any) -> Multiply:
    """Our kernel of a tile, on the device of the operands.

    Raises:
        Exception: of the compiler or the driver, if there is something wrong with the kernel.
    """
    from fos_compile.kernels.cute import host_matmul_sm100 as host
    from fos_compile.kernels.cute.cache import KERNELS

    device = given.a.device
    extra: dict[str, Any] = {"swap": True} if choice.swap else {}
    if choice.split > 1:
        extra["split"] = choice.split
    key = host.key_of(
        given.format, choice.tile, choice.cluster, dtype=torch.bfloat16, cols=given.shape.n, **extra
    )
    kernel = KERNELS.get(key, target.arch(device))
    launch = host.prepare(kernel, _num_sms(device), key, given.a, given.b)
    return lambda it: launch(*it.packed)


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _ours(given: Operands) -> tuple[Multiply, str]:
    from fos_compile.kernels.cute import matmul_tiles

    shape, device = given.shape, given.a.device
    kept: Any = {
        "format": given.format, "dtype": torch.bfloat16, "arch": target.arch(device)
    }  # fmt: skip
    sizes = shape.m, shape.n, shape.k
    choice = matmul_tiles.choose(*sizes, **kept, num_sms=_num_sms(device))
    in_flight = matmul_tiles.bytes_in_flight(choice, **kept)
    return our_launch(given, choice), f"{choice}, {in_flight} bytes in flight an SM"


# cuBLASLt -----------------------------------------------------------------------------------------


def _cublaslt_refuses(shape: Shape, device: torch.device, format: str) -> str:
    if device.type != "cuda":
        return "needs a GPU"
    if torch.cuda.get_device_capability(device) < (10, 0):
        return "FP4 needs compute capability 10.0"
    if format != "nvfp4":
        return f"cuBLASLt multiplies nvfp4 alone, got {format}"
    if shape.n % 16:  # K is padded to 64 by the quantizer
        return f"needs N a multiple of 16, got {shape}"
    return ""


def _cublaslt(given: Operands) -> tuple[Multiply, str]:
    from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

    fp4, e4m3 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
    recipe = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
    swizzle = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]

    def multiply(it: Operands) -> Tensor:
        scales_a = [it.scales_a.view(e4m3), it.amax_a / it.qs]
        scales_b = [it.scales_b.view(e4m3), it.amax_b / it.qs]
        return scaled_mm(
            it.a.view(fp4), it.b.view(fp4).t(), scales_a, recipe, scales_b, recipe,
            swizzle_a=swizzle, swizzle_b=swizzle, output_dtype=torch.bfloat16,
        )  # fmt: skip

    return multiply, "torch.nn.functional.scaled_mm"
