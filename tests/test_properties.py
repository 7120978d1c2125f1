"""Random small models: the rewritten graph computes what the same FP4 calls by hand compute."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import needs_exact_inductor
from reference_model import Quantized
from torch import Tensor, nn

from fos_compile.backend import Backend
from fos_compile.config import parse_options
from fos_compile.passes.recipe import Recipe
from fos_compile.recipes import INFERENCE, TRAINING

NEAREST = dataclasses.replace(TRAINING.with_options(rounding="nearest"), name="nearest")
RECIPES = {recipe.name: recipe for recipe in (INFERENCE, NEAREST, TRAINING)}
BATCH, LENGTH = 2, 24

KINDS = (
    "linear", "tied", "matmul", "addmm", "bmm", "einsum", "einsum_t", "weight_left", "sliced_input",
    "sliced_weight", "shared", "residual", "scores", "relu",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Step:
    """One operation on the running activation [BATCH * LENGTH, width]."""

    kind: str
    width: int
    bias: bool
    frozen: bool
    alpha: float
    beta: float


class Program(nn.Module):
    """Runs steps; every step that needs a weight owns one, except the tied."""

    def __init__(self, steps: list[Step], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.steps = steps
        self.weights = nn.ParameterDict()
        self.owner: dict[int, str] = {}
        generator = torch.Generator().manual_seed(len(steps))
        for index, step in enumerate(steps):
            out, shapes = _shapes(step, width)
            previous = [n for n, w in self.weights.items() if w.shape == (out, width)]
            if step.kind == "tied" and previous:
                self.owner[index] = previous[0]
                shapes = {}
            else:
                self.owner[index] = f"w{index}"
            for name, shape in shapes.items():
                data = torch.randn(shape, generator=generator) / 8
                self.weights[f"{name}{index}"] = nn.Parameter(data.to(dtype), not step.frozen)
            width = out

    def forward(self, x: Tensor) -> Tensor:
        for index, step in enumerate(self.steps):
            weight = self.weights[self.owner[index]] if self.owner[index] in self.weights else None
            bias = self.weights[f"b{index}"] if f"b{index}" in self.weights else None
            x = _apply(step, x, weight, bias)
        return x


def _shapes(step: Step, width: int) -> tuple[int, dict[str, tuple[int, ...]]]:
    """(width of the result, shapes of weight ``w`` and bias ``b``)."""
    out = step.width
    bias = {"b": (out,)} if step.bias else {}
    match step.kind:
        case "linear" | "tied" | "shared" | "einsum_t" | "weight_left":
            return out, {"w": (out, width)} | (bias if step.kind in ("linear", "tied") else {})
        case "matmul" | "einsum":
            return out, {"w": (width, out)}
        case "addmm":
            return out, {"w": (width, out), "b": (out,) if step.bias else (BATCH * LENGTH, out)}
        case "bmm":
            return out, {"w": (BATCH, width, out)}
        case "sliced_input":
            return out, {"w": (out, 64)}
        case "sliced_weight":
            return 64, {"w": (out + 64, width)}
    return width, {}


def _apply(step: Step, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    batched = x.view(BATCH, LENGTH, -1)
    match step.kind:
        case "linear" | "tied":
            return nn.functional.linear(batched, w, b).view(BATCH * LENGTH, -1)
        case "matmul":
            return torch.matmul(x, w)
        case "addmm":
            return torch.addmm(b, x, w, alpha=step.alpha, beta=step.beta)
        case "bmm":
            return torch.bmm(batched, w).view(BATCH * LENGTH, -1)
        case "einsum":
            return torch.einsum("bik,kn->bin", batched, w).reshape(BATCH * LENGTH, -1)
        case "einsum_t":
            return torch.einsum("mk,nk->mn", x, w)
        case "weight_left":
            return (w @ x.t()).t()
        case "sliced_input":
            return nn.functional.linear(x[:, :64], w)
        case "sliced_weight":
            return nn.functional.linear(x, w[32:96])
        case "shared":
            return nn.functional.linear(x, w) + nn.functional.linear(x, w * 0.5)
        case "residual":
            return x + x.relu()
        case "scores":
            return (x @ x.t()) @ x / 64
    return x.relu()


STEPS = st.lists(
    st.builds(
        Step,
        kind=st.sampled_from(KINDS),
        width=st.sampled_from((64, 96, 128)),
        bias=st.booleans(),
        frozen=st.sampled_from((False, False, False, True)),
        alpha=st.sampled_from((1, 0.5, 2)),
        beta=st.sampled_from((1, -0.5)),
    ),
    min_size=1,
    max_size=4,
)


def _run(program: Program, call: Any, x: Tensor, mode: Quantized | None = None) -> list[Any]:
    """Output and the gradients of x and of every weight, from the same dice."""
    torch.manual_seed(7)
    program.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    out = call(x)
    if out.requires_grad:
        tangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
        if mode is not None:
            mode.backward = True
            mode.kinds[tangent.untyped_storage().data_ptr()] = "gradient"
        out.backward(tangent)
    return [out.detach(), x.grad, *(p.grad for p in program.parameters())]


def check(
    steps: list[Step], dtype: torch.dtype, recipe: Recipe, x_grad: bool, compiler: str
) -> None:
    program = Program(steps, 128, dtype)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH * LENGTH, 128, generator=generator).to(dtype).requires_grad_(x_grad)
    untouched = _run(program, program, x)
    with Quantized(program, recipe) as by_hand:
        want = _run(program, program, x, by_hand)
    torch.compiler.reset()
    options = {"recipe": recipe, "compiler": compiler, "strict": True, "min_weight_dim": 0}
    backend = Backend(parse_options(options), fragment=True)
    got = _run(program, torch.compile(program, backend=backend, fullgraph=True, dynamic=False), x)
    assert len(backend.report.quantized) == by_hand.products
    names = ["output", "x", *(name for name, _ in program.named_parameters())]
    for name, plain, a, b in zip(names, untouched, got, want, strict=True):
        assert (a is None) == (b is None) == (plain is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            assert torch.equal(a, b), (
                f"{name}: {(a != b).sum()} of {a.numel()} differ\n{backend.report}"
            )


COMMON = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@settings(max_examples=10, **COMMON)
@given(steps=STEPS, dtype=st.sampled_from((torch.bfloat16, torch.float16)), x_grad=st.booleans())
def test_rewritten_graph_is_the_calls_by_hand(recipe, steps, dtype, x_grad):
    check(steps, dtype, RECIPES[recipe], x_grad, "eager")


@needs_exact_inductor
@settings(max_examples=2, **COMMON)
@given(steps=STEPS, dtype=st.sampled_from((torch.bfloat16, torch.float16)))
def test_inductor_computes_the_calls_by_hand(steps, dtype):
    check(steps, dtype, TRAINING, True, "inductor")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_step_by_itself(kind):
    """What the random programs may miss; the second matmul makes the first one's input a node."""
    step = Step(kind=kind, width=96, bias=True, frozen=False, alpha=0.5, beta=-0.5)
    first = dataclasses.replace(step, kind="linear", width=128)
    check([first, step], torch.bfloat16, TRAINING, True, "eager")
