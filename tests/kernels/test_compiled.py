"""Compiling the references with Inductor changes no bit and does not depend on sizes."""

from __future__ import annotations

import pytest
import torch
from models import needs_exact_inductor
from torch._dynamo.utils import counters
from torch._guards import TracingContext

from fos_compile.kernels.formats import qs_of
from fos_compile.kernels.op import REGISTRY

# What the bits need beside the order of operations that the references spell out.
EXACT = {"emulate_precision_casts": True}

slow = pytest.mark.slow
"""A cold compile of dice or of 256-element sums takes 10 to 20 s of CPU time."""

# The first three reach every rule family, rounding family and block mode; all options occur.
COVER = [
    pytest.param("bfloat16", (18, 70), {}, id="default"),
    pytest.param(
        "float16",
        (18, 70),
        {"scale_rule": "static_6", "rounding": "stochastic", "transpose": True},
        id="static_6-stochastic-transpose",
    ),
    pytest.param(
        "bfloat16",
        (21, 40),
        {"scale_rule": "static_4", "block": "2d", "rht": True, "transpose": True},
        id="static_4-2d-rht-transpose",
    ),
    pytest.param(
        "bfloat16",
        (3, 18, 70),
        {"scale_rule": "mae", "rounding": "stochastic", "transpose": True},
        id="mae-stochastic-batch",
        marks=slow,
    ),
    pytest.param(
        "float32",
        (33, 64),
        {"scale_rule": "abs_max", "rounding": "stochastic_realized", "rht": True},
        id="abs_max-realized-rht",
        marks=slow,
    ),
    pytest.param(
        "float16",
        (40, 70),
        {"rounding": "stochastic_unbiased", "block": "2d", "stream": 5},
        id="mse-unbiased-2d",
        marks=slow,
    ),
    pytest.param("bfloat16", (33, 70), {"block": "2d"}, id="mse-2d", marks=slow),
    pytest.param(
        "float32",
        (18, 130),
        {"format": "mxfp4", "scale_rule": "static_6", "rounding": "stochastic"},
        id="mxfp4-stochastic",
        marks=slow,
    ),
    pytest.param(
        "bfloat16",
        (18, 70),
        {"scale_rule": "static_6", "rounding": "stochastic_hardware", "transpose": True},
        id="static_6-hardware-transpose",
        marks=slow,
    ),
]


def _compile(function, dynamic=None):
    return torch.compile(function, fullgraph=True, dynamic=dynamic, options=EXACT)


def _data(shape, dtype, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x *= 2.0 ** torch.linspace(-9, 4, shape[-2])[:, None]
    x[..., 5, 16:40] = 0
    return x.to(getattr(torch, dtype))


def _assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        assert torch.equal(a, b)


@needs_exact_inductor
@pytest.mark.parametrize("dtype,shape,more", COVER)
def test_quantize_is_the_eager_quantizer(dtype, shape, more):
    """Behind a producer that rounds to x's dtype, as the pass inlines it; the maximum included."""
    quantize, amax_of = REGISTRY["quantize"].reference, REGISTRY["amax"].reference
    rht, transpose = more.get("rht", False), more.get("transpose", False)

    def fused(a, b, seed):
        x = a * b
        amax = amax_of(x, rht, transpose)
        return amax, *quantize(x, amax, seed, **more)

    a, b, seed = _data(shape, dtype), _data(shape, dtype, 1), torch.tensor([-77])
    amax = torch.ops.fos.amax(a * b, rht, transpose)
    want = amax, *torch.ops.fos.quantize(a * b, amax, seed, **more)
    _assert_same(_compile(fused)(a, b, seed), want)
    assert want[1].any() and want[2].any()


@slow
def test_special_values_survive_compilation():
    quantize = _compile(REGISTRY["quantize"].reference)
    x = torch.randn(20, 64)
    x[0], x[1], x[2, 3], x[3, 20] = 0, -0.0, float("nan"), float("inf")
    x[4] *= 1e-20
    for amax in (4.0, 0.0, 2.0**-117, float("inf"), float("nan"), 3e38, 2.0**-116):
        got = quantize(x, torch.tensor(amax))
        _assert_same(got, torch.ops.fos.quantize(x, torch.tensor(amax)))


@slow
def test_quantize_pair_is_the_eager_operator():
    op = REGISTRY["quantize_pair"]
    x, seed = _data((34, 70), "bfloat16"), torch.tensor([3])
    options = {"rounding_col": "stochastic", "rht_col": True, "stream": 6}
    args = x, torch.ops.fos.amax(x), torch.ops.fos.amax(x, True, True), seed

    def run(*tensors):
        return op.reference(*tensors, **options)

    _assert_same(_compile(run)(*args), torch.ops.fos.quantize_pair(*args, **options))


def test_dequantize_is_the_eager_operator():
    x = _data((18, 70), "bfloat16")
    amax = torch.ops.fos.amax(x)
    buffers = torch.ops.fos.quantize(x, amax)

    def run(values, scales, amax, dequantize):
        wide = dequantize(values, scales, amax, 18, 70, qs=1536.0, dtype=torch.float32)
        return wide, dequantize(values, scales, None, 18, 70, dtype=torch.bfloat16)

    want = run(*buffers, amax, torch.ops.fos.dequantize)
    reference = REGISTRY["dequantize"].reference
    got = _compile(lambda *tensors: run(*tensors, reference))(*buffers, amax)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_scaled_mm_is_the_eager_operator():
    x, y = _data((18, 70), "bfloat16"), _data((34, 70), "bfloat16", 1)
    operands = []
    for t in (x, y):
        amax = torch.ops.fos.amax(t)
        operands.append((*torch.ops.fos.quantize(t, amax), amax))
    bias, qs = torch.randn(34), qs_of("nvfp4", "mse", "nearest")
    sizes = {"m": 18, "n": 34, "k": 70, "out_dtype": torch.bfloat16}

    def run(a, b, bias, multiply):
        return multiply(*a, qs, *b, qs, bias, **sizes)

    want = run(*operands, bias, torch.ops.fos.scaled_mm)
    reference = REGISTRY["scaled_mm"].reference
    got = _compile(lambda *t: run(*t, reference))(*operands, bias)
    # The sum is the same mm; factor, bias and rounding must not fuse into another order.
    assert torch.equal(got, want)


SIZES = [(33, 70), (40, 71), (130, 64), (200, 300), (257, 129), (128, 128)]
"""Below, at and above the row tile of 128 and the column multiples of 64."""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=slow)])
def test_sizes_marked_dynamic_compile_once(backend):
    options = EXACT if backend == "inductor" else None
    quantize = torch.compile(
        REGISTRY["quantize"].reference, fullgraph=True, backend=backend, options=options
    )
    before = counters["stats"]["unique_graphs"]
    for rows, cols in SIZES:
        x = _data((rows, cols), "bfloat16")
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        amax = torch.ops.fos.amax(x)
        _assert_same(quantize(x, amax), torch.ops.fos.quantize(x, amax))
    assert counters["stats"]["unique_graphs"] - before == 1


def test_checks_of_the_references_guard_on_no_symbolic_size():
    """Traced by Dynamo itself, which shows a symbolic size as an int."""

    def both(values, scales, amax):
        rows = values.shape[0]
        back = REGISTRY["dequantize"].reference(values, scales, amax, rows, 70, dtype=torch.half)
        sizes = {"m": rows, "n": rows, "k": 70, "out_dtype": torch.half}
        operand = values, scales, amax, 1536.0
        return back, REGISTRY["scaled_mm"].reference(*operand, *operand, **sizes)

    guards = []

    def backend(gm, inputs):
        guards.extend(TracingContext.get().fake_mode.shape_env.guards)
        return gm.forward

    x = _data((33, 70), "bfloat16")
    amax = torch.ops.fos.amax(x)
    buffers = torch.ops.fos.quantize(x, amax)
    for buffer in buffers:
        torch._dynamo.mark_dynamic(buffer, 0)
    torch.compile(both, fullgraph=True, backend=backend)(*buffers, amax)
    assert not guards


def test_operators_stay_in_one_dynamic_graph():
    """The opaque operators, their fakes and the logical sizes, without Inductor."""

    def linear(x, w, seed):
        a, b = torch.ops.fos.amax(x), torch.ops.fos.amax(w)
        left = torch.ops.fos.quantize(x, a, seed, rounding="stochastic")
        pair = torch.ops.fos.quantize_pair(w, b, b, block="2d")
        m, k = x.shape
        sizes = {"m": m, "n": w.shape[0], "k": k, "out_dtype": x.dtype}
        out = torch.ops.fos.scaled_mm(*left, a, 1536.0, *pair[:2], b, 1536.0, **sizes)
        back = torch.ops.fos.dequantize(*left, a, m, k, qs=1536.0, dtype=x.dtype)
        return out, back

    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    before = counters["stats"]["unique_graphs"]
    w = _data((24, 70), "bfloat16")
    for rows in (9, 17, 131, 256):
        x, seed = _data((rows, 70), "bfloat16"), torch.tensor([rows])
        torch._dynamo.mark_dynamic(x, 0)
        _assert_same(compiled(x, w, seed), linear(x, w, seed))
    assert counters["stats"]["unique_graphs"] - before == 1
