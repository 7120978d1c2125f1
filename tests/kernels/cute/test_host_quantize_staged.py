"""The host side of the kernel for both orientations, with a kernel of torch."""

from __future__ import annotations

import pytest
import torch

import stand_ins
from cute_cases import LAYOUTS, SPECIAL, matrix
from fos_compile.kernels import QUANTIZE, QUANTIZE_PAIR, cuda
from fos_compile.kernels.cute import host_oriented, layout

SEED = torch.tensor([-(2**40) + 3])
ROW, COL = torch.tensor(3.0), torch.tensor(7.0)
PAIRS = [
    {},
    {"scale_rule": "static_6", "rht_row": True},
    {"rounding_col": "stochastic", "rht_col": True, "stream": 8},
    {"rounding_row": "stochastic_unbiased", "stream": 2**32 - 1},
]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    found = stand_ins.install(monkeypatch)
    with stand_ins.guarded():
        yield found


def same(actual, expected):
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(actual, expected, strict=True)
    )


def aligned(x):
    return layout.vector(x) == ""


@pytest.mark.parametrize("options", PAIRS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs(kernels, name, options):
    x = matrix(name, torch.bfloat16)
    actual = cuda.cuda_quantize_pair(x, ROW, COL, SEED, **options)
    assert same(actual, QUANTIZE_PAIR.reference(x, ROW, COL, SEED, **options))
    assert (kernels.names() == ["quantize_staged"]) is aligned(x)


@pytest.mark.parametrize("special", SPECIAL)
def test_special_values_take_the_same_way(kernels, special):
    x, amax = matrix("rows", torch.bfloat16, special=special), SPECIAL[special][1]
    amax = x.float().abs().max() if amax is None else torch.tensor(amax)
    actual = cuda.cuda_quantize_pair(x, amax, amax)
    assert same(actual, QUANTIZE_PAIR.reference(x, amax, amax))
    assert kernels.names() == ["quantize_staged"]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "stochastic_unbiased"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_orientation(kernels, name, transpose, rounding):
    """Columns always, rows with dice; rows without have their own kernel."""
    x = matrix(name, torch.bfloat16)
    options = {"rounding": rounding, "transpose": transpose, "stream": 5}
    actual = cuda.cuda_quantize(x, ROW, SEED, **options)
    assert same(actual, QUANTIZE.reference(x, ROW, SEED, **options))
    seen = x.mT if transpose else x
    fits = (aligned(seen) and rounding != "nearest") or (aligned(seen.mT) and not aligned(seen))
    assert (kernels.names() == ["quantize_staged"]) is fits


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 128, 64), (2, 0, 64)])
def test_nothing_to_do(kernels, shape):
    x = torch.empty(shape).bfloat16()
    assert same(cuda.cuda_quantize_pair(x, ROW, COL), QUANTIZE_PAIR.reference(x, ROW, COL))
    assert not kernels.launched


def test_nearest_needs_no_seed(kernels):
    x = matrix("rows", torch.bfloat16)
    meta = torch.empty(1, dtype=torch.int64, device="meta")
    for seed in (None, meta):
        assert same(
            cuda.cuda_quantize_pair(x, ROW, COL, seed), QUANTIZE_PAIR.reference(x, ROW, COL)
        )


def test_the_reason_against_columns():
    assert host_oriented.columns(torch.empty(64, 40).bfloat16().mT) == ""
    assert "multiples of 8" in host_oriented.columns(torch.empty(64, 37).bfloat16().mT)
    assert "contiguous" in host_oriented.columns(torch.empty(64, 64).bfloat16())
    assert "[R, C]" in host_oriented.columns(torch.empty(8).bfloat16())
