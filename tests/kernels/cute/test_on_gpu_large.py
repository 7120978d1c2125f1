"""Bits of the compiled kernels on matrices of 2^28 elements, against the C++ kernel on the CPU.

That kernel is another implementation of docs/contract.md, and takes a fraction of a second on 16
cores, where the eager reference would need a hundred gigabytes. Covered are all pairs of options,
what the recipes use, other dtypes, ragged sizes and `quantize_pair`, in about two minutes;
`FOS_ALL_OPTIONS=1` adds every combination, some five minutes. Without a GPU the same tests run on
small matrices and stand-ins of the kernels.
"""

from __future__ import annotations

import functools
import os

import pytest
import torch

import stand_ins
from cute_cases import covering, valid
from fos_compile.kernels import AMAX, QUANTIZE, QUANTIZE_PAIR, cuda, target
from fos_compile.kernels.cpu import build
from fos_compile.kernels.outlined import outlined

CUDA = torch.device("cuda", 0)
GPU = bool(target.status(CUDA))
DEVICE = CUDA if GPU else torch.device("cpu")
pytestmark = [pytest.mark.slow] if GPU else []
OPS = {
    op: getattr(torch.ops.fos, op.name) if GPU else getattr(cuda, f"cuda_{op.name}")
    for op in (AMAX, QUANTIZE, QUANTIZE_PAIR)
}
SHAPE, RAGGED = ((8192, 32768), (8191, 32776)) if GPU else ((256, 384), (131, 168))
SEED, STREAM = -1234567890123456789, 2**31 + 5

RECIPES = [
    {"scale_rule": "static_6"},
    {},
    {"transpose": True},
    {"rounding": "stochastic"},
    {"rounding": "stochastic", "rht": True, "transpose": True},
    {"rht": True, "transpose": True},
    {"block": "2d"},
    {"block": "2d", "transpose": True},
]
"""Options of `quantize` in the recipes, where not the defaults."""
PAIRS = [
    {"rounding_col": "stochastic", "rht_col": True},
    {"rounding_row": "stochastic", "rounding_col": "stochastic", "rht_col": True},
    {},
    {"block": "2d"},
    {"scale_rule": "static_6", "rht_col": True},
]
# What C++ does not do is only in the small tests.
OPTIONS = [options for options in valid() if options["rounding"] != "stochastic_hardware"]
SAMPLE = covering(OPTIONS, lambda options: options.items(), 2)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The stand-ins, where they are in place of compiled kernels."""
    return None if GPU else stand_ins.install(monkeypatch)


@functools.lru_cache(maxsize=2)
def matrices(shape, dtype):
    """The same numbers on the device and on the CPU: many magnitudes, ties, zeros of both signs."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(shape, generator=generator, device=DEVICE)
    x *= torch.exp2(torch.arange(shape[0], device=DEVICE) % 9 - 6.0).unsqueeze(-1)
    x[::97] = (x[::97] * 4).round() / 4
    x[:, -16:], x[1, ::3] = 0.0, -0.0
    x = x.to(dtype)
    return x, x.cpu()


@functools.lru_cache(maxsize=8)
def amax_of(shape, dtype, rht, transpose):
    return torch.ops.fos.amax(matrices(shape, dtype)[1], rht, transpose)


def expected(op, x, *arguments, **options):
    """By C++ on the CPU; without a compiler there, by Inductor on the device."""
    given = [x[1], *arguments]
    if build.status():
        return op.overload(*given, **options)
    on_device = [x[0], *(argument.to(DEVICE) for argument in arguments)]
    return [output.cpu() for output in outlined(op)(*on_device, **options)]


@torch.no_grad()
def check(op, shape, dtype, amaxes, **options):
    """A call between guards: every byte, and the first row where one differs."""
    x = matrices(shape, dtype)
    seed = torch.tensor([SEED])
    with stand_ins.guarded() as zones:
        on_device = [argument.to(DEVICE) for argument in (*amaxes, seed)]
        actual = OPS[op](x[0], *on_device, stream=STREAM, **options)
        assert zones.buffers, "no kernel ran"
    wanted = expected(op, x, *amaxes, seed, stream=STREAM, **options)
    for index, (a, b) in enumerate(zip(actual, wanted, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        if not torch.equal(a.cpu(), b):
            wrong = (a.cpu() != b).flatten().nonzero()
            raise AssertionError(
                f"{options}: {len(wrong)} of {b.numel()} bytes of output {index} differ, "
                f"the first at {int(wrong[0])}, the last at {int(wrong[-1])}"
            )


def check_quantize(shape, dtype=torch.bfloat16, **options):
    amax = amax_of(shape, dtype, options.get("rht", False), options.get("transpose", False))
    check(QUANTIZE, shape, dtype, [amax], **options)


def check_pair(shape, dtype=torch.bfloat16, **options):
    # Twice as large for the columns where they are not rotated: a kernel may not swap the two.
    rht = options.get("rht_col", False)
    col = amax_of(shape, dtype, rht, True) * (1 if rht else 2)
    row = amax_of(shape, dtype, options.get("rht_row", False), False)
    check(QUANTIZE_PAIR, shape, dtype, [row, col], **options)


def label(options):
    return "-".join(map(str, options.values())) or "defaults"


@pytest.mark.parametrize("shape", [SHAPE, RAGGED], ids=["whole", "ragged"])
@pytest.mark.parametrize("options", RECIPES, ids=label)
def test_what_the_recipes_use(options, shape):
    check_quantize(shape, **options)


@pytest.mark.parametrize("shape", [SHAPE, RAGGED], ids=["whole", "ragged"])
@pytest.mark.parametrize("options", PAIRS, ids=label)
def test_pairs(options, shape):
    check_pair(shape, **options)


@pytest.mark.parametrize("options", SAMPLE, ids=label)
def test_pairs_of_options(options):
    check_quantize(SHAPE, **options)


@pytest.mark.parametrize("transpose", [False, True])
def test_amax_under_the_transform(transpose):
    x, there = matrices(SHAPE, torch.bfloat16)
    actual = OPS[AMAX](x, True, transpose)
    assert actual.item() == torch.ops.fos.amax(there, True, transpose).item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_other_dtypes(dtype, transpose):
    check_quantize(SHAPE, dtype, transpose=transpose)


@pytest.mark.skipif(
    GPU and not os.environ.get("FOS_ALL_OPTIONS"), reason="minutes: FOS_ALL_OPTIONS=1"
)
@pytest.mark.parametrize("options", [o for o in OPTIONS if o not in SAMPLE], ids=label)
def test_every_option(options):
    check_quantize(SHAPE, **options)


@pytest.mark.skipif(GPU, reason="compiled kernels are right")
@pytest.mark.parametrize("output", range(4))
def test_one_wrong_bit_of_a_pair_is_seen(monkeypatch, output):
    right = OPS[QUANTIZE_PAIR]

    def wrong(*args, **options):
        outputs = right(*args, **options)
        outputs[output].view(-1)[-1] ^= 1
        return outputs

    monkeypatch.setitem(OPS, QUANTIZE_PAIR, wrong)
    with pytest.raises(AssertionError, match=f"1 of .* bytes of output {output} differ"):
        check_pair(SHAPE)
