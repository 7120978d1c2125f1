"""A compiled kernel against the reference, on the device that is about to use it.

Most of these kernels have run on few devices. Before the first real call each one quantizes a small
matrix of everything that goes wrong: ties, zeros, both signs of zero, a block that is tiny, rows
and columns that do not fill a tile. A kernel that differs in one bit is not used.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.cute.tables import NAMES

ROWS, COLS = 40, 88
SEED, STREAM = -1234567890123456789, 3
_OUTPUTS = ("values", "scales", "values of the columns", "scales of the columns")


def disagreement(
    op: str, options: dict[str, Any], dtype: torch.dtype, launch: Callable[..., Any], device: Any
) -> str:
    """What a kernel gets wrong, or nothing.

    Args:
        op: of the tables.
        options: of the kernel's key, `by_column` included where it has it.
        dtype: of its matrix.
        launch: as the tables call it.
        device: where to run it.
    """
    try:
        got, want = _RUNS[op](options, dtype, launch, device)
        got = [output.cpu() for output in got]
    except Exception as error:
        return f"fails on a small matrix: {type(error).__name__}: {error}"
    for name, a, b in zip(_OUTPUTS, got, want, strict=False):
        if a.shape != b.shape:
            return f"gives {name} of shape {list(a.shape)} instead of {list(b.shape)}"
        same = ((a == b) & (a.signbit() == b.signbit())) | ((a != a) & (b != b))
        if not bool(same.all()):
            return f"differs from the reference in {int((~same).sum())} of {b.numel()} {name}"
    return ""


def _matrix(dtype: torch.dtype, by_column: bool) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, COLS, generator=generator)
    x[:8] = torch.randint(-24, 25, (8, COLS), generator=generator) / 4.0
    x[8, :32], x[9, ::3], x[10] = 0.0, -0.0, x[10] * 1e-4
    x[11] *= torch.exp(3 * torch.randn(COLS, generator=generator))
    x = x.to(dtype)
    return x.mT.contiguous().mT if by_column else x


def _quantize(
    options: dict[str, Any], dtype: torch.dtype, launch: Callable[..., Any], device: Any
) -> tuple[Any, Any]:
    names = ("format", "scale_rule", "rounding", "block", "rht")
    chosen = {name: options[name] for name in names}
    x = _matrix(dtype, options.get("by_column", False))
    amax = torch.ops.fos.amax(x, chosen["rht"])
    amax = torch.ones(()) if chosen["format"] == "mxfp4" else amax
    seed = torch.tensor([SEED])
    want = torch.ops.fos.quantize(x, amax, seed, stream=STREAM, **chosen)
    return launch(x.to(device), amax.to(device), seed.to(device), STREAM), want


def _pair(
    options: dict[str, Any], dtype: torch.dtype, launch: Callable[..., Any], device: Any
) -> tuple[Any, Any]:
    chosen = {name: options[name] for name in NAMES["quantize_pair"]}
    x, seed = _matrix(dtype, options.get("by_column", False)), torch.tensor([SEED])
    # Under the transform the two differ: a kernel that swaps them is wrong.
    amaxes = [
        torch.ops.fos.amax(x, options["rht_row"]),
        torch.ops.fos.amax(x, options["rht_col"], True),
    ]
    want = torch.ops.fos.quantize_pair(x, *amaxes, seed, stream=STREAM, **chosen)
    given = [tensor.to(device) for tensor in (x, *amaxes, seed)]
    return launch(*given, STREAM), want


def _amax(
    options: dict[str, Any], dtype: torch.dtype, launch: Callable[..., Any], device: Any
) -> tuple[Any, Any]:
    x = _matrix(dtype, options["by_column"])
    return (launch(x.to(device)),), (torch.ops.fos.amax(x, True),)


def _dequantize(
    options: dict[str, Any], _dtype: torch.dtype, launch: Callable[..., Any], device: Any
) -> tuple[Any, Any]:
    format, scaled = options["format"], options["scaled"]
    dtype = getattr(torch, options["dtype"])
    rule = "mse" if format == "nvfp4" else "static_6"
    x = _matrix(torch.float32, False)
    amax = x.abs().max()
    buffers = torch.ops.fos.quantize(x, amax, format=format, scale_rule=rule)
    qs = formats.qs_of(format, rule) if scaled else 1.0
    tensor_scale = amax if scaled else None
    want = torch.ops.fos.dequantize(
        *buffers, tensor_scale, ROWS, COLS, format=format, qs=qs, dtype=dtype
    )
    values, scales = (buffer.to(device) for buffer in buffers)
    got = launch(values, scales, amax.to(device) if scaled else None, COLS, qs, dtype)
    return (got,), (want,)


_RUNS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "quantize": _quantize,
    "amax": _amax,
    "dequantize": _dequantize,
    "quantize_pair": _pair,
}
