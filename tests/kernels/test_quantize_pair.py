from __future__ import annotations

import itertools

import pytest
import torch

from fos_compile.kernels.errors import FosError

pytestmark = pytest.mark.usefixtures("implementation")

UNBIASED = "stochastic_unbiased"
ROUNDINGS = ("nearest", "stochastic", "stochastic_realized", UNBIASED, "stochastic_hardware")
RULES = ("mse", "mae", "abs_max", "static_6", "static_4")
FORMATS = [("nvfp4", rule, block) for rule in RULES for block in ("1d", "2d")]
FORMATS += [("mxfp4", rule, "1d") for rule in RULES[3:]]
BOOLS = (False, True)


def _check(x, format, rule, block, rounding_row, rounding_col, rht_row, rht_col, stream=4):
    shared = {"format": format, "scale_rule": rule, "block": block}
    amax_row = torch.ops.fos.amax(x, rht_row)
    amax_col = torch.ops.fos.amax(x, rht_col, True)
    seed = torch.tensor([-9])
    pair = torch.ops.fos.quantize_pair(
        x,
        amax_row,
        amax_col,
        seed,
        **shared,
        rounding_row=rounding_row,
        rounding_col=rounding_col,
        rht_row=rht_row,
        rht_col=rht_col,
        stream=stream,
    )
    rows = torch.ops.fos.quantize(
        x, amax_row, seed, **shared, rounding=rounding_row, rht=rht_row, stream=stream
    )
    cols = torch.ops.fos.quantize(
        x,
        amax_col,
        seed,
        **shared,
        rounding=rounding_col,
        rht=rht_col,
        transpose=True,
        stream=stream + 1,
    )
    assert len(pair) == 4
    for got, want in zip(pair, (*rows, *cols), strict=True):
        assert torch.equal(got, want) and got.is_contiguous()


@pytest.mark.parametrize("format,rule,block", FORMATS)
def test_is_two_quantize_calls_for_all_options(format, rule, block):
    roundings = [r for r in ROUNDINGS if not (format == "mxfp4" and r == UNBIASED)]
    x = (torch.randn(18, 21) * 2.0 ** torch.arange(-9, 9)[:, None]).bfloat16()
    for options in itertools.product(roundings, roundings, BOOLS, BOOLS):
        _check(x, format, rule, block, *options)


@pytest.mark.parametrize(
    "shape",
    [(1, 70), (70, 1), (130, 66), (3, 18, 66), (1, 1, 1), (0, 64), (5, 0), (2, 0, 7)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_shapes(shape, dtype):
    x = torch.randn(shape).to(dtype)
    _check(x, "nvfp4", "mse", "1d", "nearest", "stochastic", False, True)
    _check(x, "nvfp4", "mae", "2d", "stochastic", "nearest", False, False)
    _check(x, "mxfp4", "static_6", "1d", "stochastic", "nearest", True, False)


def test_strided_input():
    base = torch.randn(2, 40, 3, 50)
    for x in (base[:, :, 1], base[0, :, 0].t(), base[1, ::3, 2, 1:48:2]):
        _check(x, "nvfp4", "mse", "1d", "stochastic", "stochastic", False, True)


def test_non_finite_input():
    x = torch.randn(20, 70)
    x[3, 5] = float("nan")
    _check(x, "nvfp4", "mse", "1d", "nearest", "nearest", False, False)
    _check(x, "mxfp4", "static_6", "1d", "nearest", "nearest", False, True)


def test_tile_scales_of_both_orientations_agree():
    """2D blocks exist so that a weight and its transpose dequantize to the same matrix."""
    x = torch.randn(48, 80)
    amax = torch.ops.fos.amax(x)
    options = {"scale_rule": "static_6", "block": "2d"}
    a, sa, b, sb = torch.ops.fos.quantize_pair(x, amax, amax, **options)
    more = {"qs": 2688.0, "dtype": torch.float32}
    rows = torch.ops.fos.dequantize(a, sa, amax, 48, 80, **more)
    cols = torch.ops.fos.dequantize(b, sb, amax, 80, 48, **more)
    assert torch.equal(rows, cols.t())


def test_meta_device_has_the_shapes_of_the_cpu():
    for shape in ((18, 70), (2, 5, 200)):
        x, one = torch.randn(shape), torch.ones(())
        real = torch.ops.fos.quantize_pair(x, one, one)
        meta = torch.ops.fos.quantize_pair(x.to("meta"), one.to("meta"), one.to("meta"))
        for a, b in zip(real, meta, strict=True):
            assert b.is_meta and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["rounding_row", "rounding_col"])
def test_each_rounding_is_validated(name, device):
    x, one = torch.randn(4, 64, device=device), torch.ones((), device=device)
    with pytest.raises(FosError, match="nearest, stochastic"):
        torch.ops.fos.quantize_pair(x, one, one, **{name: "up"})
    with pytest.raises(FosError, match="seed"):
        torch.ops.fos.quantize_pair(x, one, one, **{name: "stochastic"})
