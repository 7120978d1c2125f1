"""``explain``: every matmul is accounted for, and nothing is compiled or changed."""

from __future__ import annotations

import pytest
import torch
from models import MLP, Attention, bf16, tokens_of
from torch import Tensor, nn

import fos_compile
from fos_compile.backend import Backend
from fos_compile.config import parse_options
from fos_compile.explaining import explain
from fos_compile.kernels.errors import InvalidArgument

TOKENS, WIDTH, HIDDEN = 32, 64, 128
FLOPS = 2 * TOKENS * WIDTH * HIDDEN
"""Of one product of MLP()."""


def test_rows_name_module_role_shapes_and_formats():
    report = explain(bf16(MLP()), tokens_of(), recipe="training")
    header, *body = report.rows()
    assert header[:3] == ("module", "role", "M x N x K")
    rows = {(path, role): rest for path, role, *rest in body}
    assert set(rows) == {(p, r) for p in ("up", "down") for r in ("fprop", "dgrad", "wgrad")} - {
        ("up", "dgrad")
    }
    shape, a, b, how = rows["up", "fprop"]
    assert (shape, a, b) == ("32 x 128 x 64", "nvfp4 1d mse", "nvfp4 2d mse")
    assert how.startswith("fos::scaled_mm")
    assert rows["up", "wgrad"][1] == "nvfp4 1d mse sr rht"
    assert str(report).count("fos::scaled_mm") == 5


def test_totals_of_flops_and_bytes():
    report = explain(bf16(MLP()), tokens_of(), options={"skip": ["down"]})
    assert report.flops == 5 * FLOPS and report.fp4_flops == 2 * FLOPS
    assert "40.0% of FLOPs in FP4" in report.summary()
    # 16 bits become 4 and a scale byte for 16 elements; both products have one activation of
    # TOKENS x WIDTH, one tensor of WIDTH or TOKENS x HIDDEN.
    elements = TOKENS * WIDTH + WIDTH * HIDDEN + TOKENS * WIDTH + TOKENS * HIDDEN
    assert report.bytes_saved == elements * 2 - elements // 2 - elements // 16
    assert report.reasons() == {"module matches skip pattern 'down'": 3}


def test_without_gradients_there_is_only_a_forward():
    with torch.no_grad():
        report = explain(bf16(MLP()), tokens_of())
    assert report.recipe == "inference" and {s.role for s in report.sites} == {"fprop"}


def test_a_model_on_the_meta_device_needs_no_memory():
    with torch.device("meta"):
        model = nn.Linear(1 << 20, 1 << 20, bias=False, dtype=torch.bfloat16)
        x = torch.empty(16, 1 << 20, dtype=torch.bfloat16)
    (site,) = explain(model, x, recipe="inference").quantized
    assert site.shape == "16 x 1048576 x 1048576" and site.flops == 2 * 16 << 40


def test_a_compiled_model_is_explained_as_its_original():
    model = bf16(MLP())
    want = explain(model, tokens_of())
    compiled = torch.compile(model, backend="fouroversix", options={"compiler": "eager"})
    assert explain(compiled, tokens_of()).rows() == want.rows()


class Broken(MLP):
    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        torch._dynamo.graph_break()
        return self.down(x)


def test_graph_breaks_are_merged_into_one_report():
    with torch.no_grad():
        report = explain(bf16(Broken()).forward, tokens_of())
    assert [s.shape for s in report.quantized] == ["32 x 128 x 64", "32 x 64 x 128"]
    assert report.fp4_flops == report.flops == 2 * FLOPS


def test_reasons_stand_in_the_table():
    with torch.no_grad():
        report = explain(bf16(Attention()), tokens_of())
    assert [s.reason_code for s in report.sites] == ["", "no_parameter", "no_parameter", ""]
    assert str(report).count("left alone: batched product of two activations") == 2


def test_a_function_without_matmul_gives_an_empty_report():
    report = explain(lambda x: x + 1, tokens_of())
    assert not report.sites and "0 of 0 matmuls" in str(report)
    assert not explain(lambda: 3).sites


def test_explaining_leaves_the_model_as_it_was():
    model, x = bf16(MLP()), tokens_of()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    explain(model, x)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("make", [MLP, Broken])
def test_explaining_often_neither_forgets_nor_uses_up_the_compilations_of_the_model(make):
    """Dynamo compiles a code object 8 times, and then runs it as it is without a word."""
    model, x = bf16(make()), tokens_of()
    assert [len(explain(model, x).sites) for _ in range(10)] == [5] * 10
    if make is MLP:  # what follows a graph break is traced on the model's own code
        backend = Backend(parse_options({"compiler": "eager"}))
        torch.compile(model, backend=backend)(x)
        assert len(backend.report.sites) == 5


def test_keyword_arguments_of_the_model_are_passed_on():
    class Scaled(MLP):
        def forward(self, x: Tensor, *, twice: bool = False) -> Tensor:
            return super().forward(super().forward(x)) if twice else super().forward(x)

    with torch.no_grad():
        assert len(explain(bf16(Scaled()), tokens_of(), twice=True).sites) == 4


def test_bad_recipe_is_refused():
    with pytest.raises(InvalidArgument, match="inference, training, nvfp4"):
        fos_compile.explain(MLP(), tokens_of(), recipe="fp3")
