from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from graphs import Captured, config
from models import MLP, Attention, bf16, tokens_of

from fos_compile.passes.pipeline import rewrite
from fos_compile.passes.report import Report, merge


def report_of(model, x, **options) -> Report:
    return rewrite(Captured(model, x).graph, config(**options))


def test_training_report():
    report = report_of(bf16(MLP()), tokens_of().requires_grad_(), recipe="training", skip=["down"])
    assert_expected_inline(
        str(report),
        """\
module  role   M x N x K      a                    b                 runs as / reason
------  -----  -------------  -------------------  ----------------  ----------------------------------------------
up      fprop  32 x 128 x 64  nvfp4 1d mse         nvfp4 2d mse      fos::scaled_mm (kernel)
down    fprop  32 x 64 x 128  -                    -                 left alone: module matches skip pattern 'down'
down    wgrad  64 x 128 x 32  -                    -                 left alone: module matches skip pattern 'down'
down    dgrad  32 x 128 x 64  -                    -                 left alone: module matches skip pattern 'down'
up      wgrad  128 x 64 x 32  nvfp4 1d mse sr rht  nvfp4 1d mse rht  fos::scaled_mm (kernel)
up      dgrad  32 x 64 x 128  nvfp4 1d mse sr      nvfp4 2d mse      fos::scaled_mm (kernel)
recipe training: 3 of 6 matmuls quantized, 50.0% of FLOPs in FP4, 4 quantizations (0 shared), operands 0.04 MiB smaller""",
    )


def test_reasons_are_counted():
    report = report_of(bf16(Attention()), tokens_of().requires_grad_(), recipe="training")
    assert report.reasons() == {"batched product of two activations (attention)": 6}


def test_totals():
    report = report_of(bf16(MLP()), tokens_of().requires_grad_(), recipe="inference")
    flops = 2 * 32 * 64 * 128
    assert report.flops == 6 * flops
    assert report.fp4_flops == 2 * flops
    packed = lambda rows, k: rows * k // 2 + rows * k // 16  # noqa: E731
    elements = 2 * 32 * 64 + 2 * 128 * 64 + 2 * 32 * 128 + 2 * 64 * 128
    assert report.bytes_saved == elements - sum(map(packed, (32, 128, 32, 64), (64, 64, 128, 128)))


def test_symbolic_sizes_have_no_flops():
    x = tokens_of()
    torch._dynamo.mark_dynamic(x, 0)
    captured = Captured(bf16(MLP()), x, dynamic=None)
    report = rewrite(captured.graph, config(recipe="inference"))
    assert report.sites[0].flops is None
    assert report.flops == 0
    assert "n/a of FLOPs" in report.summary()


def test_merge_adds_up():
    one = report_of(bf16(MLP()), tokens_of(), recipe="inference")
    both = merge([one, one])
    assert len(both.sites) == 2 * len(one.sites)
    assert both.flops == 2 * one.flops
    assert both.recipe == one.recipe
