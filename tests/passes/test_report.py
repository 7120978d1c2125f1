from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline
from graphs import Captured, config
from models import MLP, Attention, bf16, tokens_of

from fos_compile.passes.pipeline import rewrite
from fos_compile.passes.report import Report, merge


def report_of(model, *inputs, **options) -> Report:
    return rewrite(Captured(model, *inputs).graph, config(**options))


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


@pytest.mark.parametrize("bias", [(32, 128), (1,), (128,)])
def test_a_product_with_a_bias_of_any_shape_runs_in_four_bits(bias):
    w = torch.nn.Parameter(torch.randn(64, 128).bfloat16())
    add = lambda x, bias: torch.addmm(bias, x, w, alpha=2, beta=3)  # noqa: E731
    x, bias = tokens_of()[0].repeat(2, 1), torch.zeros(bias, dtype=torch.bfloat16)
    report = report_of(add, x, bias, recipe="inference")
    (site,) = report.quantized
    assert site.implementation.startswith("fos::scaled_mm")
    (site,) = report_of(add, x, bias, recipe="weight_only").quantized
    assert site.implementation == "dequantize, then the matmul"


def test_patterns_that_match_nothing_are_noted():
    options = {"recipe": "inference", "skip": ["dwon", "lm_head"]}
    first = report_of(bf16(MLP()), tokens_of(), **options)
    assert first.unused == ("dwon",)
    assert str(first).endswith("note: no matmul matches 'dwon'")
    second = report_of(bf16(MLP()), tokens_of(), recipe="inference", skip=["head", "dwon"])
    assert merge([first, second]).unused == ("dwon",)
    assert merge([first, report_of(bf16(MLP()), tokens_of())]).unused == ()


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


def test_merge_takes_the_recipe_from_graphs_with_matmuls():
    one = report_of(bf16(MLP()), tokens_of(), recipe="inference")
    nothing = Report(recipe="training")
    assert merge([nothing, one]).recipe == "inference"
    assert merge([nothing, nothing]).recipe == "training"
