from __future__ import annotations

import pytest
import torch
from graphs import Captured, config, text
from models import MLP, Attention, Experts, TiedLM, bf16, tokens_of

from fos_compile.passes.detect import detect, module_path
from fos_compile.passes.sites import sites_of


def detected(captured: Captured):
    before = text(captured.graph)
    report = detect(captured.graph, config())
    assert report.changed == 0
    assert text(captured.graph) == before
    return sites_of(captured.graph)


def describe(site) -> str:
    sides = [f"{o.kind}{'.T' if o.transpose else ''}" for o in site.operands]
    return f"{site.path} {site.role} {' @ '.join(sides)} {site.m}x{site.n}x{site.k}"


def test_linear_layers_forward_and_backward():
    sites = detected(Captured(bf16(MLP()), tokens_of().requires_grad_()))
    # Operands are rows over K: dgrad reads W transposed, wgrad both sides transposed.
    assert [describe(site) for site in sites] == [
        "up fprop activation @ weight 32x128x64",
        "down fprop activation @ weight 32x64x128",
        "down wgrad gradient.T @ activation.T 64x128x32",
        "down dgrad gradient @ weight.T 32x128x64",
        "up wgrad gradient.T @ activation.T 128x64x32",
        "up dgrad gradient @ weight.T 32x64x128",
    ]


def test_inference_graph_has_forward_sites_only():
    with torch.no_grad():
        sites = detected(Captured(bf16(MLP()), tokens_of()))
    assert [describe(site) for site in sites] == [
        "up fprop activation @ weight 32x128x64",
        "down fprop activation @ weight 32x64x128",
    ]


def test_a_frozen_parameter_is_a_weight_without_wgrad():
    model = bf16(MLP())
    model.up.weight.requires_grad_(False)
    sites = detected(Captured(model, tokens_of().requires_grad_()))
    assert [(s.path, s.role) for s in sites if s.path == "up"] == [("up", "fprop"), ("up", "dgrad")]


def test_autocast_looks_behind_the_cast():
    model = MLP().float()
    x = tokens_of().float()

    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    sites = detected(Captured(run, x))
    assert [describe(s) for s in sites if s.role == "fprop"] == [
        "up fprop activation @ weight 32x128x64",
        "down fprop activation @ weight 32x64x128",
    ]
    assert all(s.weight.root.op == "placeholder" for s in sites if s.role == "fprop")


def test_attention_products_link_to_their_forward():
    sites = detected(Captured(bf16(Attention()), tokens_of().requires_grad_()))
    batched = [s for s in sites if s.batch]
    assert len([s for s in batched if s.role == "fprop"]) == 2
    for site in batched:
        if site.role != "fprop":
            assert site.forward is not None and site.forward.weight is None


def test_expert_weights_are_weights_in_three_dimensions():
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16, requires_grad=True)
    sites = detected(Captured(bf16(Experts()), x))
    assert [describe(site) for site in sites] == [
        " fprop activation @ weight.T 16x128x64",
        " wgrad activation.T @ gradient.T 64x128x16",
        " dgrad gradient @ weight 16x64x128",
    ]
    assert {site.batch for site in sites} == {"2"}


def test_weight_on_the_left():
    weight = torch.nn.Parameter(torch.randn(128, 64, dtype=torch.bfloat16))
    x = torch.randn(64, 96, dtype=torch.bfloat16, requires_grad=True)
    sites = detected(Captured(lambda x: weight @ x, x))
    assert sorted((s.role, s.a.kind, s.b.kind) for s in sites) == [
        ("dgrad", "weight", "gradient"),
        ("fprop", "weight", "activation"),
        ("wgrad", "gradient", "activation"),
    ]


def test_two_activations_keep_their_roles_apart():
    a = torch.randn(96, 64, dtype=torch.bfloat16, requires_grad=True)
    b = torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    sites = detected(Captured(lambda a, b: a @ b, a, b))
    assert sorted((s.role, s.m, s.n) for s in sites) == [
        ("dgrad", "96", "64"),
        ("fprop", "96", "128"),
        ("wgrad", "64", "128"),
    ]


def test_tied_head_finds_the_embedding_behind_the_transpose():
    sites = detected(Captured(bf16(TiedLM()), torch.randint(96, (2, 16))))
    head = next(s for s in sites if s.role == "fprop" and s.n == "96")
    assert any(u.target is torch.ops.aten.embedding.default for u in head.weight.root.users)


def test_symbolic_sizes_stay_symbolic():
    x = tokens_of()
    torch._dynamo.mark_dynamic(x, 1)
    sites = detected(Captured(bf16(MLP()), x, dynamic=None))
    assert any("s" in s.m for s in sites if s.role == "fprop")


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        ("L['self'].model.layers[0].q_proj", "model.layers.0.q_proj"),
        ("L['self']._modules['a']._modules['3']", "a.3"),
        ("L['model'].up", "up"),
        ("G['net']", ""),
        ("", ""),
    ],
)
def test_module_paths_read_as_in_named_modules(raw, path):
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["nn_module_stack"] = {"key": (raw, torch.nn.Linear)}
    assert module_path(node) == path
