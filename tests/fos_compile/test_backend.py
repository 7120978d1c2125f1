"""What surrounds a model in practice: none of it breaks the graph, recompiles or changes bits."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import MLP, SwiGLU, TiedLM, bf16, tokens_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fos_compile.backend import Backend
from fos_compile.config import parse_options
from fos_compile.passes.report import Report


def compiled(model: Any, dynamic: bool | None = None, **options: Any) -> tuple[Any, Backend]:
    """The model without graph breaks, run without Inductor unless asked for."""
    backend = Backend(parse_options({"compiler": "eager", "strict": True, **options}))
    torch.compiler.reset()
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic), backend


def gradients(model: nn.Module, call: Any, x: Tensor, *, zero: bool = True) -> list[Tensor | None]:
    torch.manual_seed(2)
    if zero:
        model.zero_grad()
    call(x).float().square().mean().backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def same(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in pairs)


def saved_bytes(call: Any, x: Tensor) -> int:
    total = 0

    def pack(saved: Tensor) -> Tensor:
        nonlocal total
        total += saved.nbytes
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        call(x)
    return total


def roles(report: Report) -> dict[str, str]:
    return {f"{s.path}:{s.role}": s.reason_code or "fp4" for s in report.sites}


def test_default_recipe_follows_the_graph():
    model = bf16(MLP())
    call, backend = compiled(model)
    with torch.no_grad():
        call(tokens_of())
    assert [r.recipe for r in backend.reports] == ["inference"]
    gradients(model, call, tokens_of())
    assert [r.recipe for r in backend.reports] == ["inference", "training"]


def test_registered_name_needs_no_import_of_ours():
    assert "fouroversix" in torch.compiler.list_backends()


def test_autocast_with_float32_master_weights():
    model = bf16(MLP(bias=True)).float()
    call, backend = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        grads = gradients(model, call, tokens_of().float())
    assert set(roles(backend.report).values()) == {"fp4"} and len(backend.report.sites) == 5
    assert all(g is not None and g.dtype == torch.float32 and g.any() for g in grads)


class Checkpointed(nn.Module):
    """Two SwiGLU blocks, each recomputed in the backward on request."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([SwiGLU(), SwiGLU()])
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.recompute:
                x = x + checkpoint(block, x, use_reentrant=False)
            else:
                x = x + block(x)
        return x


@pytest.mark.parametrize("recipe", ["training", "nvfp4"])
def test_activation_checkpointing_saves_less_and_changes_nothing(recipe):
    """Recomputation reuses the seed: gradients are equal although they are rounded by dice."""
    results = []
    for recompute in (False, True):
        model = bf16(Checkpointed())
        model.recompute = recompute
        call, backend = compiled(model, recipe=recipe, default_skip=[])
        grads = gradients(model, call, tokens_of())
        assert set(roles(backend.report).values()) == {"fp4"}
        results.append((grads, saved_bytes(call, tokens_of())))
    assert same(results[0][0], results[1][0])
    assert results[1][1] < results[0][1]


def test_gradient_accumulation_adds_the_micro_batches():
    model = bf16(MLP())
    call, backend = compiled(model)
    first, second = tokens_of(), tokens_of().flip(0)
    alone = [gradients(model, call, x) for x in (first, second)]
    gradients(model, call, first)
    both = gradients(model, call, second, zero=False)
    assert same(both, [a + b for a, b in zip(*alone, strict=True)])
    assert len(backend.reports) == 1


@pytest.mark.parametrize("train", [True, False])
def test_dynamic_batch_and_sequence_compile_once(train):
    model = bf16(MLP(bias=True))
    call, backend = compiled(model)
    static, _ = compiled(model, dynamic=False)
    for batch, length in ((2, 16), (3, 5), (4, 33), (7, 64)):
        x = tokens_of(batch=batch, length=length)
        marked = x.clone()
        torch._dynamo.mark_dynamic(marked, 0)
        torch._dynamo.mark_dynamic(marked, 1)
        if train:
            assert same(gradients(model, call, marked), gradients(model, static, x))
        else:
            with torch.no_grad():
                assert torch.equal(call(marked), static(x))
    assert len(backend.reports) == 1
    assert set(roles(backend.report).values()) == {"fp4"}


def test_decode_after_prefill_takes_the_same_plan():
    """One token is no reason to leave FP4."""
    model = bf16(MLP())
    call, backend = compiled(model, dynamic=False)
    with torch.no_grad():
        call(tokens_of(batch=1, length=16))
        call(tokens_of(batch=1, length=1))
    prefill, decode = backend.reports
    assert roles(prefill) == roles(decode) == {"up:fprop": "fp4", "down:fprop": "fp4"}


class Untied(nn.Module):
    """TiedLM with a head of its own that holds the same values, and is skipped by its name."""

    def __init__(self, tied: TiedLM) -> None:
        super().__init__()
        self.embedding, self.body = copy.deepcopy(tied.embedding), copy.deepcopy(tied.body)
        self.lm_head = nn.Linear(64, 96, bias=False)
        self.lm_head.weight = nn.Parameter(tied.embedding.weight.detach().clone())

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.body(self.embedding(tokens)))


def test_tied_weights_get_one_gradient_from_both_uses():
    """The sum of those that two weights of the same values get."""
    tied = bf16(TiedLM())
    untied = Untied(tied)
    tokens = torch.randint(96, (2, 16))
    call, backend = compiled(tied)
    shared, body = gradients(tied, call, tokens)
    assert roles(backend.report)["body:fprop"] == "fp4"
    assert roles(backend.report)[":fprop"] == "tied_head"
    call, _ = compiled(untied)
    embedding, other_body, head = gradients(untied, call, tokens)
    assert torch.equal(body, other_body) and torch.equal(shared, embedding + head)
    assert embedding.any() and head.any()


def test_frozen_parameters_stay_without_gradient():
    model = bf16(MLP(bias=True))
    model.up.weight.requires_grad_(False)
    model.down.bias.requires_grad_(False)
    call, backend = compiled(model)
    got = gradients(model, call, tokens_of())
    assert [g is None for g in got] == [True, False, False, True]
    assert "up:wgrad" not in roles(backend.report) and roles(backend.report)["down:dgrad"] == "fp4"


def test_recipes_side_by_side_do_not_mix():
    model, x = bf16(MLP()), tokens_of()
    alone = {}
    for recipe in ("inference", "nvfp4", "weight_only", "bf16"):
        torch.compiler.reset()
        call, _ = compiled(model, recipe=recipe)
        with torch.no_grad():
            alone[recipe] = call(x)
    torch.compiler.reset()
    calls = {
        recipe: torch.compile(
            model, backend="fouroversix", options={"recipe": recipe, "compiler": "eager"}
        )
        for recipe in alone
    }
    with torch.no_grad():
        for _ in range(2):
            together = {recipe: call(x) for recipe, call in calls.items()}
            assert all(torch.equal(together[recipe], alone[recipe]) for recipe in alone)
        assert torch.equal(alone["bf16"], model(x))
    assert len({tuple(out.flatten().tolist()) for out in alone.values()}) == len(alone)


def test_inference_mode_is_no_grad():
    model = bf16(MLP())
    call, backend = compiled(model)
    with torch.no_grad():
        want = call(tokens_of())
    with torch.inference_mode():
        got = call(tokens_of())
    assert torch.equal(got, want)
    assert {r.recipe for r in backend.reports} == {"inference"}
    assert set(roles(backend.report).values()) == {"fp4"}


def test_a_weight_changed_in_place_is_quantized_again():
    model = bf16(MLP())
    call, _ = compiled(model)
    with torch.no_grad():
        before = call(tokens_of())
        model.up.weight.mul_(-1)
        after = call(tokens_of())
        torch.compiler.reset()
        fresh, _ = compiled(model)
        assert torch.equal(after, fresh(tokens_of())) and not torch.equal(after, before)


def test_non_finite_activations_stay_visible():
    """A NaN or an infinity makes its whole tensor NaN, never plausible numbers."""
    model = bf16(MLP())
    call, _ = compiled(model)
    with torch.no_grad():
        assert call(tokens_of()).isfinite().all()
        for bad in (float("nan"), float("inf"), -float("inf")):
            x = tokens_of()
            x[1, 3, 5] = bad
            assert not call(x).isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float32])
def test_other_dtypes_are_left_alone_and_named(dtype):
    weight = nn.Parameter(torch.randn(64, 64).to(dtype))
    x = torch.randn(32, 64).to(dtype)

    def product(x: Tensor) -> Tensor:
        return x @ weight

    call, backend = compiled(product)
    with pytest.warns(UserWarning, match=str(dtype).removeprefix("torch.")), torch.no_grad():
        assert torch.equal(call(x), product(x))
    assert roles(backend.report) == {":fprop": "dtype"}


def test_integer_products_are_left_alone():
    a, b = torch.randint(9, (32, 64)), torch.randint(9, (64, 64))
    call, backend = compiled(torch.matmul)
    with pytest.warns(UserWarning, match="int64"):
        assert torch.equal(call(a, b), a @ b)
    assert roles(backend.report) == {":fprop": "dtype"}


@contextlib.contextmanager
def our_warnings() -> Iterator[list[warnings.WarningMessage]]:
    ours: list[warnings.WarningMessage] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield ours
    ours += [w for w in caught if type(w.message).__name__ == "FosCompileWarning"]


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x: x.relu(), "the graph has no matmul"),
        (lambda x: x @ x.mT, "batched product of two activations"),
        (nn.ReLU(), "the graph has no matmul"),
    ],
)
def test_nothing_to_quantize_warns_once_with_the_reason(function, reason):
    call, _ = compiled(function, dynamic=False)
    x = tokens_of()
    with our_warnings() as ours:
        for each in (x, x, x[:1]):  # the last is compiled again, for the same reason
            assert torch.equal(call(each), function(each))
    assert len(ours) == 1 and ours[0].filename == __file__
    assert reason in str(ours[0].message) and "quantized nothing" in str(ours[0].message)
    torch.compiler.reset()
    with our_warnings() as ours:
        torch.compile(function, backend="fouroversix", options={"compiler": "eager"})(x)
    assert len(ours) == 1


def test_a_part_without_matmul_is_no_reason_to_warn():
    """Graph breaks leave such parts: before, after and in functions that are called between."""
    model = bf16(MLP())

    def loss(y: Tensor) -> Tensor:
        return y.float().square().mean()

    def broken(x: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        y = model(x)
        torch._dynamo.graph_break()
        value = loss(y)
        torch._dynamo.graph_break()
        return value + 1

    backend = Backend(parse_options({"compiler": "eager", "strict": True}))
    with our_warnings() as ours:
        torch.compile(broken, backend=backend)(tokens_of())
    assert [len(report.sites) for report in backend.reports].count(0) >= 3
    assert len(backend.report.quantized) == 5 and not ours

    def rejected(x: Tensor) -> Tensor:
        x = x.relu()
        torch._dynamo.graph_break()
        return x @ x.mT

    with our_warnings() as ours:
        torch.compile(rejected, backend=backend)(tokens_of())
    assert len(ours) == 1 and "1x batched product" in str(ours[0].message)


def test_a_backward_that_compiled_autograd_traces_is_left_alone():
    """Its graph has no forward to tell gradients and module paths from."""
    model = bf16(MLP())
    backend = Backend(
        parse_options({"compiler": "eager", "strict": True, "skip": ["down"]}), fragment=True
    )

    def step(x: Tensor) -> None:
        model(x).float().square().mean().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(step, backend=backend)(tokens_of())
    forward, backward = (report for report in backend.reports if report.sites)
    assert "skip" in roles(forward).values() and "fp4" in roles(forward).values()
    assert set(roles(backward).values()) == {"traced_backward"}


def test_generate_with_a_static_cache():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        **sizes,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=128,
        max_position_embeddings=64,
    )
    model = bf16(transformers.LlamaForCausalLM(config)).eval()
    backend = Backend(parse_options({"compiler": "eager", "strict": True}))
    eager = model.forward
    model.forward = torch.compile(eager, backend=backend)
    prompt = torch.randint(128, (1, 7))
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "cache_implementation": "static",
        "pad_token_id": 0,
    }
    out = model.generate(
        prompt, return_dict_in_generate=True, output_logits=True, disable_compile=True, **options
    )
    assert out.sequences.shape == (1, 12)
    assert all(logits.isfinite().all() for logits in out.logits)
    # Prefill and decode at most: tokens after the first add no compilation.
    assert 1 <= len(backend.reports) <= 3
    projections = {s.path for s in backend.report.quantized}
    assert {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)} <= projections
    assert roles(backend.report)["lm_head:fprop"] == "skip"
