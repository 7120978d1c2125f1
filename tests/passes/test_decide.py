from __future__ import annotations

import importlib

import pytest
import torch
from graphs import Captured, config, text
from models import MLP, Attention, Experts, TiedLM, bf16, tokens_of
from torch import nn

from fos_compile.passes import errors
from fos_compile.passes.decide import RULES, decide, matches, unused_patterns
from fos_compile.passes.detect import detect
from fos_compile.passes.sites import DECISION, Plan, sites_of

decide_module = importlib.import_module("fos_compile.passes.decide")


def decided(captured: Captured, **options):
    chosen = config(**options)
    before = text(captured.graph)
    detect(captured.graph, chosen)
    decide(captured.graph, chosen)
    assert text(captured.graph) == before
    return [(site, site.node.meta[DECISION]) for site in sites_of(captured.graph)]


def code(decision) -> str:
    return "plan" if isinstance(decision, Plan) else decision.code


def codes(decisions) -> dict[str, str]:
    return {f"{site.path}:{site.role}": code(d) for site, d in decisions}


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
    assert {code(d) for d in batched} == {"no_parameter"}
    assert all(isinstance(d, Plan) for site, d in result if not site.batch)


def test_accepts_batched_product_with_a_parameter():
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    result = decided(Captured(bf16(Experts()), x), recipe="training")
    assert all(isinstance(d, Plan) for _, d in result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rejects_wide_dtypes(dtype):
    result = decided(Captured(MLP().to(dtype), tokens_of().to(dtype)), recipe="training")
    assert {code(d) for _, d in result} == {"dtype"}
    assert ("autocast" in result[0][1].text) == (dtype == torch.float32)


def test_rejects_complex_and_integer_matmuls():
    for dtype in (torch.complex64, torch.int32):
        x, w = torch.ones(2, 64, 64, dtype=dtype)
        ((_, decision),) = decided(Captured(torch.mm, x, w), recipe="training")
        assert decision.code == "dtype"
        assert str(dtype).removeprefix("torch.") in decision.text


@pytest.mark.parametrize("lookup", ["embedding", "index", "index_select"])
def test_rejects_tied_head(lookup):
    model = bf16(TiedLM())
    looked_up = {
        "embedding": model.embedding.forward,
        "index": lambda tokens: model.embedding.weight[tokens],
        "index_select": lambda tokens: model.embedding.weight.index_select(0, tokens.flatten()),
    }[lookup]
    head = nn.functional.linear
    captured = Captured(
        lambda tokens: head(model.body(looked_up(tokens)), model.embedding.weight),
        torch.randint(96, (2, 16)),
    )
    result = decided(captured, recipe="training")
    heads = [d for site, d in result if "96" in (site.m, site.n, site.k)]
    assert len(heads) == 3
    assert {code(d) for d in heads} == {"tied_head"}
    assert all(isinstance(d, Plan) for site, d in result if site.path == "body")


def test_a_picked_part_of_a_parameter_is_no_attention():
    experts = bf16(Experts(experts=8))
    x, chosen = tokens_of(), torch.tensor([5, 1])
    captured = Captured(lambda x, i: torch.bmm(x, experts.weight[i]), x, chosen)
    decisions = [d for _, d in decided(captured, recipe="training")]
    assert {code(d) for d in decisions} == {"no_parameter"}
    assert all("gathered experts" in d.text for d in decisions)


def newton_schulz(x):
    """The arithmetic of Muon."""
    x = x / x.norm()
    gram = x @ x.mT
    return torch.addmm(x, gram @ gram, x, beta=3, alpha=2)


def unbatched_attention(x):
    return (x @ x.relu().mT).softmax(-1) @ x


def similarity(x):
    return x.sigmoid() @ x.relu().mT


def test_rejects_a_product_of_a_parameter_with_itself():
    """A penalty on what is not orthogonal, which lives on small differences."""
    weight = nn.Parameter(torch.randn(64, 128).bfloat16())
    captured = Captured(lambda x: weight @ weight.mT + x, torch.ones(1))
    decisions = [d for _, d in decided(captured, recipe="nvfp4")]
    assert {code(d) for d in decisions} == {"no_parameter"}
    assert all("with itself" in d.text for d in decisions)


@pytest.mark.parametrize("function", [newton_schulz, unbatched_attention, similarity])
def test_rejects_products_of_two_activations(function):
    x = tokens_of()[0].repeat(4, 1)
    decisions = [d for _, d in decided(Captured(function, x), recipe="inference")]
    assert {code(d) for d in decisions} == {"no_parameter"}
    assert all("optimizer arithmetic" in d.text for d in decisions)


def test_accepts_weights_that_are_no_parameters():
    """Buffers belong to the model; what a function is given next to its input may be a weight."""
    model = bf16(MLP())
    given = {name: p.detach() for name, p in model.named_parameters()}
    functional = lambda given, x: torch.func.functional_call(model, given, (x,))  # noqa: E731
    masked = nn.Module()
    masked.register_buffer("w", torch.randn(2, 64, 64).bfloat16())
    for function, inputs in (
        (functional, (given, tokens_of())),
        (lambda x: torch.bmm(x, masked.w), (tokens_of(),)),
        (lambda x: x.relu() @ (masked.w[0] * model.up.weight[:64]), (tokens_of(),)),
    ):
        result = decided(Captured(function, *inputs), recipe="training")
        assert result and all(isinstance(d, Plan) for _, d in result)


def test_rejects_products_with_gradients_of_parameters():
    """An optimizer inside a compiled step, without the normalization that shows in the graph."""
    parameter = nn.Parameter(torch.randn(64, 64).bfloat16())
    parameter.grad, state = torch.randn(2, 64, 64).bfloat16()
    captured = Captured(lambda state: state @ parameter.grad, state)
    ((site, decision),) = decided(captured, recipe="inference")
    assert (site.role, decision.code) == (None, "gradient")


def squared_gradient(x, weight):
    def loss(weight):
        return nn.functional.linear(x, weight).float().square().sum()

    return torch.func.grad(loss)(weight).float().square().sum()


@pytest.mark.parametrize("differentiated", [False, True])
def test_rejects_a_backward_in_the_forward(differentiated):
    """``torch.func.grad`` inside the model; and again when that is differentiated."""
    x = tokens_of()[0].repeat(4, 1)
    weight = nn.Parameter(torch.randn(64, 64).bfloat16(), differentiated)
    captured = Captured(squared_gradient, x, weight)
    first, *rest = decided(captured, recipe="training" if differentiated else "inference")
    assert first[0].role == "fprop" and isinstance(first[1], Plan)
    traced = [d for site, d in rest if site.role is None]
    assert traced and {code(d) for d in traced} == {"traced_backward"}
    others = {site.role for site, _ in rest} - {None}
    assert others == ({"wgrad"} if differentiated else set())


@pytest.mark.parametrize("shape", [(32, 128), (128, 32)])
def test_rejects_small_weights(shape):
    model = bf16(MLP(*shape))
    result = decided(Captured(model, tokens_of(shape[0])), recipe="training")
    assert {code(d) for _, d in result} == {"small_weight"}
    kept = decided(Captured(model, tokens_of(shape[0])), recipe="training", min_weight_dim=32)
    assert all(isinstance(d, Plan) for _, d in kept)


def test_one_token_is_not_rejected():
    with torch.no_grad():
        captured = Captured(bf16(MLP()), tokens_of(batch=1, length=1))
    assert all(isinstance(d, Plan) for _, d in decided(captured, recipe="inference"))


def test_rejects_backward_matmul_of_no_forward_one():
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
    (site,) = sites_of(graph)
    assert code(site.node.meta[DECISION]) == "unlinked"


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
    assert code(site.node.meta[DECISION]) == "no_operator"


# What each rule rejects, as (the test above that shows it, its arguments).
SHOWN = {
    "_no_forward": (test_rejects_backward_matmul_of_no_forward_one, ()),
    "_forward_rejected": (test_rejects_attention_products_with_their_backward, ()),
    "_no_operator": (test_rejects_grouped_mm, ()),
    "_skipped": (test_rejects_skipped_module_with_its_backward, ("mlp",)),
    "_no_parameter": (test_rejects_attention_products_with_their_backward, ()),
    "_dtype": (test_rejects_wide_dtypes, (torch.float32,)),
    "_tied_head": (test_rejects_tied_head, ("embedding",)),
    "_small_weight": (test_rejects_small_weights, ((32, 128),)),
    "_recipe": (test_inference_recipe_leaves_the_backward, ("mlp",)),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_has_a_test_that_fails_without_it(rule, request, monkeypatch):
    test, arguments = SHOWN[rule.__name__]
    values = [request.getfixturevalue(a) if a == "mlp" else a for a in arguments]
    test(*values)
    monkeypatch.setattr(decide_module, "RULES", tuple(each for each in RULES if each is not rule))
    with pytest.raises((AssertionError, errors._NodeError)):
        test(*values)


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
        ("model.encoder.0.up", "encoder", True),
        ("model.encoder.0.up", "encoder.*", True),
        ("model.encoder.0.up", "model.enc*.0", True),
        ("model.encoder.0.up", "ncoder", False),
    ],
)
def test_globs(path, pattern, expected):
    assert matches(path, pattern) is expected


def test_unused_patterns_are_those_of_the_user_that_match_nothing(mlp):
    options = {"skip": ["up", "dwon"], "overrides": {"d*": "bf16", "head": "nvfp4"}}
    decided(mlp, **options)
    assert unused_patterns(sites_of(mlp.graph), config(**options)) == ("dwon", "head")
