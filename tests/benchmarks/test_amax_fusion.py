"""What the benchmark of amax counts and compiles; whether it fuses on CUDA, only CUDA shows."""

from __future__ import annotations

import pytest
import torch

import amax_fusion
import harness

CPU = torch.device("cpu")
SHAPE = (64, 512)
PRODUCERS = [amax_fusion.swiglu, amax_fusion.rms_norm]


@pytest.mark.parametrize("producer", PRODUCERS)
@torch.no_grad()
def test_amax_is_that_of_the_activation(producer):
    arguments = amax_fusion.operands(producer, SHAPE, CPU)
    y, amax = amax_fusion.compiled(amax_fusion.with_amax(producer))(*arguments)
    assert torch.equal(amax, y.abs().amax().float())
    torch.testing.assert_close(y, producer(*arguments))


@torch.no_grad()
def test_a_second_read_is_counted():
    arguments = amax_fusion.operands(amax_fusion.swiglu, SHAPE, CPU)
    n = arguments[0].nbytes
    bytes_, kernels = amax_fusion.moved(amax_fusion.compiled(amax_fusion.swiglu), arguments)
    assert bytes_ == 3 * n and kernels == 1
    # An argument besides the activation is a read that nothing can fuse away.
    function = amax_fusion.compiled(lambda a, b: (a.neg(), torch.ops.fos.amax(b)))
    assert 3 * n < amax_fusion.moved(function, arguments)[0] < 3.1 * n


@torch.no_grad()
def test_a_row_compares_three_forms(monkeypatch):
    calls = []

    def measure(function, arguments, *, device):
        calls.append(function)
        function(*arguments[0])
        us = {0: 10.0, 1: 11.0, 2: 15.0, 3: 12.0}[len(calls) - 1]
        return harness.Timing(us=us, low_us=us, high_us=us)

    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(harness, "rotation", lambda make, *, device: [make(0)])
    row = amax_fusion.run(amax_fusion.swiglu, SHAPE, CPU)
    assert calls[0] is calls[3] and len({*map(id, calls)}) == 3
    assert (row.ratio, row.unfused, row.alone_us) == (1.1, 1.5, 10.0)
    assert row.spread == pytest.approx(0.2)
    assert row.extra <= 1.01 and row.kernels >= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", [(8192, 5120), (16384, 4096), (64, 8192), (4, 512, 2048)])
@pytest.mark.parametrize("producer", PRODUCERS)
@torch.no_grad()
def test_no_second_read_on_a_gpu(producer, shape):
    """Whatever way Inductor takes to reduce, many rows or few."""
    arguments = amax_fusion.operands(producer, shape, torch.device("cuda"))
    alone = amax_fusion.moved(amax_fusion.compiled(producer), arguments)[0]
    fused = amax_fusion.moved(amax_fusion.compiled(amax_fusion.with_amax(producer)), arguments)[0]
    assert fused - alone < 0.05 * arguments[0].nbytes
