"""`filtered_stochastic` on the numpy model of PTX: what it does not call `near` is right."""

from __future__ import annotations

import filter_blocks
import numpy as np
import pytest
import torch

import ptx_model
from fos_compile.kernels import formats

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
from fos_compile.kernels.cute import (
    contract,
    filtered,
    filtered_stochastic,
    host_quantize_filtered,
    random_bits,
)

CASES = [
    ("mse", "stochastic"),
    ("mse", "stochastic_unbiased"),
    ("static_6", "stochastic"),
    ("static_6", "stochastic_unbiased"),
]
SEED, STREAM = -1234567890123456789, 5


@pytest.fixture(autouse=True)
def model(monkeypatch):
    ptx_model.install(monkeypatch, contract, filtered, filtered_stochastic, random_bits)
    with np.errstate(all="ignore"):
        yield


def just_below_a_binade(generator):
    """Next to 2, 4 and 6 of one of the candidates, where a step may be taken for another."""
    grid = torch.tensor([2.0, 4.0, 6.0, 4 / 1.5, 2 / 1.5, 1.5])
    x = grid[torch.randint(6, (filter_blocks.BLOCKS, 16), generator=generator)]
    x = x * (1 - 2.0**-8 * torch.randint(0, 2, x.shape, generator=generator))
    x[:, 0] = 6.0
    return x


def above_six(generator):
    """Many elements beyond the largest code of candidate 6."""
    x = 6 * (1 - 0.08 * torch.rand(filter_blocks.BLOCKS, 16, generator=generator))
    x[:, 0] = 6 * (1 + 0.06 * torch.rand(filter_blocks.BLOCKS, generator=generator))
    return x


DATA = [*filter_blocks.DATA, just_below_a_binade, above_six]


def quantize(x, amax, rule, rounding):
    """(wrong, near) by block: against the reference, x [N, 16] bf16 read as rows of one block."""
    words = np.ascontiguousarray(x.view(torch.int16).numpy()).view(np.uint32)
    words = [ptx_model.clear_negative_zeros_bf16x2(words[:, i]) for i in range(8)]
    rules = contract.Rules(scale_rule=rule, rounding=rounding)
    tensor = contract.tensor_of(np.full(len(x), amax, np.float32), rules.qs)
    exponents = np.uint32(host_quantize_filtered.HALF_EXPONENTS)
    choice = filtered_stochastic.choose(filtered.magnitudes(words), tensor, rules, exponents)
    assert set(np.unique(choice.near)) <= {0, 1}, "the kernel keeps one bit"
    pattern = SEED & 0xFFFFFFFFFFFFFFFF
    key = (np.uint32(pattern & 0xFFFFFFFF), np.uint32(pattern >> 32))
    group = (np.arange(len(x), dtype=np.uint32) * np.uint32(4), np.uint32(0))
    dice = random_bits.philox(random_bits.keys_of(key), group, np.uint32(STREAM))
    low, high = filtered_stochastic.codes(words, choice.inverse, dice)
    scale = np.asarray(choice.scale)
    got = np.stack([np.where(scale != 0, word, 0) for word in (low, high)], -1).astype(np.uint32)
    padded = torch.nn.functional.pad(x, (0, 48))
    options = {"scale_rule": rule, "rounding": rounding, "stream": STREAM}
    want, scales = torch.ops.fos.quantize(
        padded, torch.tensor(amax), torch.tensor([SEED]), **options
    )
    want = np.ascontiguousarray(want[:, :8].numpy()).view(np.uint32)
    wanted = formats.from_blocked(scales, len(x), 4)[:, 0].numpy()
    return (got != want).any(-1) | (scale != wanted), choice.near != 0


@pytest.mark.parametrize(("rule", "rounding"), CASES)
@pytest.mark.parametrize("make", DATA)
def test_wrong_only_where_it_says_so(make, rule, rounding):
    x = make(torch.Generator().manual_seed(0)).bfloat16()
    most = float(x.abs().max())
    # Other tensor scales put the same block elsewhere on the grid; below the largest they saturate.
    for amax in (most, most * 1.01, most * 1.7, most * 40, most / 3):
        wrong, near = quantize(x, amax, rule, rounding)
        assert not (wrong & ~near).any(), (x[wrong & ~near][:1], amax)


@pytest.mark.parametrize("exponent", [-39, -20, 0, 40, 59])
def test_holds_in_the_range_it_claims(exponent):
    x = filter_blocks.gaussian(torch.Generator().manual_seed(0)) * 2.0**exponent / 5
    wrong, near = quantize(x.bfloat16(), 2.0**exponent, "mse", "stochastic")
    assert not (wrong & ~near).any()


@pytest.mark.parametrize("rounding", ["stochastic", "stochastic_unbiased"])
def test_few_gaussian_blocks_are_near_and_those_would_be_wrong(rounding):
    x = filter_blocks.gaussian(torch.Generator().manual_seed(0)).bfloat16()
    wrong, near = quantize(x, float(x.abs().max()), "mse", rounding)
    assert near.mean() < 0.08
    assert wrong.any()
    static_near = quantize(x, float(x.abs().max()), "static_6", rounding)[1]
    assert static_near.mean() < 0.001


MAGNITUDE = filtered_stochastic._magnitude
ERROR = filtered_stochastic._error


def unbounded(*arguments, **options):
    """Errors that are never off."""
    error, bound = ERROR(*arguments, **options)
    return error, bound * np.float32(0)


MUTANTS = {
    "no bound": (filtered_stochastic, "_error", unbounded),
    "a wrong magic number": (filtered_stochastic, "HALF_512", 0x5C005C00),
    "no excess": (ptx_model, "hfma2_relu", lambda a, b, c: np.zeros_like(a)),
    "a wrong step": (filtered_stochastic, "HALF_2_TO_MINUS_10", 0x18001800),
    "another byte": (
        filtered_stochastic,
        "_magnitude",
        lambda x, factor, dice, byte: MAGNITUDE(x, factor, dice, byte ^ 1),
    ),
    "rounded up": (ptx_model, "add_down", ptx_model.add),
    "negative zeros kept": (ptx_model, "clear_negative_zeros_bf16x2", lambda a: a),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees(monkeypatch, mutant):
    """Each of these mistakes makes a block wrong that is not called near."""
    monkeypatch.setattr(*MUTANTS[mutant])
    for make in DATA:
        x = make(torch.Generator().manual_seed(0)).bfloat16()
        most = float(x.abs().max())
        for amax in (most, most * 1.7):
            wrong, near = quantize(x, amax, "mse", "stochastic")
            if (wrong & ~near).any():
                return
    pytest.fail("no block differs")
