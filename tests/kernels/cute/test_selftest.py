"""The comparison before a kernel's first use: a good kernel passes, and none of the others."""

from __future__ import annotations

import pytest
import torch

import stand_ins
from cute_cases import valid
from fos_compile.kernels import QUANTIZE, cuda
from fos_compile.kernels.cute import launch, selftest
from fos_compile.kernels.cute.tables import NAMES, TABLES

CPU = torch.device("cpu")


@pytest.fixture
def kernels(monkeypatch):
    kernels = stand_ins.install(monkeypatch)
    monkeypatch.setattr(
        launch, "disagreement", lambda *rest: selftest.disagreement(*rest[:-1], CPU)
    )
    return kernels


def every_kernel():
    """(op, entry, dtype, options): each entry of the tables with options that it serves."""
    for op, table in TABLES.items():
        for entry in table:
            sets = valid() if op == "quantize" else [dict.fromkeys(NAMES[op])]
            for options in sets:
                chosen = tuple(
                    entry.options[name][-1] if value is None else value
                    for name, value in options.items()
                )
                for dtype in entry.dtypes:
                    if not entry.refuses(NAMES[op], dtype, chosen):
                        yield op, entry, dtype, chosen


@pytest.mark.parametrize("op", TABLES)
def test_good_kernels_pass(kernels, op):
    seen = set()
    for name, entry, dtype, options in every_kernel():
        key = entry.key(dtype, options)
        if name != op or key in seen:
            continue
        seen.add(key)
        kernel = kernels.get(key, "sm_90a")

        def call(*arguments, entry=entry, kernel=kernel, key=key):
            return entry.launch(kernel, 132, key, *arguments)

        assert selftest.disagreement(op, dict(key.options), dtype, call, CPU) == ""
    assert seen or not TABLES[op]


def wrong_bit(values, scales):
    values[3, 5] ^= 1


def wrong_scale(values, scales):
    scales[7] ^= 1


def zeros(values, scales):
    values.zero_()
    scales.zero_()


@pytest.mark.parametrize("spoil", [wrong_bit, wrong_scale, zeros])
def test_a_kernel_that_differs_is_not_used(kernels, monkeypatch, spoil):
    """Once aloud, and the next kernel of the table serves; here all of them are wrong."""
    good = kernels.get

    def get(key, arch):
        kernel = good(key, arch)

        def bad(x, amax, *rest):
            kernel(x, amax, *rest)
            rows, padded = x.shape[1], -(-x.shape[2] // 64) * 64
            at = 0 if key.name == "quantize_filtered" else 1
            values = stand_ins.memory(rest[at], rows * padded // 2).view(rows, -1)
            scales = stand_ins.memory(rest[at + 1], -(-rows // 128) * 8 * padded)
            spoil(values, scales)

        return bad

    monkeypatch.setattr(kernels, "get", get)
    x = torch.randn(20, 64).bfloat16()
    amax = x.abs().max().float()
    with pytest.warns(UserWarning, match="quantize_filtered differs from the reference in"):
        actual = cuda.cuda_quantize(x, amax)
    assert all(map(torch.equal, actual, QUANTIZE.reference(x, amax)))
    assert "differs from the reference" in launch.reason("quantize", x, {})


def test_a_kernel_that_raises_is_not_used(kernels, monkeypatch):
    def get(key, arch):
        def bad(*arguments):
            raise RuntimeError("an illegal instruction")

        return bad

    monkeypatch.setattr(kernels, "get", get)
    x = torch.randn(20, 64).bfloat16()
    with pytest.warns(UserWarning, match="fails on a small matrix: RuntimeError: an illegal"):
        actual = cuda.cuda_quantize(x, torch.ones(()))
    assert all(map(torch.equal, actual, QUANTIZE.reference(x, torch.ones(()))))


def test_no_first_call_while_a_graph_is_captured(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x = torch.randn(20, 64).bfloat16()
    cuda.cuda_quantize(x, torch.ones(()))
    assert not kernels.compiled
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    cuda.cuda_quantize(x, torch.ones(()))
    assert len(kernels.compiled) == 1
