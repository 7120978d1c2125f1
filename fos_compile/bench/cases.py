"""What `bench matmul` multiplies: sizes, operands, and an exact corner of the product."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fos_compile.bench.timing import rotation
from fos_compile.kernels import formats
from fos_compile.kernels.dequantize import unscaled
from fos_compile.kernels.errors import InvalidArgument

CORNER = 128
"""Rows and columns of the output that are compared: a band of scales, a contiguous piece."""


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Of a product [m, k] by [n, k].T."""

    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def flops(self) -> int:
        """A product and a sum each."""
        return 2 * self.m * self.n * self.k


_MLP = ((28672, 4096), (4096, 14336))
"""Rows and columns of the weights of Llama-8B's MLP: gate and up as one, down."""
SQUARES = tuple(Shape(size, size, size) for size in (1024, 2048, 4096, 8192, 16384))
MLP = tuple(Shape(8192, n, k) for n, k in _MLP)
DECODE = tuple(Shape(m, n, k) for m in (1, 8, 16, 64) for n, k in _MLP)
QUICK = (Shape(8, 256, 128), Shape(128, 128, 256), Shape(100, 72, 96))
"""Seconds on a CPU; the last one is ragged."""
SETS = {"squares": SQUARES, "mlp": MLP, "decode": DECODE, "quick": QUICK}


def parse(text: str) -> tuple[Shape, ...]:
    """Shapes of a list such as ``squares,64x4096x4096``: names of `SETS`, and MxNxK.

    Raises:
        InvalidArgument: something else.
    """
    found: list[Shape] = []
    for part in text.split(","):
        if part in SETS:
            found.extend(SETS[part])
            continue
        sizes = part.split("x")
        if len(sizes) != 3 or not all(each.isdecimal() and int(each) for each in sizes):
            required = f"MxNxK of positive sizes, or one of {', '.join(SETS)}"
            raise InvalidArgument("bench", "shapes", required, repr(part))
        found.append(Shape(*map(int, sizes)))
    return tuple(dict.fromkeys(found))


@dataclasses.dataclass(frozen=True, slots=True)
class Operands:
    """Of a product: bf16 matrices and their quantizations."""

    shape: Shape
    x: Tensor
    w: Tensor
    a: Tensor
    scales_a: Tensor
    amax_a: Tensor
    b: Tensor
    scales_b: Tensor
    amax_b: Tensor
    qs: float
    format: str

    @property
    def packed(self) -> tuple[Tensor | float, ...]:
        """Arguments of fos::scaled_mm by position, without the bias."""
        left = self.a, self.scales_a, self.amax_a, self.qs
        return (*left, self.b, self.scales_b, self.amax_b, self.qs)

    @property
    def sizes(self) -> dict[str, object]:
        """Its arguments by keyword."""
        shape = self.shape
        sizes = {"m": shape.m, "n": shape.n, "k": shape.k}
        return {**sizes, "format": self.format, "out_dtype": torch.bfloat16}


def quantized(x: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor]:
    """values, scales and amax of a matrix [R, C]."""
    amax = torch.ops.fos.amax(x) if format == "nvfp4" else torch.ones((), device=x.device)
    values, scales = torch.ops.fos.quantize(x, amax, format=format, scale_rule=rule_of(format))
    return values, scales, amax


def rule_of(format: str) -> str:
    """The scale rule: 4/6 where the format has it."""
    return "mse" if format == "nvfp4" else "static_6"


def operands(
    shape: Shape, *, device: torch.device, format: str = "nvfp4", seed: int = 0
) -> Operands:
    """Gaussian matrices, quantized."""
    draw = torch.Generator(device=device).manual_seed(seed)

    def matrix(rows: int) -> Tensor:
        size = (rows, shape.k)
        return torch.randn(size, device=device, generator=draw, dtype=torch.bfloat16)

    x, w = matrix(shape.m), matrix(shape.n)
    qs = formats.qs_of(format, rule_of(format)) if format == "nvfp4" else 1.0
    return Operands(shape, x, w, *quantized(x, format), *quantized(w, format), qs, format)


def rotated(given: Operands) -> list[tuple[Operands]]:
    """Argument lists for `timing.measure`: copies that a GPU's L2 cache cannot hold together.

    On a CPU there are few: its numbers are there to exercise the command.
    """

    def copy(index: int) -> tuple[Tensor | Operands, ...]:
        tensors = ("x", "w", "a", "scales_a", "amax_a", "b", "scales_b", "amax_b")
        new = {name: getattr(given, name).clone() for name in tensors} if index else {}
        made = dataclasses.replace(given, **new)
        return made.a, made.scales_a, made.b, made.scales_b, made

    device = given.a.device
    sets = rotation(copy, device=device, limit=256 if device.type == "cuda" else 8)
    return [(each[-1],) for each in sets]


def disagreement(out: object, given: Operands) -> str:
    """How a result differs from the product, beyond rounding; or nothing.

    The first and the last corner of the output are compared with float64. The budget is that of
    docs/contract.md section 6: K / 64 sums, each rounded or truncated at float32, and bfloat16.
    """
    shape = given.shape
    if not isinstance(out, Tensor) or out.shape != (shape.m, shape.n):
        return f"returns {_described(out)} instead of bfloat16 [{shape.m}, {shape.n}]"
    if out.dtype is not torch.bfloat16:
        return f"returns {_described(out)} instead of bfloat16"
    alpha = (given.amax_a.double() / given.qs) * (given.amax_b.double() / given.qs)
    for rows, cols in ((_first(shape.m), _first(shape.n)), (_last(shape.m), _last(shape.n))):
        left = _exact(given.a, given.scales_a, rows, given.format)
        right = _exact(given.b, given.scales_b, cols, given.format)
        exact = alpha * (left @ right.T)
        size = alpha.abs() * (left.abs() @ right.abs().T)
        budget = (-(-shape.k // 64) + 4) * 2.0**-23 * size + 2.0**-8 * 1.01 * exact.abs() + 1e-30
        worst = ((out[rows, cols].double() - exact).abs() / budget).max()
        if not worst <= 1:  # NaN too
            return f"is off by {worst:.3g} of the error budget"
    return ""


def _first(size: int) -> slice:
    return slice(0, min(size, CORNER))


def _last(size: int) -> slice:
    return slice((size - 1) // CORNER * CORNER, size)


def _exact(values: Tensor, scales: Tensor, rows: slice, format: str) -> Tensor:
    columns = 2 * values.shape[1]
    width = columns // formats.WIDTH[format]
    part = scales[rows.start * width : (rows.start + CORNER) * width]
    return unscaled(values[rows].contiguous(), part.contiguous(), format).double()


def _described(out: object) -> str:
    if isinstance(out, Tensor):
        return f"{str(out.dtype).removeprefix('torch.')} {list(out.shape)}"
    return type(out).__name__


def limited(shapes: Sequence[Shape], bytes_: int) -> tuple[list[Shape], list[Shape]]:
    """Shapes whose operands fit into so many bytes, and the others."""
    fits = [
        each for each in shapes if 8 * (each.m + each.n) * each.k + 8 * each.m * each.n < bytes_
    ]
    return fits, [each for each in shapes if each not in fits]
