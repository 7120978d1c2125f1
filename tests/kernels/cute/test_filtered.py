"""`filtered`, the fast choice between 4 and 6, on the numpy model of PTX.

Under test: a block that it does not call `near` has the bits of the reference, whatever the data.
"""

from __future__ import annotations

import filter_blocks
import numpy as np
import pytest
import torch

import ptx_model
from fos_compile.kernels import formats

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
from fos_compile.kernels.cute import contract, conversions, filtered, host_quantize_filtered, pairs


@pytest.fixture(autouse=True)
def model(monkeypatch, request):
    ptx_model.install(monkeypatch, contract, filtered)
    arch = getattr(request, "param", "sm_90a")
    with np.errstate(all="ignore"), conversions.target(arch):
        yield


every_way = pytest.mark.parametrize("model", ["sm_80", "sm_90a", "sm_100a"], indirect=True)
"""E4M3 and E2M1 by arithmetic, E4M3 by an instruction, both by instructions."""


def quantize(x, amax, rule):
    """(wrong, near) by block: against the reference, x [N, 16] bf16 read as rows of one block."""
    words = np.ascontiguousarray(x.view(torch.int16).numpy()).view(np.uint32)
    words = filtered.without_negative_zeros([words[:, i] for i in range(8)])
    rules = contract.Rules(scale_rule=rule)
    tensor = contract.tensor_of(np.full(len(x), amax, np.float32), rules.qs)
    mags = filtered.magnitudes(words)
    if rules.adaptive:
        exponents = np.uint32(host_quantize_filtered.HALF_EXPONENTS)
        choice = filtered.adaptive(mags, tensor, exponents)
    else:
        choice = filtered.single(mags, tensor)
    assert set(np.unique(choice.near)) <= {0, 1}, "the kernel keeps one bit"
    low, high = filtered.codes(words, choice.inverse)
    scale = np.asarray(choice.scale)
    got = np.stack([np.where(scale != 0, word, 0) for word in (low, high)], -1).astype(np.uint32)
    padded = torch.nn.functional.pad(x, (0, 48))
    want, scales = torch.ops.fos.quantize(padded, torch.tensor(amax), scale_rule=rule)
    want = np.ascontiguousarray(want[:, :8].numpy()).view(np.uint32)
    wanted = formats.from_blocked(scales, len(x), 4)[:, 0].numpy()
    return (got != want).any(-1) | (scale != wanted), choice.near != 0


@every_way
@pytest.mark.parametrize("rule", ["mse", "static_6"])
@pytest.mark.parametrize("make", filter_blocks.DATA)
def test_wrong_only_where_it_says_so(model, make, rule):
    x = make(torch.Generator().manual_seed(0)).bfloat16()
    most = float(x.abs().max())
    # Other tensor scales put the same block elsewhere on the grid; below the largest they saturate.
    for amax in (most, most * 1.01, most * 1.7, most * 40, most / 3):
        wrong, near = quantize(x, amax, rule)
        assert not (wrong & ~near).any(), (x[wrong & ~near][:1], amax)


@pytest.mark.parametrize("exponent", [-39, -20, 0, 40, 59])
def test_holds_in_the_range_it_claims(exponent):
    x = (filter_blocks.gaussian(torch.Generator().manual_seed(0)) * 2.0**exponent / 5).bfloat16()
    wrong, near = quantize(x, 2.0**exponent, "mse")
    assert not (wrong & ~near).any()


def test_the_worst_known_tie_is_near():
    """Found by a search that climbs toward the bound: both exact errors are equal, and the filter's
    differ by 0.86 of what a bound of 0.0051 allows."""
    words = "3984 3984 3984 3984 350b 350f 398d 350c 350b 35ba 350b 350b 350b 350e 350c 3510"
    patterns = torch.tensor([int(word, 16) for word in words.split()], dtype=torch.int16)
    x = patterns.view(torch.bfloat16).repeat(32, 1)
    _, near = quantize(x, float.fromhex("0x1.225b46p-2"), "mse")
    assert near.all()


def test_few_gaussian_blocks_are_near_and_those_would_be_wrong():
    """What the speed rests on, and that the bound is not idle: without it bits would differ."""
    x = filter_blocks.gaussian(torch.Generator().manual_seed(0)).bfloat16()
    wrong, near = quantize(x, float(x.abs().max()), "mse")
    assert near.mean() < 0.04
    assert wrong.any()
    assert not (wrong & ~near).any()
    static_near = quantize(x, float(x.abs().max()), "static_6")[1]
    assert static_near.mean() < 0.001


def without_last(function):
    return lambda values: function([*values[:-1], values[-1] * np.uint32(0)])


def a_little_more(x, factor):
    """Ties go up."""
    return CODE(x, factor * np.float32(1 + 2**-20))


CODE = filtered.code
MUTANTS = {
    "no band": (filtered, "BAND", 0.0),
    "a narrow band": (filtered, "BAND", 0.0005),
    "no slope": (filtered, "SLOPE", 0.0),
    "a peak that forgets two elements": (filtered, "peak_bits", without_last(filtered.peak_bits)),
    "a sum that forgets two elements": (filtered, "total", without_last(filtered.total)),
    "a wrong magic number": (filtered, "HALF_512", 0x5C005C00),
    "a wrong shift of the codes": (filtered, "CODE_SHIFT", -20),
    "ties up": (filtered, "code", a_little_more),
    "negative zeros kept": (ptx_model, "clear_negative_zeros_bf16x2", lambda a: a),
    "signs kept in magnitudes": (filtered, "MAGNITUDES", 0xFFFF7FFF),
}


def ties_to_larger(*numbers):
    return E2M1X8(*(number * np.float32(1 + 2**-20) for number in numbers))


def other_order(*numbers):
    return E2M1X8(*(numbers[i ^ 1] for i in range(8)))


E2M1X8 = ptx_model.e2m1x8
BY_INSTRUCTIONS = {
    "ties up": (ptx_model, "e2m1x8", ties_to_larger),
    "the nibbles of a byte swapped": (ptx_model, "e2m1x8", other_order),
    "negative zeros kept": (pairs, "fma", lambda a, b, _: pairs.mul(a, b)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees(monkeypatch, mutant):
    """Each of these mistakes makes a block wrong that is not called near."""
    monkeypatch.setattr(*MUTANTS[mutant])
    assert something_differs()


@pytest.mark.parametrize("model", ["sm_100a"], indirect=True)
@pytest.mark.parametrize("mutant", BY_INSTRUCTIONS)
def test_the_comparison_sees_by_instructions(monkeypatch, model, mutant):
    monkeypatch.setattr(*BY_INSTRUCTIONS[mutant])
    assert something_differs()


def something_differs():
    for make in filter_blocks.DATA:
        x = make(torch.Generator().manual_seed(0)).bfloat16()
        most = float(x.abs().max())
        for amax in (most, most * 1.01, most * 1.7, most * 40):
            wrong, near = quantize(x, amax, "mse")
            if (wrong & ~near).any():
                return True
    return False
