"""What surrounds a model in practice: none of it breaks the graph, recompiles or changes bits."""

from __future__ import annotations

import warnings
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


def test_tied_weights_get_one_gradient_from_both_uses():
    model = bf16(TiedLM())
    call, backend = compiled(model)
    tokens = torch.randint(96, (2, 16))
    want = gradients(model, model, tokens)
    got = gradients(model, call, tokens)
    assert (
        roles(backend.report)["body:fprop"] == "fp4"
        and roles(backend.report)[":fprop"] == "tied_head"
    )
    assert [g is None for g in got] == [g is None for g in want]
    untouched = (model.embedding.weight.grad != 0).any(1)
    assert untouched.all()  # rows that no token looked up get theirs from the head


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


@pytest.mark.parametrize(
    "function, reason",
    [
        (lambda x: x.relu(), "the graph has no matmul"),
        (lambda x: x @ x.mT, "batched product of two activations"),
    ],
)
def test_nothing_to_quantize_warns_once_with_the_reason(function, reason):
    call, _ = compiled(function)
    x = tokens_of()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(call(x), function(x))
    ours = [str(w.message) for w in caught if type(w.message).__name__ == "FosCompileWarning"]
    assert len(ours) == 1 and reason in ours[0] and "quantized nothing" in ours[0]


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
