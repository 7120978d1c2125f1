"""Bits of the compiled kernels on a GPU; elsewhere the same tests run on stand-ins of them.

What only a GPU can show, streams, graphs, devices, is skipped elsewhere.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import stand_ins
from cute_cases import LAYOUTS, SPECIAL, covering, matrix, read_of, served
from fos_compile.kernels import (
    AMAX,
    DEQUANTIZE,
    QUANTIZE,
    QUANTIZE_PAIR,
    SCALED_MM,
    cuda,
    formats,
    target,
)
from fos_compile.kernels.cute import tables

CUDA = torch.device("cuda", 0)
GPU = bool(target.status(CUDA))
DEVICE = CUDA if GPU else torch.device("cpu")
ARCH = target.arch(CUDA) if GPU else "sm_100a"
needs_gpu = pytest.mark.skipif(not GPU, reason=f"needs a GPU: {target.status(CUDA)}")
OPS = {
    op: getattr(torch.ops.fos, op) if GPU else getattr(cuda, f"cuda_{op}")
    for op in ("amax", "quantize", "quantize_pair", "dequantize", "scaled_mm")
}
MAX_KERNELS = 60
"""That this module compiles by default, at about a second each."""
READS = ("vector", "by_column", "anything")
SEEDS = (7, -1, -(2**63) + 12345, 2**40 + 3)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The stand-ins, where they are in place of compiled kernels."""
    return None if GPU else stand_ins.install(monkeypatch, ARCH)


def equal(a, b):
    """Bit for bit, except that one NaN is as good as another."""
    assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous()
    a, b = a.cpu(), b.cpu()
    if not a.is_floating_point():
        return torch.equal(a, b)
    nan = a.isnan()
    a, same = a.masked_fill(nan, 1.0), torch.equal(nan, b.isnan())
    b = b.masked_fill(nan, 1.0)
    return same and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


@torch.no_grad()
def check(op, reference, *arguments, **options):
    """A call between guards, against the reference on the CPU: nothing of the device is trusted."""
    assert op.supports(*arguments, **options) or not GPU, op.supports(*arguments, **options)
    with stand_ins.guarded() as zones:
        actual = OPS[op.name](*arguments, **options)
        assert zones.buffers, "no kernel ran"
    there = [a.cpu() if isinstance(a, torch.Tensor) else a for a in arguments]
    expected = reference(*there, **options)
    actual, expected = (r if isinstance(r, tuple) else (r,) for r in (actual, expected))
    assert all(equal(a, b) for a, b in zip(actual, expected, strict=True)), options


def check_quantize(x, amax=None, seed=7, **options):
    if amax is None:
        amax = AMAX.reference(x.cpu(), options.get("rht", False), options.get("transpose", False))
    amax = torch.as_tensor(amax, dtype=torch.float32).to(x.device)
    seed = torch.tensor([0, seed], device=x.device)[1:]
    check(QUANTIZE, QUANTIZE.reference, x, amax, seed, **options)


def cases():
    """Options, dtype and read of every kernel."""
    for options, dtype, read in itertools.product(served(ARCH), formats.DTYPES, READS):
        if not options["transpose"]:
            yield {**options, "dtype": dtype, "read": read}


def label(case):
    return "-".join(str(value).removeprefix("torch.") for value in case.values())


SAMPLE = covering(list(cases()), lambda case: case.items(), 2)


def layouts(read, dtype, transpose):
    """Names of the layouts that are read this way; a whole matrix before a view."""
    for name in LAYOUTS:
        x = matrix(name, dtype)
        if read_of(x.mT if transpose else x) == read:
            yield name


def check_case(case):
    """Every layout that the kernel reads, and all special numbers in the first of them."""
    options = dict(case)
    dtype, read = options.pop("dtype"), options.pop("read")
    seeds = itertools.cycle(SEEDS)
    found = [
        (name, transpose) for transpose in (False, True) for name in layouts(read, dtype, transpose)
    ]
    for stream, (name, transpose) in enumerate(found):
        options["transpose"] = transpose
        x = matrix(name, dtype, DEVICE)
        check_quantize(x, seed=next(seeds), stream=stream + 2**31, **options)
    name, options["transpose"] = found[0]
    for special, (_, amax) in SPECIAL.items():
        x = matrix(name, dtype, DEVICE, special)
        check_quantize(x, amax, seed=next(seeds), **options)


@pytest.mark.parametrize("case", SAMPLE, ids=label)
def test_bits_of_quantize(case):
    check_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(cases()), ids=label)
def test_bits_of_every_option(case):
    check_case(case)


def test_the_sample_stays_small():
    """By its keys: those of the covering sample and of what runs everywhere."""
    keys = set()
    for case in SAMPLE:
        options = tuple(case[name] if name in case else False for name in tables.NAMES["quantize"])
        for transpose in (False, True):
            for name in layouts(case["read"], case["dtype"], transpose):
                x = matrix(name, case["dtype"])
                entry = next(
                    entry
                    for entry in tables.TABLES["quantize"]
                    if not entry.refuses(tables.NAMES["quantize"], case["dtype"], options)
                    and not entry.layout(x.mT if transpose else x)
                )
                keys.add(entry.key(case["dtype"], options))
    assert len(keys) + 9 + 12 + 2 <= MAX_KERNELS


@pytest.mark.skipif(GPU, reason="compiled kernels are right")
@pytest.mark.parametrize("which", range(2))
def test_one_wrong_bit_is_seen(monkeypatch, which):
    """In the last byte of values or scales."""
    write, count = stand_ins.write, itertools.count()

    def wrong(address, output, alignment):
        if next(count) == which:
            output = output.clone()
            output.view(-1)[-1] ^= 1
        write(address, output, alignment)

    monkeypatch.setattr(stand_ins, "write", wrong)
    with pytest.raises(AssertionError, match="scale_rule"):
        check_quantize(matrix("ragged", torch.float32), scale_rule="mae")


@pytest.mark.parametrize("rule", ["mse", "static_6"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_bits_of_the_fast_kernel(rule, name):
    x = matrix(name, torch.bfloat16, DEVICE)
    check_quantize(x, scale_rule=rule)
    check_quantize(x, 1.0, scale_rule=rule)


@pytest.mark.parametrize("special", SPECIAL)
def test_special_numbers_in_the_fast_kernel(special):
    x = matrix("rows", torch.bfloat16, DEVICE, special)
    for rule in ("mse", "static_6"):
        check_quantize(x, SPECIAL[special][1], scale_rule=rule)


SHAPES = [(1, 4096), (77, 1000), (128, 64), (1000, 4096), (2, 256, 512)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", ["mse", "mae"])
def test_larger_matrices(shape, rule):
    """More than one CTA in every direction, more than one round."""
    if rule == "mae" or not GPU:
        shape = (*shape[:-1], min(shape[-1], 1000))
    x = torch.randn(shape, device=DEVICE).bfloat16()
    check_quantize(x, scale_rule=rule)
    check_quantize(x, scale_rule=rule, transpose=True)


@pytest.mark.parametrize("op", ["quantize", "amax"])
def test_empty(op):
    for shape in ((0, 64), (5, 0), (2, 0, 64)):
        x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        if op == "amax":
            assert OPS["amax"](x, True).item() == 0
        else:
            check_quantize(x)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", formats.DTYPES, ids=str)
def test_bits_of_amax(name, dtype):
    for special, transpose in itertools.product(SPECIAL, (False, True)):
        x = matrix(name, dtype, DEVICE, special)
        check(AMAX, AMAX.reference, x, True, transpose)


VIEWS = {
    "plain": lambda v: v,
    "misaligned": lambda v: torch.cat([v.new_zeros(3), v.flatten()])[3:].view(v.shape),
    "every second column": lambda v: torch.stack([v, v], -1)[..., 0],
    "a batch": lambda v: v.view(2, 75, 64),
    "a slice of batches": lambda v: torch.stack([v, v, v])[::2],
}
NUMBERS = (None, 3.0, 0.0, 1e-39, 3e38, float("inf"), float("nan"))


@pytest.mark.parametrize("dtype", formats.DTYPES, ids=str)
@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("view", VIEWS)
def test_bits_of_dequantize(view, format, dtype):
    """Any bytes: every code times every scale."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, (150, 64), dtype=torch.uint8, generator=generator)
    values = VIEWS[view](values.to(DEVICE))
    *batch, rows, half = values.shape
    count = formats.scale_count(rows, 2 * half, format)
    scales = torch.arange(count, dtype=torch.int32).to(torch.uint8).expand(*batch, count)
    scales = scales.contiguous().to(DEVICE)
    for amax, cols in itertools.product(NUMBERS, (128, 104, 101, 1)):
        given = None if amax is None else torch.tensor(amax, device=DEVICE)
        check(
            DEQUANTIZE, DEQUANTIZE.reference, values, scales, given, rows, cols,
            format=format, qs=2688.0, dtype=dtype,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["rows", "mT", "batch", "ragged"])
def test_bits_of_pairs(name):
    x = matrix(name, torch.bfloat16, DEVICE)
    amax = x.abs().amax().float()
    seed = torch.tensor([-5], device=DEVICE)
    check(QUANTIZE_PAIR, QUANTIZE_PAIR.reference, x, amax, amax * 2, seed, stream=6)


@torch.no_grad()
@pytest.mark.parametrize("index", range(len(SCALED_MM.example_inputs())))
def test_products_of_what_a_kernel_unpacks(index):
    """As the reference's on the same device; the operands are exact, the sum is one library's."""
    arguments, options = SCALED_MM.example_inputs()[index]
    arguments = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    with stand_ins.guarded() as zones:
        actual = OPS["scaled_mm"](*arguments, **options)
        assert len(zones.buffers) == 2, "no kernel unpacks"
    assert equal(actual, SCALED_MM.reference(*arguments, **options))


@needs_gpu
def test_more_batches_than_a_grid_holds():
    x = torch.randn(70000, 1, 16, device=CUDA).bfloat16()
    amax = x.abs().amax().float()
    actual = torch.ops.fos.quantize(x, amax, scale_rule="static_4")
    expected = QUANTIZE.reference(x.cpu(), amax.cpu(), scale_rule="static_4")
    assert all(map(equal, actual, expected))


@needs_gpu
def test_a_parameter_and_an_amax_with_dimensions():
    x = matrix("rows", torch.bfloat16, CUDA).requires_grad_()
    check_quantize(x, torch.full((1, 1), 2.0))


@needs_gpu
def test_a_large_matrix_equals_its_parts():
    """2^28 elements, against calls that other tests compare with the reference."""
    x = torch.randn(16384, 16384, device=CUDA).bfloat16()
    amax = x.abs().amax().float()
    values, scales = torch.ops.fos.quantize(x, amax)
    for first in range(0, 16384, 1024):
        part = torch.ops.fos.quantize(x[first : first + 1024], amax)
        assert torch.equal(values[first : first + 1024], part[0])
        assert torch.equal(scales[first * 1024 : (first + 1024) * 1024], part[1])


def everything(x, amax, seed):
    """One call of every operator, from x to what it can be made of."""
    rotated = torch.ops.fos.amax(x, True)
    fast = torch.ops.fos.quantize(x, amax)
    options = {"rounding": "stochastic", "rht": True, "transpose": True}
    general = torch.ops.fos.quantize(x, rotated, seed, **options)
    back = torch.ops.fos.dequantize(*fast, amax, *x.shape, qs=1536.0, dtype=torch.bfloat16)
    return rotated, *fast, *general, back


def inputs(manual_seed=0):
    generator = torch.Generator().manual_seed(manual_seed)
    x = torch.randn(512, 512, generator=generator).bfloat16()
    return x, x.abs().amax().float(), torch.tensor([-manual_seed - 1])


def on_gpu(arguments):
    return [argument.to(CUDA) for argument in arguments]


@needs_gpu
def test_runs_on_the_current_stream():
    """A stream that is kept busy delays the kernels; the default stream does not wait for it."""
    arguments = inputs()
    x, amax, seed = on_gpu(arguments)
    everything(x, amax, seed)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        actual = everything(late, amax, seed)
    side.synchronize()
    assert all(map(equal, actual, everything(*arguments)))


@needs_gpu
def test_never_synchronizes():
    arguments = on_gpu(inputs())
    everything(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_replays_in_a_graph():
    arguments = on_gpu(inputs())
    everything(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(*arguments)
    for seed in (1, 2):
        fresh = inputs(seed)
        for old, new in zip(arguments, fresh, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert all(map(equal, captured, everything(*fresh)))


@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_in_a_compiled_graph(mode):
    arguments = on_gpu(inputs())
    function = torch.compile(lambda x, a, s: everything(x * 2, a * 2, s), mode=mode)
    for _ in range(3):
        actual = [t.clone() for t in function(*arguments)]
    x, amax, seed = inputs()
    assert all(map(equal, actual, everything(x * 2, amax * 2, seed)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    arguments = [argument.to("cuda:1") for argument in inputs()]
    with torch.cuda.device(0):
        assert all(map(equal, everything(*arguments), everything(*inputs())))
        assert torch.cuda.current_device() == 0
