"""Which kernel a call gets, eagerly and in a graph, and that both agree: for every option."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

import stand_ins
from cute_cases import LAYOUTS, OPTIONS, combinations, matrix, served, valid
from fos_compile.kernels import AMAX, DEQUANTIZE, QUANTIZE, QUANTIZE_PAIR, cuda, formats, target
from fos_compile.kernels.cute import host_oriented, launch
from fos_compile.kernels.errors import InvalidArgument, UnsupportedArgument
from fos_compile.kernels.op import Status
from fos_compile.passes.lower import lower
from fos_compile.passes.operators import runs_as
from fos_compile.passes.recipe import PassConfig
from fos_compile.recipes import INFERENCE

SEED = torch.tensor([-(2**40) + 3])
AMAX_ = torch.tensor(3.0)
VIEWS = list(itertools.product(LAYOUTS, formats.DTYPES))
HOPPER, BLACKWELL = "sm_90a", "sm_100a"
on_blackwell = pytest.mark.parametrize("kernels", [BLACKWELL], indirect=True)
on_both = pytest.mark.parametrize("kernels", [HOPPER, BLACKWELL], indirect=True)


@pytest.fixture(autouse=True)
def kernels(monkeypatch, request):
    return stand_ins.install(monkeypatch, getattr(request, "param", HOPPER))


def same(actual, expected):
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(actual, expected, strict=True)
    )


def given(layout, dtype, transpose):
    """A matrix that has this layout once it is transposed, if it is."""
    x = matrix(layout, dtype)
    return x.mT if transpose else x


# Every option with some layout and dtype; every layout and dtype with some option: 45 against 232.
CASES = list(zip(valid(), itertools.cycle(VIEWS)))


@on_blackwell
@pytest.mark.parametrize("part", range(8))
def test_every_option_is_served(kernels, part):
    for options, (layout, dtype) in CASES[part::8]:
        x = given(layout, dtype, options["transpose"])
        assert launch.reason("quantize", x, options) == ""
        before = len(kernels.launched)
        actual = cuda.cuda_quantize(x, AMAX_, SEED, **options, stream=5)
        assert same(actual, QUANTIZE.reference(x, AMAX_, SEED, **options, stream=5)), options
        assert len(kernels.launched) == before + 1
    keys = [key for key in kernels.compiled if "transpose" in dict(key.options)]
    assert not keys


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", formats.DTYPES, ids=str)
def test_every_layout_is_served_by_the_kernel_for_it(kernels, layout, dtype):
    x = matrix(layout, dtype)
    for transpose in (False, True):
        seen = x.mT if transpose else x
        actual = cuda.cuda_quantize(x, AMAX_, scale_rule="mae", transpose=transpose)
        assert same(actual, QUANTIZE.reference(x, AMAX_, scale_rule="mae", transpose=transpose))
        options = dict(kernels.launched[-1].options)
        aligned = seen.stride(-1) == 1 and not any(
            size % (16 // x.element_size()) for size in (seen.shape[-1], *seen.stride()[:-1])
        )
        assert options["vector"] is aligned
        by_column = seen.stride(-2) == 1 and seen.stride(-1) != 1
        assert options["by_column"] is (by_column and not aligned)


@on_both
def test_supports_agrees_with_every_call(kernels):
    """Without running any: what the plan says about the full product."""
    able = served(kernels.arch)
    for options in combinations():
        for layout, dtype in VIEWS:
            reason = launch.reason("quantize", matrix(layout, dtype), options)
            assert (reason == "") is (options in able)
            assert not reason or any(
                name in reason and str(options[name]) in reason for name in OPTIONS
            )


@pytest.mark.parametrize("rule", ["mse", "static_6"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_fast_kernel_reads_any_matrix(kernels, rule, layout):
    x = matrix(layout, torch.bfloat16)
    actual = cuda.cuda_quantize(x, AMAX_, scale_rule=rule)
    assert same(actual, QUANTIZE.reference(x, AMAX_, scale_rule=rule))
    (key,) = kernels.launched
    columns = host_oriented.columns(x) == ""
    rows = dict(key.options)["vector"] and not dict(key.options)["by_column"]
    assert key.name == ("quantize_staged" if columns and not rows else "quantize_filtered")
    assert key.dtype == "bfloat16" and dict(key.options)["scale_rule"] == rule


def test_sizes_and_dice_share_a_kernel(kernels):
    for i, (rows, cols) in enumerate([(20, 72), (300, 64), (1, 200), (129, 8)]):
        x = matrix("rows", torch.float16)[:1, :8].expand(rows, 8).repeat(1, cols // 8)
        options = {"rounding": "stochastic", "stream": i}
        actual = cuda.cuda_quantize(x, AMAX_ + i, SEED + i, **options)
        assert same(actual, QUANTIZE.reference(x, AMAX_ + i, SEED + i, **options))
    transposed = x.mT.contiguous()
    cuda.cuda_quantize(transposed, AMAX_, SEED, rounding="stochastic", transpose=True)
    assert len(kernels.launched) == 5 and len(set(kernels.launched)) == 2
    assert len(kernels.compiled) == 2, "a transposed copy is another layout, no other option"


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_amax_may_have_dimensions(kernels, shape):
    cuda.cuda_quantize(matrix("rows", torch.bfloat16), torch.full(shape, 4.0))
    assert len(kernels.launched) == 1


def test_nearest_ignores_a_seed_that_no_kernel_could_read(kernels):
    x = matrix("rows", torch.float32)
    actual = cuda.cuda_quantize(x, AMAX_, torch.ones(2, device="meta"), rounding="nearest")
    assert same(actual, QUANTIZE.reference(x, AMAX_)) and len(kernels.launched) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transpose", [False, True])
def test_amax_after_the_transform(kernels, layout, transpose):
    for dtype in formats.DTYPES:
        x = given(layout, dtype, transpose)
        assert AMAX.supports(x, True, transpose)
        assert torch.equal(cuda.cuda_amax(x, True, transpose), AMAX.reference(x, True, transpose))
    assert kernels.names() == ["amax_rotated"] * 3


def test_amax_without_the_transform_is_left_to_inductor(kernels):
    x = matrix("rows", torch.bfloat16)
    assert torch.equal(cuda.cuda_amax(x), AMAX.reference(x))
    assert launch.reason("amax", x, {}) == "rht must be True, got False"
    assert not kernels.launched


@pytest.mark.parametrize("layout", ["rows", "mT", "batch", "batch mT"])
@pytest.mark.parametrize("format", formats.FORMATS)
def test_other_pairs_are_two_launches(kernels, layout, format):
    x = matrix(layout, torch.bfloat16)
    options = {"format": format, "scale_rule": "static_4", "rounding_col": "stochastic"}
    arguments = (x, AMAX_, AMAX_ * 2, SEED)
    assert QUANTIZE_PAIR.supports(*arguments, **options, rht_col=True)
    actual = cuda.cuda_quantize_pair(*arguments, **options, rht_col=True, stream=8)
    assert same(actual, QUANTIZE_PAIR.reference(*arguments, **options, rht_col=True, stream=8))
    assert len(kernels.launched) == 2


def buffers(format, batch=()):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, (*batch, 18, 64), dtype=torch.uint8, generator=generator)
    count = formats.scale_count(18, 128, format)
    most = 120 if format == "nvfp4" else 140
    scales = torch.randint(most, (*batch, count), dtype=torch.uint8, generator=generator)
    return values, scales


@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("dtype", formats.DTYPES, ids=str)
@pytest.mark.parametrize("amax", [None, AMAX_], ids=["unscaled", "scaled"])
def test_every_dequantization_is_served(kernels, format, dtype, amax):
    options = {"format": format, "qs": 1536.0, "dtype": dtype}
    for batch, cols in (((), 128), ((), 101), ((2,), 70)):
        arguments = (*buffers(format, batch), amax, 18, cols)
        assert DEQUANTIZE.supports(*arguments, **options)
        actual = cuda.cuda_dequantize(*arguments, **options)
        assert torch.equal(actual, DEQUANTIZE.reference(*arguments, **options))
    assert kernels.names() == ["dequantize_blocks"] * 3 and len(kernels.compiled) == 1


def test_dequantize_reads_no_strided_scales(kernels):
    values, scales = buffers("nvfp4")
    strided = torch.stack([scales, scales], -1)[:, 0]
    options = {"dtype": torch.float32}
    actual = cuda.cuda_dequantize(values, strided, None, 18, 128, **options)
    assert torch.equal(actual, DEQUANTIZE.reference(values, scales, None, 18, 128, **options))
    assert not kernels.launched


@pytest.mark.parametrize("change", [{"rows": 17}, {"cols": 129}, {"format": "fp4"}, {"dtype": int}])
def test_wrong_dequantizations_are_named(kernels, change):
    values, scales = buffers("nvfp4")
    given = {"rows": 18, "cols": 128, "format": "nvfp4", "dtype": torch.float32} | change
    with pytest.raises((InvalidArgument, UnsupportedArgument), match=f"{next(iter(change))} must"):
        cuda.cuda_dequantize(values, scales, None, **given)
    assert not kernels.launched


WRONG = {
    "x must be bfloat16": (UnsupportedArgument, lambda x: (x.double(), torch.ones(()))),
    "x must be [R, C]": (InvalidArgument, lambda x: (x[0], torch.ones(()))),
    "amax must be torch.float32 with one element, got torch.float64": (
        InvalidArgument,
        lambda x: (x, torch.ones((), dtype=torch.float64)),
    ),
    "amax must be torch.float32 with one element, got torch.float32 [2]": (
        InvalidArgument,
        lambda x: (x, torch.ones(2)),
    ),
    "amax must be on cpu as x is, got meta; pass amax.to(x.device)": (
        InvalidArgument,
        lambda x: (x, torch.ones((), device="meta")),
    ),
}


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named_before_any_launch(kernels, message, transpose):
    error, arguments = WRONG[message]
    with pytest.raises(error) as caught:
        cuda.cuda_quantize(*arguments(matrix("rows", torch.bfloat16)), transpose=transpose)
    assert message in str(caught.value)
    assert not kernels.launched


@pytest.mark.parametrize(
    "options,seed,message",
    [
        ({"scale_rule": "best"}, None, "scale_rule must be one of"),
        ({"format": "int4"}, None, "format must be one of"),
        ({"rounding": "stochastic"}, None, "seed must be an int64 tensor"),
        ({"rounding": "stochastic"}, torch.ones(1), "seed must be torch.int64"),
        (
            {"rounding": "stochastic"},
            torch.ones(2, dtype=torch.int64),
            "seed must be torch.int64 with one element",
        ),
        (
            {"rounding": "stochastic"},
            torch.ones(1, dtype=torch.int64, device="meta"),
            "seed must be on cpu",
        ),
        ({"format": "mxfp4"}, None, "scale_rule must be static_6 or static_4"),
        ({"format": "mxfp4", "scale_rule": "static_6", "block": "2d"}, None, "block must be 1d"),
        (
            {"format": "mxfp4", "scale_rule": "static_4", "rounding": "stochastic_unbiased"},
            SEED,
            "rounding must be nearest or stochastic",
        ),
    ],
)
def test_wrong_options_are_named(kernels, options, seed, message):
    with pytest.raises((InvalidArgument, UnsupportedArgument), match=message):
        cuda.cuda_quantize(matrix("rows", torch.bfloat16), torch.ones(()), seed, **options)
    assert not kernels.launched


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 128, 64), (2, 0, 16), (2, 5, 0)])
def test_empty_matrices_return_at_once(kernels, shape):
    for dtype, transpose, rule in itertools.product(formats.DTYPES, (False, True), ("mse", "mae")):
        x, amax = torch.empty(shape, dtype=dtype), torch.zeros(())
        options = {"scale_rule": rule, "transpose": transpose}
        assert same(cuda.cuda_quantize(x, amax, **options), QUANTIZE.reference(x, amax, **options))
        assert cuda.cuda_amax(x, True, transpose) == 0
    values, scales = buffers("nvfp4")
    out = cuda.cuda_dequantize(values, scales, None, 18, 0, dtype=torch.float32)
    assert out.shape == (18, 0)
    assert not kernels.launched


def test_more_batches_than_a_grid_holds_go_to_the_reference(kernels):
    x = matrix("rows", torch.bfloat16)[:1, :16].expand(65536, 1, 16)
    assert "at most 65535 batches" in launch.reason("quantize", x, {"scale_rule": "mae"})
    values, _ = cuda.cuda_quantize(x, AMAX_, scale_rule="static_4")
    assert values.shape == (65536, 1, 32) and not kernels.launched


def test_a_kernel_that_does_not_compile_is_reported_once(kernels, monkeypatch):
    """And the next one serves; the last one's reason is what `supports` says."""
    x, good = matrix("rows", torch.bfloat16), kernels.get
    expected = QUANTIZE.reference(x, AMAX_)
    broken = {"quantize_filtered"}
    monkeypatch.setattr(kernels, "get", lambda k, a: 1 / (k.name not in broken) and good(k, a))
    with pytest.warns(UserWarning, match="quantize_filtered does not compile: ZeroDivisionError"):
        assert same(cuda.cuda_quantize(x, AMAX_), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(cuda.cuda_quantize(x, AMAX_), expected)
    assert kernels.names() == ["quantize_blocks"] * 2
    assert launch.reason("quantize", x, {}) == ""


def test_no_kernel_that_compiles_leaves_the_reference(kernels, monkeypatch):
    x = matrix("rows", torch.bfloat16)
    monkeypatch.setattr(kernels, "get", lambda key, arch: 1 / 0)
    with pytest.warns(UserWarning) as caught:
        assert same(cuda.cuda_quantize(x, AMAX_), QUANTIZE.reference(x, AMAX_))
    assert len(caught) == 4, "the fast kernel and the general one with and without vectors"
    assert "quantize_blocks does not compile" in launch.reason("quantize", x, {})
    assert not kernels.launched


def test_no_device_no_plan(monkeypatch, kernels):
    monkeypatch.setattr(target, "status", lambda device: Status("not today"))
    x = matrix("rows", torch.bfloat16)
    for op, options in (("quantize", {}), ("amax", {"rht": True}), ("dequantize", {})):
        assert launch.reason(op, x, options) == "not today"
    cuda.cuda_quantize(x, torch.ones(()))
    cuda.cuda_amax(x, True)
    assert not kernels.launched


def graph_of(x, amax, **options):
    graph = fx.Graph()
    nodes = []
    for name, fake in (("x", x), ("amax", amax)):
        nodes.append(graph.placeholder(name))
        nodes[-1].meta["val"] = fake
    call = graph.call_function(torch.ops.fos.quantize.default, tuple(nodes), options)
    call.meta["val"] = torch.ops.fos.quantize(x, amax, **options)
    graph.output(call)
    return graph, call


@pytest.mark.parametrize("able,way", [(True, "kernel"), (False, "decomposition")])
def test_the_lowering_pass_keeps_what_a_kernel_serves(monkeypatch, able, way):
    if not able:
        monkeypatch.setattr(target, "status", lambda device: Status("not today"))
    with FakeTensorMode():
        x = torch.empty(64, 128, dtype=torch.bfloat16, device="cuda")
        graph, call = graph_of(x, torch.empty((), device="cuda"), scale_rule="mae")
        assert runs_as(QUANTIZE, call) == way
        lower(graph, PassConfig(recipe=INFERENCE))
    assert call.target.namespace == ("fos" if way == "kernel" else "fos_outlined")


@on_both
def test_supports_of_fake_calls(kernels):
    with FakeTensorMode():
        x = torch.empty(64, 128, dtype=torch.bfloat16, device="cuda")
        amax = torch.empty((), device="cuda")
        seed = torch.empty(1, dtype=torch.int64, device="cuda")
        for options in valid():
            able = options in served(kernels.arch)
            assert bool(QUANTIZE.supports(x, amax, seed, **options)) is able
        assert QUANTIZE.supports(x.mT, amax, stream=3)
        assert AMAX.supports(x, True)
        status = AMAX.supports(x)
        assert status.reason == "amax: rht must be True, got False; the decomposition serves"
        values, scales = torch.ops.fos.quantize(x, amax)
        assert DEQUANTIZE.supports(values, scales, amax, 64, 128, dtype=torch.float32)
        assert not QUANTIZE.supports(x.double(), amax)
        with pytest.raises(InvalidArgument, match="amax must be on cuda:0"):
            torch.ops.fos.quantize(x, torch.empty(()))


def test_hopper_leaves_the_rounding_of_the_hardware_to_the_reference(kernels):
    x, rounding = matrix("rows", torch.bfloat16), "stochastic_hardware"
    lacking = "cvt.rs, which exists on sm_100a and sm_103a only, got sm_90a"
    assert lacking in launch.reason("quantize", x, {"rounding": rounding})
    assert lacking in launch.reason("quantize_pair", x, {"rounding_col": rounding})
    actual = cuda.cuda_quantize(x, AMAX_, SEED, rounding=rounding)
    assert same(actual, QUANTIZE.reference(x, AMAX_, SEED, rounding=rounding))
    assert not kernels.launched
    pair = cuda.cuda_quantize_pair(x, AMAX_, AMAX_, SEED, rounding_col=rounding)
    wanted = QUANTIZE_PAIR.reference(x, AMAX_, AMAX_, SEED, rounding_col=rounding)
    assert same(pair, wanted) and kernels.names() == ["quantize_filtered"]


@on_blackwell
def test_pairs_with_the_rounding_of_the_hardware_are_two_kernels(kernels):
    x, options = matrix("rows", torch.bfloat16), {"rounding_col": "stochastic_hardware"}
    pair = cuda.cuda_quantize_pair(x, AMAX_, AMAX_, SEED, **options)
    assert same(pair, QUANTIZE_PAIR.reference(x, AMAX_, AMAX_, SEED, **options))
    assert kernels.names() == ["quantize_filtered", "quantize_blocks"]


@pytest.mark.parametrize("name", ["amax", "quantize", "quantize_pair", "dequantize"])
def test_registered_for_cuda(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fos::{name}", "CUDA")
