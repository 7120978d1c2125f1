from __future__ import annotations

import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from vectors import (
    make,
    oracle,
    oracle_quantize,
    quantize_options,
    row_major,
    run_quantize,
    seed_tensor,
    unpack,
)

from fos_compile.kernels.errors import FosError

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = ("bfloat16", "float16", "float32")
KINDS = ("randn", "wide", "zeros", "nan", "inf", "huge", "range")
RULES = ("mse", "mae", "abs_max", "static_6", "static_4")


@st.composite
def options(draw):
    """Every combination of options that the contract allows."""
    mx = draw(st.integers(0, 4)) == 0
    roundings = ("nearest", *oracle.STOCHASTIC)
    return oracle.Options(
        dtype=draw(st.sampled_from(DTYPES)),
        format="mxfp4" if mx else "nvfp4",
        scale_rule=draw(st.sampled_from(RULES[3:] if mx else RULES)),
        rounding=draw(
            st.sampled_from([r for r in roundings if not (mx and r == "stochastic_unbiased")])
        ),
        block="1d" if mx else draw(st.sampled_from(("1d", "2d"))),
        rht=draw(st.booleans()),
        transpose=draw(st.booleans()),
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        stream=draw(st.integers(0, 2**31 - 1)),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    opt=options(),
    batch=st.sampled_from([None, None, 1, 3]),
    rows=st.integers(1, 20),
    cols=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    number=st.integers(0, 2**31 - 1),
    static=st.sampled_from([None, None, None, 0.25, 4.0, 1e30, float("nan"), 2.0**-117]),
)
def test_matches_the_oracle(opt, batch, rows, cols, kind, number, static):
    shape = (rows, cols) if batch is None else (batch, rows, cols)
    kind = "randn" if np.prod(shape) < 8 else kind
    x = torch.from_numpy(make.data(shape, kind, number, opt.dtype)).to(getattr(torch, opt.dtype))
    with np.errstate(all="ignore"):
        matrices = list(x.float().numpy()) if batch else [x.float().numpy()]
        amax = torch.tensor(oracle.tensor_amax(matrices, opt))
    if opt.format == "nvfp4":
        measured = torch.ops.fos.amax(x, opt.rht, opt.transpose)
        np.testing.assert_array_equal(measured, amax)
    amax = amax if static is None else torch.tensor(static)
    values, scales = run_quantize(x, amax, opt)
    expected_values, expected_scales = oracle_quantize(x, amax, opt)
    np.testing.assert_array_equal(scales, expected_scales)
    np.testing.assert_array_equal(values, expected_values)


EMPTY = [(0, 64), (0, 70), (5, 0), (0, 0), (2, 0, 64), (0, 5, 64), (2, 5, 0)]


@pytest.mark.parametrize("format,block", [("nvfp4", "1d"), ("nvfp4", "2d"), ("mxfp4", "1d")])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("shape", EMPTY)
def test_empty(shape, transpose, format, block):
    rule = "static_6" if format == "mxfp4" else "mse"
    x = torch.empty(shape, dtype=torch.bfloat16)
    rows, cols = shape[-2:][::-1] if transpose else shape[-2:]
    width = 32 if format == "mxfp4" else 16
    padded = -(-cols // (4 * width)) * 4 * width
    for rounding, seed in (("nearest", None), ("stochastic", torch.tensor([1]))):
        values, scales = torch.ops.fos.quantize(
            x,
            torch.zeros(()),
            seed,
            format=format,
            scale_rule=rule,
            rounding=rounding,
            block=block,
            transpose=transpose,
        )
        assert values.shape == (*shape[:-2], rows, padded // 2)
        assert scales.shape == (*shape[:-2], -(-rows // 128) * 128 * (padded // width))
        assert not scales.any() and not values.any()
        assert values.dtype == scales.dtype == torch.uint8


def test_one_row_is_the_first_row():
    x = torch.randn(7, 96)
    amax = torch.ops.fos.amax(x)
    values, scales = torch.ops.fos.quantize(x, amax)
    first, first_scales = torch.ops.fos.quantize(x[:1], amax)
    assert torch.equal(values[:1], first)
    np.testing.assert_array_equal(row_major(scales, 7, 8)[:1], row_major(first_scales, 1, 8))


@pytest.mark.parametrize("block", ["1d", "2d"])
@pytest.mark.parametrize("transpose", [False, True])
def test_strides_do_not_matter(block, transpose):
    base = torch.randn(3, 40, 2, 100).bfloat16()
    views = [
        base[:, :, 1],
        base[1, :, :, ::2].flatten(1),
        base[0, :, 0].t(),
        base[:, 0, 0, :1].expand(3, 50),
        base[::2, 3:30, 0, 5:70],
    ]
    for x in views:
        assert not x.is_contiguous() or x.dim() == 2
        amax = torch.ops.fos.amax(x)
        got = torch.ops.fos.quantize(x, amax, block=block, transpose=transpose)
        want = torch.ops.fos.quantize(
            x.clone(memory_format=torch.contiguous_format), amax, block=block, transpose=transpose
        )
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b) and a.is_contiguous()


def test_inputs_are_not_written_and_outputs_are_new():
    x, amax, seed = torch.randn(18, 64), torch.tensor(4.0), torch.tensor([3])
    before = [t.clone() for t in (x, amax, seed)]
    torch.ops.fos.quantize(x, amax, seed, rounding="stochastic")
    assert all(torch.equal(a, b) for a, b in zip(before, (x, amax, seed), strict=True))


def test_batch_is_its_matrices():
    x = torch.randn(3, 20, 70).half()
    amax = torch.ops.fos.amax(x)
    for more in ({}, {"block": "2d"}, {"transpose": True, "rht": True}):
        values, scales = torch.ops.fos.quantize(x, amax, **more)
        parts = [torch.ops.fos.quantize(m, amax, **more) for m in x]
        assert torch.equal(values, torch.stack([v for v, _ in parts]))
        assert torch.equal(scales, torch.stack([s for _, s in parts]))


def test_transpose_is_the_transposed_matrix():
    x = torch.randn(2, 20, 70)
    amax = torch.ops.fos.amax(x)
    for rht in (False, True):
        got = torch.ops.fos.quantize(x, amax, transpose=True, rht=rht)
        want = torch.ops.fos.quantize(x.mT.contiguous(), amax, rht=rht)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "stochastic_hardware"])
def test_mxfp4_ignores_amax(rounding):
    x = torch.randn(9, 70)
    opt = oracle.Options(format="mxfp4", scale_rule="static_6", rounding=rounding)
    want = run_quantize(x, torch.ones(()), opt)
    for amax in (0.0, 7.0, float("nan"), float("inf")):
        got = run_quantize(x, torch.tensor(amax), opt)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_nearest_ignores_the_seed():
    x = torch.randn(9, 70)
    want = torch.ops.fos.quantize(x, torch.tensor(4.0))
    got = torch.ops.fos.quantize(x, torch.tensor(4.0), torch.tensor([5]), stream=9)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("amax", [float("nan"), float("inf"), float("-inf")])
def test_amax_that_is_not_finite_marks_every_stored_scale(amax, rule):
    values, scales = torch.ops.fos.quantize(
        torch.randn(130, 70), torch.tensor(amax), scale_rule=rule
    )
    assert not values.any()
    assert (row_major(scales, 130, 8) == 0x7F).all()
    assert (scales == 0x7F).sum() == 130 * 8 and (scales == 0).sum() == scales.numel() - 130 * 8


def test_range_of_the_tensor_maximum():
    x = torch.full((1, 64), 2.0**-116)
    for amax, empty in ((2.0**-116, False), (float(np.nextafter(np.float32(2.0**-116), 0)), True)):
        values, scales = torch.ops.fos.quantize(x, torch.tensor(amax))
        assert bool(values.any()) is not empty and bool(scales.any()) is not empty


@pytest.mark.parametrize("rounding", ["nearest", "stochastic_hardware"])
def test_negative_values_and_signed_zero(rounding):
    x = torch.zeros(1, 64)
    # Below 2^-17 of a step, so that no dice move it.
    x[0, :6] = torch.tensor([6.0, -6.0, -0.0, 0.0, -1e-6, 1e-6])
    options = {"scale_rule": "static_6", "rounding": rounding}
    codes = unpack(torch.ops.fos.quantize(x, torch.tensor(6.0), torch.tensor([3]), **options)[0])
    assert codes[0, :6].tolist() == [7, 15, 0, 0, 8, 0]
    assert not codes[0, 6:].any()


def test_meta_device_has_the_shapes_of_the_cpu():
    for shape, more in (((18, 70), {}), ((2, 5, 200), {"transpose": True, "block": "2d"})):
        x = torch.randn(shape).half()
        real = torch.ops.fos.quantize(x, torch.ones(()), **more)
        meta = torch.ops.fos.quantize(x.to("meta"), torch.ones((), device="meta"), **more)
        for a, b in zip(real, meta, strict=True):
            assert b.is_meta and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


BAD = {
    "format": ({"format": "fp8"}, "nvfp4, mxfp4.*fp8"),
    "rule": ({"scale_rule": "max"}, "mse, mae, abs_max, static_6, static_4.*max"),
    "rounding": (
        {"rounding": "up"},
        "nearest, stochastic, stochastic_realized, stochastic_unbiased, stochastic_hardware.*up",
    ),
    "block": ({"block": "3d"}, "1d, 2d.*3d"),
    "mxfp4_rule": ({"format": "mxfp4"}, "static_6.*static_4"),
    "mxfp4_block": ({"format": "mxfp4", "scale_rule": "static_6", "block": "2d"}, "1d"),
    "mxfp4_unbiased": (
        {"format": "mxfp4", "scale_rule": "static_4", "rounding": "stochastic_unbiased"},
        "rounding",
    ),
    "no_seed": ({"rounding": "stochastic_hardware"}, "seed"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", BAD)
def test_invalid_options_name_the_valid_ones(case, device):
    more, message = BAD[case]
    seed = None if case == "no_seed" else torch.tensor([1], device=device)
    with pytest.raises(FosError, match=message):
        torch.ops.fos.quantize(
            torch.randn(4, 64, device=device), torch.ones((), device=device), seed, **more
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64, torch.bool])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(FosError, match=f"bfloat16, float16 or float32.*{dtype}"):
        torch.ops.fos.quantize(torch.ones(4, 64).to(dtype), torch.ones(()))


@pytest.mark.parametrize("shape", [(64,), (), (2, 2, 4, 64)])
def test_other_ranks_are_refused(shape):
    with pytest.raises(FosError, match="x must be"):
        torch.ops.fos.quantize(torch.ones(shape), torch.ones(()))


def test_helpers_pass_every_option_on():
    opt = oracle.Options(rounding="stochastic", seed=5, stream=4, block="2d", rht=True)
    assert seed_tensor(opt).tolist() == [5]
    assert quantize_options(opt)["stream"] == 4 and quantize_options(opt)["rht"] is True


SEED = torch.tensor([7])
BAD_NUMBERS = {
    "two elements": ({"amax": torch.ones(2)}, "amax must be torch.float32 with one element"),
    "float64": ({"amax": torch.ones((), dtype=torch.float64)}, "amax must be torch.float32"),
    "amax elsewhere": ({"amax": torch.ones((), device="meta")}, "amax must be on cpu as x is"),
    "seed of int32": ({"seed": SEED.int()}, "seed must be torch.int64 with one element"),
    "two seeds": ({"seed": SEED.repeat(2)}, "seed must be torch.int64 with one element"),
    "no seed": ({"seed": None}, "seed must be an int64 tensor"),
    "rank": ({"x": torch.ones(16)}, "x must be"),
    "dtype": ({"x": torch.ones(16, 64, dtype=torch.float64)}, "x must be bfloat16"),
}


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("pair", [False, True], ids=["quantize", "quantize_pair"])
@pytest.mark.parametrize("bad", BAD_NUMBERS)
def test_bad_arguments_are_named(bad, pair, fake):
    changed, message = BAD_NUMBERS[bad]
    given = {"x": torch.ones(16, 64).bfloat16(), "amax": torch.ones(()), "seed": SEED, **changed}
    x, amax, seed = given["x"], given["amax"], given["seed"]
    mode = FakeTensorMode() if fake else nullcontext()
    if fake:
        x, amax, seed = (t if t is None else mode.from_tensor(t) for t in (x, amax, seed))
    with mode, pytest.raises(FosError, match=re.escape(message)):
        if pair:
            torch.ops.fos.quantize_pair(x, amax, amax, seed, rounding_col="stochastic")
        else:
            torch.ops.fos.quantize(x, amax, seed, rounding="stochastic")
