"""fos::quantize_pair: a matrix in both orientations from one read.

Numerics: two calls of fos::quantize, bit for bit; the columns are the rows of x.mT. The two
orientations differ in blocks and in the order of every sum, so nothing but the read is shared.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels import quantize as single
from fos_compile.kernels.op import Cost, Example, Op, Status, cute_kernel, define_op, no_kernel

SCHEMA = (
    "(Tensor x, Tensor amax_row, Tensor amax_col, Tensor? seed=None, *, str format='nvfp4', "
    "str scale_rule='mse', str rounding_row='nearest', str rounding_col='nearest', "
    "str block='1d', bool rht_row=False, bool rht_col=False, int stream=0) "
    "-> (Tensor values_row, Tensor scales_row, Tensor values_col, Tensor scales_col)"
)

Buffers = tuple[Tensor, Tensor, Tensor, Tensor]


def reference(
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
) -> Buffers:
    """Quantize x and x.mT.

    Args:
        x: [R, C] or [B, R, C], bfloat16, float16 or float32.
        amax_row: float32 [], for the rows.
        amax_col: float32 [], for the columns; differs from amax_row only under RHT.
        seed: int64 [1]; needed unless both roundings are nearest.
        format: nvfp4 or mxfp4.
        scale_rule: as in fos::quantize.
        rounding_row: rounding of x.
        rounding_col: rounding of x.mT.
        block: 1d or 2d.
        rht_row: Hadamard transform along C.
        rht_col: Hadamard transform along R.
        stream: dice of the rows; the columns use stream + 1.

    Returns:
        values_row, scales_row, values_col, scales_col: as from fos::quantize.
    """
    row = single.reference(
        x,
        amax_row,
        seed,
        format=format,
        scale_rule=scale_rule,
        block=block,
        rounding=rounding_row,
        rht=rht_row,
        stream=stream,
    )
    col = single.reference(
        x,
        amax_col,
        seed,
        format=format,
        scale_rule=scale_rule,
        block=block,
        rounding=rounding_col,
        rht=rht_col,
        transpose=True,
        stream=stream + 1,
    )
    return (*row, *col)


def fake(
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
    **rest: object,
) -> Buffers:
    """Buffers by formula, as in fos::quantize."""
    for amax, rounding in ((amax_row, rounding_row), (amax_col, rounding_col)):
        single.checked(x, amax, seed, format, scale_rule, rounding, block, False, False, 0)
    row = single.empty_buffers(x, format, transpose=False)
    col = single.empty_buffers(x, format, transpose=True)
    return (*row, *col)


def supports(
    x: Tensor,
    amax_row: Tensor,
    amax_col: Tensor,
    seed: Tensor | None = None,
    *,
    rounding_row: str = "nearest",
    rounding_col: str = "nearest",
    rht_row: bool = False,
    rht_col: bool = False,
    **options: object,
) -> Status:
    """Whether device kernels serve this call: one for the pair, or one for each orientation."""
    quantizable = formats.dtype_status("quantize_pair", x.dtype)
    if not quantizable or x.device.type != "cuda":
        return quantizable and no_kernel("quantize_pair", x.device)
    sides = {
        "rounding_row": rounding_row,
        "rounding_col": rounding_col,
        "rht_row": rht_row,
        "rht_col": rht_col,
    }
    fused = cute_kernel("quantize_pair", x, {**options, **sides})
    if fused:
        return fused
    row = single.supports(x, amax_row, seed, **options, rounding=rounding_row, rht=rht_row)
    both = row and single.supports(
        x, amax_col, seed, **options, rounding=rounding_col, rht=rht_col, transpose=True
    )
    return both or Status(f"quantize_pair: {both.reason}")


def cost(
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
) -> Cost:
    """One read of x, one write of each of the four buffers."""
    row = single.cost(
        x, amax_row, format=format, scale_rule=scale_rule, rounding=rounding_row, rht=rht_row
    )
    col = single.cost(
        x,
        amax_col,
        format=format,
        scale_rule=scale_rule,
        rounding=rounding_col,
        rht=rht_col,
        transpose=True,
    )
    read_twice = x.numel() * x.element_size()
    return Cost(row.bytes + col.bytes - read_twice, row.flops + col.flops)


def example_inputs() -> list[Example]:
    """Equal and different options of the two orientations, batch, 2D, mxfp4."""
    x = torch.randn(18, 70).bfloat16()
    amax, seed = x.abs().max().float(), torch.tensor([7])
    wgrad = {"rounding_row": "stochastic", "rounding_col": "stochastic", "rht_col": True}
    return [
        ((x, amax, amax), {}),
        ((x, amax, amax), {"block": "2d", "scale_rule": "mae"}),
        ((x, amax, amax, seed), {**wgrad, "stream": 4}),
        ((x.view(2, 9, 70), amax, amax, seed), {"rounding_col": "stochastic_unbiased"}),
        ((x, amax, amax), {"format": "mxfp4", "scale_rule": "static_6"}),
    ]


QUANTIZE_PAIR = define_op(
    Op(
        name="quantize_pair",
        schema=SCHEMA,
        reference=reference,
        fake=fake,
        supports=supports,
        cost=cost,
        example_inputs=example_inputs,
    )
)
