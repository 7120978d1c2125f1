"""Rung 4: the bfloat16 GEMM with tcgen05, in all modes.

An MMA of 16 numbers of K adds an exact sum of products to an accumulator and rounds to float32
once, so that an element is off by at most ceil(K / 16) roundings of partial sums, which are not
larger than sum |a| |b|: 2^-24 each, relative to that. Sums of small integers are exact.
"""

from __future__ import annotations

import math

import pytest
import torch
from cutlass import BFloat16, Float32

from tests.emulator.emulate import emulate
from tests.emulator.kernels.bf16_gemm import compile_bf16_gemm
from tests.emulator.machine.engine import MODES
from tests.emulator.machine.program import Settings
from tests.emulator.snippets import host

ARCH = "sm_100a"
SETTINGS = [Settings(mode=mode) for mode in MODES]
SETTINGS += [Settings(mode=mode, schedule="random", seed=seed) for seed, mode in enumerate(MODES)]


def _multiply(a, b, *, tile_n=64, stages=3, output=torch.float32, settings=None):
    kind = Float32 if output == torch.float32 else BFloat16
    c = torch.empty(a.shape[0], b.shape[0], dtype=output)
    kernel = host(compile_bf16_gemm, ARCH, tile_n, stages, kind)
    run = emulate(kernel, a, b, c, outputs=[c], settings=settings)
    assert run.launches[0].grid == (-(-a.shape[0] // 128), -(-b.shape[0] // tile_n), 1)
    return c


def _within_budget(c, a, b):
    a, b = a.double(), b.double()
    roundings = math.ceil(a.shape[1] / 16)
    # Partial sums carry earlier roundings: (1 + 2^-24) to the power of their number.
    budget = (a.abs() @ b.abs().T) * (math.pow(1 + 2.0**-24, roundings) - 1)
    return bool(((c.double() - a @ b.T).abs() <= budget).all())


def _operands(m, n, k):
    return torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()


def _whole(*shape):
    return torch.randint(-8, 9, shape).bfloat16()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.mode}-{s.schedule}")
def test_ragged_k_that_wraps_the_pipeline_three_times(settings):
    """616 = 9 stages of 64 and 40 more; three stages."""
    a, b = _operands(150, 72, 616)
    assert _within_budget(_multiply(a, b, settings=settings), a, b)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"{s.mode}-{s.schedule}")
def test_sums_of_integers_are_exact(settings):
    a, b = _whole(130, 328), _whole(80, 328)
    c = _multiply(a, b, stages=2, settings=settings)
    assert torch.equal(c, a.float() @ b.float().T)


@pytest.mark.parametrize("tile_n", [32, 64, 128, 256])
def test_every_width_of_tile(tile_n):
    a, b = _whole(128, 136), _whole(tile_n + 8, 136)
    c = _multiply(a, b, tile_n=tile_n, settings=Settings(mode="late"))
    assert torch.equal(c, a.float() @ b.float().T)


@pytest.mark.parametrize("shape", [(1, 1, 8), (127, 33, 16), (129, 65, 72), (128, 64, 64)])
@pytest.mark.parametrize("stages", [1, 4])
def test_sizes(shape, stages):
    m, n, k = shape
    a, b = _whole(m, k), _whole(n, k)
    c = _multiply(a, b, stages=stages, settings=Settings(mode="random", schedule="random", seed=3))
    assert torch.equal(c, a.float() @ b.float().T)


def test_rows_with_gaps():
    a, b = (_whole(rows, 208)[:, 8:136] for rows in (140, 70))
    assert torch.equal(_multiply(a, b), a.float() @ b.float().T)


def test_bfloat16_output_is_rounded_once():
    a, b = _operands(100, 60, 200)
    c = _multiply(a, b, output=torch.bfloat16)
    assert torch.equal(c, _multiply(a, b).bfloat16())
