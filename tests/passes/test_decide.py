from __future__ import annotations

import pytest
import torch
from graphs import Captured, config, text
from models import MLP, Attention, Experts, TiedLM, bf16, tokens_of

from fos_compile.passes.decide import RULES, decide, matches
from fos_compile.passes.detect import detect
from fos_compile.passes.sites import DECISION, Plan, sites_of


def decided(captured: Captured, **options):
    chosen = config(**options)
    before = text(captured.graph)
    detect(captured.graph, chosen)
    decide(captured.graph, chosen)
    assert text(captured.graph) == before
    return [(site, site.node.meta[DECISION]) for site in sites_of(captured.graph)]


def codes(decisions) -> dict[str, str]:
    return {
        f"{site.path}:{site.role}": "plan" if isinstance(d, Plan) else d.code
        for site, d in decisions
    }


@pytest.fixture(scope="module")
def mlp() -> Captured:
    return Captured(bf16(MLP()), tokens_of().requires_grad_())


def test_training_recipe_by_role(mlp):
    rows = {
        f"{site.path} {site.role}": f"{plan.a} | {plan.b}"
        for site, plan in decided(mlp, recipe="training")
        if site.path == "up"
    }
    assert rows == {
        "up fprop": "nvfp4 1d mse | nvfp4 2d mse",
        "up dgrad": "nvfp4 1d mse sr | nvfp4 2d mse",
        "up wgrad": "nvfp4 1d mse sr rht | nvfp4 1d mse rht",
    }


def test_inference_recipe_leaves_the_backward(mlp):
    assert codes(decided(mlp, recipe="inference")) == {
        "up:fprop": "plan",
        "down:fprop": "plan",
        "down:wgrad": "recipe",
        "down:dgrad": "recipe",
        "up:wgrad": "recipe",
        "up:dgrad": "recipe",
    }


def test_scale_rule_option_changes_every_operand(mlp):
    for _, plan in decided(mlp, recipe="training", scale_rule="static_6"):
        assert {plan.a.scale_rule, plan.b.scale_rule} == {"static_6"}


def test_override_by_glob_takes_the_backward_along(mlp):
    decisions = decided(mlp, recipe="training", overrides={"down": "bf16"})
    assert {c for name, c in codes(decisions).items() if name.startswith("down")} == {"recipe"}
    assert {c for name, c in codes(decisions).items() if name.startswith("up")} == {"plan"}


def test_rejects_skipped_module_with_its_backward(mlp):
    result = codes(decided(mlp, recipe="training", skip=["d*"]))
    assert {c for name, c in result.items() if name.startswith("down")} == {"skip"}


def test_rejects_attention_products_with_their_backward():
    result = decided(Captured(bf16(Attention()), tokens_of().requires_grad_()), recipe="training")
    batched = [d for site, d in result if site.batch]
    assert len(batched) == 6
    assert {d.code for d in batched} == {"no_parameter"}
    assert all(isinstance(d, Plan) for site, d in result if not site.batch)


def test_accepts_batched_product_with_a_parameter():
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    result = decided(Captured(bf16(Experts()), x), recipe="training")
    assert all(isinstance(d, Plan) for _, d in result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rejects_wide_dtypes(dtype):
    result = decided(Captured(MLP().to(dtype), tokens_of().to(dtype)), recipe="training")
    assert {d.code for _, d in result} == {"dtype"}
    assert ("autocast" in result[0][1].text) == (dtype == torch.float32)


def test_rejects_complex_and_integer_matmuls():
    for dtype in (torch.complex64, torch.int32):
        x = torch.ones(64, 64, dtype=dtype)
        ((_, decision),) = decided(Captured(lambda a: a @ a, x), recipe="training")
        assert decision.code == "dtype"
        assert str(dtype).removeprefix("torch.") in decision.text


def test_rejects_tied_head():
    result = decided(Captured(bf16(TiedLM()), torch.randint(96, (2, 16))), recipe="training")
    heads = [d for site, d in result if "96" in (site.m, site.n, site.k)]
    assert len(heads) == 3
    assert {d.code for d in heads} == {"tied_head"}


@pytest.mark.parametrize("shape", [(32, 128), (128, 32)])
def test_rejects_small_weights(shape):
    model = bf16(MLP(*shape))
    result = decided(Captured(model, tokens_of(shape[0])), recipe="training")
    assert {d.code for _, d in result} == {"small_weight"}
    kept = decided(Captured(model, tokens_of(shape[0])), recipe="training", min_weight_dim=32)
    assert all(isinstance(d, Plan) for _, d in kept)


def test_one_token_is_not_rejected():
    with torch.no_grad():
        captured = Captured(bf16(MLP()), tokens_of(batch=1, length=1))
    assert all(isinstance(d, Plan) for _, d in decided(captured, recipe="inference"))


def test_rejects_backward_matmul_of_no_forward_one(mlp):
    def graph_with_double_gradient():
        graph = torch.fx.Graph()
        tangents = [graph.placeholder(f"tangents_{i}") for i in (1, 2)]
        for node in tangents:
            node.meta["val"] = torch.empty(64, 64, dtype=torch.bfloat16)
        product = graph.call_function(torch.ops.aten.mm.default, tuple(tangents))
        product.meta |= {
            "val": torch.empty(64, 64, dtype=torch.bfloat16),
            "partitioner_tag": "is_backward",
        }
        graph.output(product)
        return graph

    graph = graph_with_double_gradient()
    detect(graph, config())
    decide(graph, config())
    ((site),) = sites_of(graph)
    assert site.node.meta[DECISION].code == "unlinked"


def test_rejects_grouped_mm():
    graph = torch.fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    x.meta["val"] = torch.empty(32, 64, dtype=torch.bfloat16)
    w.meta["val"] = torch.empty(2, 64, 64, dtype=torch.bfloat16)
    product = graph.call_function(torch.ops.aten._grouped_mm.default, (x, w))
    product.meta["val"] = torch.empty(32, 64, dtype=torch.bfloat16)
    graph.output(product)
    detect(graph, config())
    decide(graph, config())
    (site,) = sites_of(graph)
    assert site.node.meta[DECISION].code == "no_operator"


def test_every_rule_has_a_reject_test():
    # The code that each rule gives, and the test above that shows it.
    shown = {
        "_no_forward": test_rejects_backward_matmul_of_no_forward_one,
        "_forward_rejected": test_rejects_skipped_module_with_its_backward,
        "_no_operator": test_rejects_grouped_mm,
        "_skipped": test_rejects_skipped_module_with_its_backward,
        "_no_parameter": test_rejects_attention_products_with_their_backward,
        "_dtype": test_rejects_wide_dtypes,
        "_tied_head": test_rejects_tied_head,
        "_small_weight": test_rejects_small_weights,
        "_recipe": test_inference_recipe_leaves_the_backward,
    }
    assert [rule.__name__ for rule in RULES] == list(shown)


def test_no_rule_guards_a_symbolic_size():
    x = tokens_of()
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    captured = Captured(bf16(MLP()), x, dynamic=None)
    environment = next(
        n.meta["val"].fake_mode.shape_env
        for n in captured.graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
    )
    guards = len(environment.guards)
    result = decided(captured, recipe="training")
    assert all(isinstance(d, Plan) for _, d in result)
    assert len(environment.guards) == guards


@pytest.mark.parametrize(
    ("path", "pattern", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("model.lm_head", "lm_head", True),
        ("model.layers.0.mlp.down_proj", "*.down_proj", True),
        ("model.layers.0.mlp.down_proj", "layers.0.*", True),
        ("model.layers.10.mlp.down_proj", "layers.1.*", False),
        ("model.layers.0.mlp.gate_proj", "gate", False),
        ("my_lm_head", "lm_head", False),
    ],
)
def test_globs(path, pattern, expected):
    assert matches(path, pattern) is expected
