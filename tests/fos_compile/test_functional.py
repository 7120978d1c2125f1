"""The functions of the public surface against the operators they are made of."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from vectors import oracle, row_major, unpack

import fos_compile
from fos_compile import functional
from fos_compile.kernels.errors import FosError
from fos_compile.kernels.formats import qs_of

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EMPTY = inspect.Parameter.empty


def test_signatures_are_those_of_the_design():
    def parameters(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items()}

    assert parameters(fos_compile.quantize) == {
        "x": EMPTY,
        "scale_rule": "mse",
        "format": "nvfp4",
        "rounding": "nearest",
        "block": "1d",
        "rht": False,
        "transpose": False,
        "amax": None,
        "seed": None,
    }
    assert parameters(fos_compile.matmul) == {
        "a": EMPTY,
        "b": EMPTY,
        "bias": None,
        "out_dtype": None,
    }
    for name in ("quantize", "dequantize", "matmul", "QuantizedTensor"):
        assert getattr(fos_compile, name) is getattr(functional, name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_rule": "mae", "block": "2d"},
        {"scale_rule": "abs_max", "rht": True},
        {"scale_rule": "static_6", "transpose": True, "rht": True},
        {"rounding": "stochastic", "seed": -5},
        {"rounding": "stochastic_unbiased", "seed": 2**40, "transpose": True},
        {"rounding": "stochastic_hardware", "seed": 2**40, "transpose": True},
        {"format": "mxfp4", "scale_rule": "static_4"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_amax_and_the_operator(dtype, options):
    x = torch.randn(18, 70).to(dtype)
    q = fos_compile.quantize(x, **options)
    rht, transpose = options.get("rht", False), options.get("transpose", False)
    amax = torch.ops.fos.amax(x, rht, transpose)
    if options.get("format") == "mxfp4":
        amax = torch.ones(())
    seed = torch.tensor([options["seed"]]) if "seed" in options else None
    more = {key: value for key, value in options.items() if key != "seed"}
    values, scales = torch.ops.fos.quantize(x, amax, seed, **more)
    assert torch.equal(q.values, values) and torch.equal(q.scales, scales)
    assert q.amax.shape == () and torch.equal(q.amax, amax)
    rows, cols = (70, 18) if transpose else (18, 70)
    groups = values.shape[-1] * 2 // (32 if options.get("format") == "mxfp4" else 16)
    assert q.scales_2d().dtype == torch.uint8
    np.testing.assert_array_equal(q.scales_2d(), row_major(scales, rows, groups))
    rule = options.get("scale_rule", "mse")
    qs = qs_of(options.get("format", "nvfp4"), rule, options.get("rounding", "nearest"))
    for out in DTYPES:
        want = torch.ops.fos.dequantize(
            values,
            scales,
            amax,
            rows,
            cols,
            format=options.get("format", "nvfp4"),
            qs=qs,
            dtype=out,
        )
        got = q.dequantize(out)
        assert got.dtype == out and got.shape == q.shape
        assert torch.equal(got, want)
        assert torch.equal(fos_compile.dequantize(q, out), got)


@pytest.mark.parametrize(
    "shape",
    [(70,), (1, 1), (3, 18, 66), (2, 3, 5, 70), (0, 64), (5, 0), (2, 0, 64), (2, 1, 0, 3), (0,)],
)
def test_any_shape_is_remembered(shape):
    x = torch.randn(shape).bfloat16()
    q = fos_compile.quantize(x)
    back = q.dequantize(torch.float32)
    assert tuple(q.shape) == shape and back.shape == shape
    rows = x.reshape(-1, shape[-1]) if shape[-1] else x.new_empty(0, 0)
    flat = fos_compile.quantize(rows)
    if x.numel():
        np.testing.assert_array_equal(unpack(q.values).reshape(len(rows), -1), unpack(flat.values))
        assert torch.equal(back.reshape(rows.shape), flat.dequantize(torch.float32))


def test_strided_input():
    base = torch.randn(3, 40, 2, 100).bfloat16()
    for x in (base[:, :, 1], base[0, :, 0].t(), base[1, ::3, 1, 1:80:2]):
        got, want = fos_compile.quantize(x), fos_compile.quantize(x.clone())
        assert torch.equal(got.values, want.values) and torch.equal(got.scales, want.scales)


@pytest.mark.parametrize("amax", [2.5, torch.tensor(2.5)], ids=["float", "tensor"])
def test_static_amax_replaces_the_measured_one(amax):
    x = torch.randn(18, 70)
    q = fos_compile.quantize(x, amax=amax, scale_rule="static_6")
    values, scales = torch.ops.fos.quantize(x, torch.tensor(2.5), scale_rule="static_6")
    assert torch.equal(q.values, values) and torch.equal(q.scales, scales)
    assert q.amax.item() == 2.5


class TestSeed:
    def _values(self, **options):
        x = torch.randn(18, 70, generator=torch.Generator().manual_seed(1))
        return fos_compile.quantize(x, rounding="stochastic", **options).values

    def test_int_and_tensor_agree(self):
        assert torch.equal(self._values(seed=9), self._values(seed=torch.tensor([9])))
        assert not torch.equal(self._values(seed=9), self._values(seed=10))

    def test_none_draws_from_the_default_generator(self):
        torch.manual_seed(4)
        first, second = self._values(), self._values()
        torch.manual_seed(4)
        assert torch.equal(self._values(), first)
        assert not torch.equal(first, second)

    def test_a_given_seed_leaves_the_generator_alone(self):
        state = torch.get_rng_state()
        self._values(seed=3)
        fos_compile.quantize(torch.ones(4, 64))
        assert torch.equal(torch.get_rng_state(), state)

    def test_is_refused_with_nearest(self):
        with pytest.raises(FosError, match="seed"):
            fos_compile.quantize(torch.randn(4, 64), seed=1)

    @pytest.mark.parametrize("seed", [np.int64(9), np.uint8(9), torch.tensor(9)])
    def test_any_integer_serves(self, seed):
        assert torch.equal(self._values(seed=seed), self._values(seed=9))

    @pytest.mark.parametrize(
        "seed",
        [1.5, True, "a", torch.tensor([1.5]), torch.tensor([1, 2]), 2**63, -(2**63) - 1, 10**30],
        ids=str,
    )
    def test_must_be_one_integer_of_64_bits(self, seed):
        with pytest.raises(FosError, match="seed must be"):
            fos_compile.quantize(torch.randn(4, 64), rounding="stochastic", seed=seed)

    def test_extremes_are_integers_of_64_bits(self):
        for seed in (-(2**63), 2**63 - 1):
            assert torch.equal(self._values(seed=seed), self._values(seed=torch.tensor([seed])))


BAD = [
    ({"format": "fp8"}, "format.*nvfp4, mxfp4.*fp8"),
    ({"scale_rule": "max"}, "scale_rule.*mse, mae, abs_max, static_6, static_4.*max"),
    (
        {"rounding": "up"},
        "rounding.*nearest, stochastic, stochastic_realized, stochastic_unbiased, "
        "stochastic_hardware.*up",
    ),
    ({"block": "3d"}, "block.*1d, 2d.*3d"),
    ({"format": "mxfp4"}, "static_6.*static_4.*mse"),
    ({"format": "mxfp4", "scale_rule": "static_6", "block": "2d"}, "block"),
    ({"rht": 1}, "rht must be True or False, got 1"),
    ({"transpose": None}, "transpose must be True or False, got None"),
    ({"amax": -1.0}, "amax must be a number from 0 .*got -1.0"),
    ({"amax": 1e39}, "amax must be a number"),
    ({"amax": 10**400}, "amax must be a number"),
    ({"amax": "2"}, "amax must be a number.*got '2'"),
    ({"amax": 1j}, "amax must be a number"),
    ({"amax": torch.tensor(1j)}, "amax must be one real number, got torch.complex64"),
    ({"amax": torch.ones(2)}, r"amax must be one real number, got torch.float32 \[2\]"),
]


@pytest.mark.parametrize("options,message", BAD)
def test_unknown_options_list_the_valid_ones(options, message):
    with pytest.raises(FosError, match=message):
        fos_compile.quantize(torch.randn(4, 64), **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_other_dtypes_are_refused_by_name(dtype):
    x = torch.ones(4, 64).to(dtype)
    for call in (fos_compile.quantize, lambda x: fos_compile.matmul(x, x)):
        with pytest.raises(FosError, match=f"bfloat16, float16 or float32.*{dtype}"):
            call(x)


def _explicit(a, b, bias, out_dtype):
    return torch.ops.fos.scaled_mm(
        *(a.values, a.scales, a.amax, qs_of("nvfp4", "mse", "nearest")),
        *(b.values, b.scales, b.amax, qs_of("nvfp4", "mse", "nearest")),
        bias,
        m=a.shape[-2],
        n=b.shape[-2],
        k=a.shape[-1],
        out_dtype=out_dtype,
    )


@pytest.mark.parametrize("quantized", ["neither", "a", "b", "both"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_matmul_is_the_operator(out_dtype, with_bias, quantized):
    x, y = torch.randn(17, 70).bfloat16(), torch.randn(33, 70).bfloat16()
    a, b = fos_compile.quantize(x), fos_compile.quantize(y)
    bias = torch.randn(33) if with_bias else None
    left = a if quantized in ("a", "both") else x
    right = b if quantized in ("b", "both") else y
    got = fos_compile.matmul(left, right, bias, out_dtype)
    assert got.dtype == out_dtype
    assert torch.equal(got, _explicit(a, b, bias, out_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_of_tensors_keeps_their_dtype(dtype):
    x, y = torch.randn(17, 70).to(dtype), torch.randn(33, 70).to(dtype)
    assert fos_compile.matmul(x, y).dtype == dtype


def test_matmul_takes_the_options_of_its_operands():
    x, y = torch.randn(17, 70), torch.randn(33, 70)
    for options in (
        {"scale_rule": "static_4"},
        {"scale_rule": "static_6", "rht": True},
        {"rounding": "stochastic_unbiased", "seed": 3},
        {"format": "mxfp4", "scale_rule": "static_6"},
    ):
        a, b = fos_compile.quantize(x, **options), fos_compile.quantize(y, **options)
        rule, rounding = options.get("scale_rule", "mse"), options.get("rounding", "nearest")
        format = options.get("format", "nvfp4")
        qs = qs_of(format, rule, rounding)
        want = torch.ops.fos.scaled_mm(
            *(a.values, a.scales, a.amax, qs, b.values, b.scales, b.amax, qs),
            format=format,
            m=17,
            n=33,
            k=70,
            out_dtype=torch.float32,
        )
        assert torch.equal(fos_compile.matmul(a, b, out_dtype=torch.float32), want)


@pytest.mark.parametrize(
    "options",
    [
        {"scale_rule": "static_4"},
        {"scale_rule": "mae", "rht": True},
        {"format": "mxfp4", "scale_rule": "static_6"},
    ],
    ids=str,
)
def test_a_tensor_is_quantized_like_the_other_operand(options):
    x, y = torch.randn(17, 70), torch.randn(33, 70)
    a, b = fos_compile.quantize(x, **options), fos_compile.quantize(y, **options)
    want = fos_compile.matmul(a, b)
    assert torch.equal(fos_compile.matmul(a, y), want)
    assert torch.equal(fos_compile.matmul(x, b), want)
    assert not torch.equal(fos_compile.matmul(x, y), want)


def test_matmul_broadcasts_leading_dimensions_of_a():
    x, y = torch.randn(2, 3, 70), torch.randn(33, 70)
    want = fos_compile.matmul(x.view(6, 70), y)
    assert torch.equal(fos_compile.matmul(x, y), want.view(2, 3, 33))


def test_matmul_refuses_operands_that_do_not_fit():
    x = fos_compile.quantize(torch.randn(17, 70))
    with pytest.raises(FosError, match=r"70.*71|71.*70"):
        fos_compile.matmul(x, torch.randn(33, 71))
    mx = fos_compile.quantize(torch.randn(33, 70), format="mxfp4", scale_rule="static_6")
    with pytest.raises(FosError, match="format must be the same"):
        fos_compile.matmul(x, mx)
    rotated = fos_compile.quantize(torch.randn(33, 70), rht=True)
    with pytest.raises(FosError, match="rht must be the same"):
        fos_compile.matmul(x, rotated)
    with pytest.raises(FosError, match="b must be a matrix"):
        fos_compile.matmul(x, torch.randn(2, 33, 70))


@pytest.mark.parametrize(
    "bias, message",
    [
        (torch.randn(34), r"bias must be \[33\].*got \[34\]"),
        (torch.randn(1), r"bias must be \[33\].*got \[1\]"),
        (torch.randn(17, 33), r"bias must be \[33\].*got \[17, 33\]"),
        (torch.arange(33), "bias must be a floating-point tensor, got torch.int64"),
        (torch.ones(33) + 1j, "bias must be a floating-point tensor, got torch.complex64"),
        (1.0, "bias must be a floating-point tensor, got float"),
        (torch.randn(33, device="meta"), "bias must be on cpu, got meta"),
    ],
)
def test_matmul_refuses_a_bias_that_does_not_fit(bias, message):
    with pytest.raises(FosError, match=message):
        fos_compile.matmul(torch.randn(17, 70), torch.randn(33, 70), bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, "bf16", float])
def test_other_output_dtypes_are_refused(dtype):
    x = torch.randn(17, 64)
    with pytest.raises(FosError, match=r"matmul: out_dtype must be bfloat16.*got"):
        fos_compile.matmul(x, x, out_dtype=dtype)
    with pytest.raises(FosError, match=r"dequantize: dtype must be bfloat16.*got"):
        fos_compile.quantize(x).dequantize(dtype)


def test_what_is_no_tensor_is_named():
    x = torch.randn(17, 70)
    with pytest.raises(FosError, match="matmul: b must be a tensor or a QuantizedTensor, got None"):
        fos_compile.matmul(x, None)
    with pytest.raises(FosError, match="matmul: a must be a tensor or a QuantizedTensor, got list"):
        fos_compile.matmul([1.0], fos_compile.quantize(x))
    with pytest.raises(FosError, match="dequantize: q must be a QuantizedTensor, got Tensor"):
        fos_compile.dequantize(x)
    with pytest.raises(FosError, match="a and b must be on one device, got cpu and meta"):
        fos_compile.matmul(x, x.to("meta"))


@pytest.mark.parametrize("compile", [lambda f: f, torch.compile(backend="aot_eager")])
def test_nothing_has_a_gradient(compile):
    x, bias = torch.randn(17, 70, requires_grad=True), torch.randn(17, requires_grad=True)
    for function in (
        lambda: fos_compile.matmul(x, x, bias),
        lambda: fos_compile.quantize(x).dequantize(),
    ):
        assert not compile(function)().requires_grad


def test_quantized_tensors_compare_by_identity():
    x = torch.randn(17, 70)
    q, same = fos_compile.quantize(x), fos_compile.quantize(x)
    assert q == q and q != same and q in [same, q] and len({q, same}) == 2


def test_to_another_device():
    q = fos_compile.quantize(torch.randn(17, 70), rht=True)
    assert q.device == torch.device("cpu")
    moved = q.to("meta")
    assert moved.device.type == moved.scales.device.type == moved.amax.device.type == "meta"
    assert moved.rht and moved.shape == q.shape and torch.equal(q.to("cpu").values, q.values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{}, {"amax": 4.0}, {"rht": True}], ids=str)
def test_non_finite_input_never_gives_finite_output(options, bad):
    x, y = torch.randn(17, 70), torch.randn(33, 70)
    x[4, 9] = bad
    q = fos_compile.quantize(x, **options)
    other = fos_compile.quantize(y, rht=options.get("rht", False))
    assert not torch.isfinite(q.dequantize(torch.float32)[4, 9])
    assert not torch.isfinite(fos_compile.matmul(q, other)[4]).any()
    if "amax" not in options:
        assert not torch.isfinite(q.dequantize(torch.float32)).any()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_fullgraph_compile(backend):
    def run(x, w, bias):
        q = fos_compile.quantize(x, rounding="stochastic", seed=7)
        out = fos_compile.matmul(q, w, bias)
        return out, q.dequantize(torch.float32), fos_compile.quantize(x, block="2d").scales

    args = torch.randn(17, 70), torch.randn(33, 70), torch.randn(33)
    got = torch.compile(run, fullgraph=True, backend=backend)(*args)
    for a, b in zip(got, run(*args), strict=True):
        assert torch.equal(a, b)


def test_error_of_the_quantizer_is_the_spacing_of_the_grid():
    """Each value moves at most half a step of its block, twice a step where it is clipped."""
    x = torch.randn(64, 128)
    q = fos_compile.quantize(x, scale_rule="static_6")
    scale = torch.from_numpy(np.array([*oracle.E4M3, np.nan]))[q.scales_2d().long()]
    unit = (scale * q.amax.item() / 2688).repeat_interleave(16, -1)
    step = torch.where(x.abs() < 2 * unit, 0.5, torch.where(x.abs() < 4 * unit, 1.0, 2.0)) * unit
    error = (q.dequantize(torch.float32).double() - x).abs()
    # Rounding the scale down by up to 1/17 clips 6 * 17/16 to 6, which is less than half a step.
    assert (error <= step / 2 * (1 + 2.0**-20)).all()
