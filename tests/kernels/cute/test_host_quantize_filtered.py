"""How the fast kernel is launched and how far its CTAs walk, with a kernel of torch."""

from __future__ import annotations

import pytest
import torch

import stand_ins
from fos_compile.kernels import QUANTIZE
from fos_compile.kernels.cute import host_quantize_filtered as host
from fos_compile.kernels.cute import layout
from fos_compile.kernels.cute.tables import TABLES

AMAX = torch.tensor(4.5)


ROWS = TABLES["quantize"][0]
KEY = ROWS.key(torch.bfloat16, ("nvfp4", "mse", "nearest", "1d", False, False))


class Kernel:
    """The stand-in, and what it was called with."""

    def __init__(self):
        self.calls = []
        self._compute = stand_ins.Kernels().get(KEY, "sm_90a")

    def __call__(self, x, amax, values, scales, counter, rounds, half_exponents):
        self.calls.append((tuple(x.shape), rounds))
        self._compute(x, amax, values, scales, counter, rounds, half_exponents)


def launch(kernel, x):
    """Between guards."""
    with stand_ins.guarded():
        return ROWS.launch(kernel, 132, KEY, x, AMAX, None, 0)


def matrix(*shape):
    return torch.randn(shape).bfloat16()


def view(x, *offset_and_strides):
    offset, *strides = offset_and_strides
    return torch.empty(4096, dtype=torch.bfloat16).normal_().as_strided(x, strides, offset)


SERVED = {
    "plain": lambda: matrix(130, 72),
    "one row": lambda: matrix(1, 64),
    "sliced columns": lambda: matrix(20, 128)[:, :72],
    "every second row": lambda: matrix(20, 64)[::2],
    "one row for all": lambda: matrix(1, 64).expand(20, 64),
    "a misaligned start": lambda: view((20, 64), 1, 72, 1),
    "no rows": lambda: matrix(0, 64),
    "no columns": lambda: matrix(5, 0),
    "a batch of one": lambda: matrix(1, 20, 72),
    "a batch of whole tiles": lambda: matrix(3, 128, 72),
    "a misaligned batch": lambda: view((2, 128, 8), 3, 1024, 8, 1),
    "an empty batch": lambda: matrix(0, 128, 64),
    "a parameter": lambda: matrix(20, 64).requires_grad_(),
}


@pytest.mark.parametrize("case", SERVED)
def test_bits_are_those_of_the_reference(case):
    x, kernel = SERVED[case](), Kernel()
    with torch.no_grad():
        actual = launch(kernel, x)
        expected = QUANTIZE.reference(x, AMAX)
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    assert len(kernel.calls) == bool(x.numel())


# rows, chunks of 64 columns, SMs
SHAPES = [
    (rows, chunks, sms)
    for rows in (1, 64, 128, 1000, 8192, 16384, 10**6)
    for chunks in (1, 3, 4, 64, 80, 172, 224, 256, 2000)
    for sms in (1, 78, 132, 148, 188)
]


CTAS = 8
"""An SM, with which the best rounds were measured."""


def rounds(rows, chunks, sms):
    return host.rounds(-(-rows // 128), chunks, CTAS * sms)


def time(rows, chunks, sms, rounds):
    """In rounds: a wave waits for its longest CTA, and every CTA has a start."""
    ctas = -(-chunks // (4 * rounds))
    waves = -(-ctas * 16 * -(-rows // 128) // (CTAS * sms))
    return waves * (min(rounds, -(-chunks // 4)) + 0.5)


@pytest.mark.parametrize("rows,chunks,sms", SHAPES)
def test_rounds_are_near_the_best_of_all(rows, chunks, sms):
    chosen = rounds(rows, chunks, sms)
    assert 1 <= chosen <= host.MAX_ROUNDS
    best = min(time(rows, chunks, sms, r) for r in range(1, host.MAX_ROUNDS + 1))
    assert time(rows, chunks, sms, chosen) <= 1.03 * best


@pytest.mark.parametrize(
    "rows,cols,measured", [(16384, 16384, 16), (8192, 5120, 32), (8192, 14336, 8)]
)
def test_rounds_are_no_worse_than_what_was_best_on_an_h100(rows, cols, measured):
    """In the model, and for the 8 CTAs an SM with which it was measured."""
    shape = rows, cols // 64, 132
    chosen = rounds(*shape)
    assert time(*shape, chosen) <= 1.03 * time(*shape, measured)
    assert chosen == min(measured, cols // 256) or cols == 14336


def test_the_widest_matrix_fits_in_a_grid():
    chunks = layout.MAX_COLS // 64
    for sms in (1, 132):
        turns = rounds(1, chunks, sms)
        assert -(-chunks // (4 * turns)) <= 65535
    assert layout.anything(torch.empty(1, 2 * layout.MAX_COLS, device="meta"))
    assert layout.anything(torch.empty(2**31, 8, device="meta"))


def test_few_rows_are_spread_over_the_device():
    for rows in (1, 8, 64):
        assert rounds(rows, 64, 132) == 1
