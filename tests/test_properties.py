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
from fos_compile.recipes import RECIPES as NAMED

NEAREST = dataclasses.replace(TRAINING.with_options(rounding="nearest"), name="nearest")
RECIPES = {recipe.name: recipe for recipe in (INFERENCE, NEAREST, TRAINING)}
OVERRIDES = (None, "nvfp4", "inference", "weight_only", "bf16")
BATCH, LENGTH = 2, 24

BRANCHES = ("siblings", "no_grad", "lora")
KINDS = (
    "linear", "tied", "matmul", "addmm", "bmm", "einsum", "einsum_t", "weight_left", "sliced_input",
    "sliced_weight", "shared", "residual", "scores", "relu", "relu_", "add_", "merged", "buffer",
    *BRANCHES,
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
    override: str | None


class Branch(nn.Module):
    """A linear layer on a view of its own."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.view(BATCH, LENGTH, -1), self.weight)


class Block(nn.Module):
    """One step with its weights."""

    def __init__(
        self, step: Step, width: int, dtype: torch.dtype, before: list[Block], seed: int
    ) -> None:
        super().__init__()
        self.step = step
        self.width, shapes = _shapes(step, width)
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            data = (torch.randn(shape, generator=generator) / 8).to(dtype)
            if name == "b" and step.kind == "addmm" and step.beta == 0:
                data.fill_(torch.nan)  # must not be read
            if step.kind == "buffer":
                self.register_buffer(name, data)
            elif step.kind in BRANCHES:
                frozen = name == "left" and (step.frozen or step.kind == "lora")
                setattr(self, name, Branch(nn.Parameter(data, not frozen)))
            else:
                setattr(self, name, nn.Parameter(data, not step.frozen))
        if step.kind == "tied":
            earlier = [w for block in before for n, w in block.named_parameters() if n == "w"]
            self.w = next((w for w in earlier if w.shape == self.w.shape), self.w)

    def forward(self, x: Tensor) -> Tensor:
        return _apply(self, self.step, x).reshape(BATCH * LENGTH, -1)


class Program(nn.Module):
    """Runs steps; every step that needs a weight owns one, except the tied."""

    def __init__(self, steps: list[Step], width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.steps = nn.ModuleList()
        for index, step in enumerate(steps):
            block = Block(step, width, dtype, list(self.steps), seed=len(steps) + index)
            self.steps.append(block)
            width = block.width

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(BATCH * LENGTH, -1)
        for step in self.steps:
            x = step(x)
        return x

    def overrides(self) -> dict[str, str]:
        """Glob to recipe: of the left branch where there is one, so that siblings differ."""
        named = ((n, b) for n, b in self.named_modules() if isinstance(b, Block))
        return {
            f"{name}.left" if block.step.kind in BRANCHES else name: block.step.override
            for name, block in named
            if block.step.override
        }


def _shapes(step: Step, width: int) -> tuple[int, dict[str, tuple[int, ...]]]:
    """(width of the result, shapes of the weights)."""
    out = step.width
    bias = {"b": (out,)} if step.bias else {}
    match step.kind:
        case "linear" | "tied" | "relu_":
            return out, {"w": (out, width)} | bias
        case "shared" | "einsum_t" | "weight_left" | "add_" | "buffer":
            return out, {"w": (out, width)}
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
        case "merged":
            return out, {"w": (out, width), "u": (out, 16), "v": (16, width)}
        case "siblings" | "no_grad":
            return out, {"left": (out, width), "right": (out, width)}
        case "lora":
            return out, {"left": (out, width), "down": (16, width), "up": (out, 16)}
    return width, {}


def _apply(block: Any, step: Step, x: Tensor) -> Tensor:
    batched = x.view(BATCH, LENGTH, -1)
    linear = nn.functional.linear
    match step.kind:
        case "linear" | "tied":
            return linear(batched, block.w, getattr(block, "b", None))
        case "relu_":
            return linear(batched, block.w, getattr(block, "b", None)).relu_()
        case "add_":
            return linear(batched, block.w).add_(0.5)
        case "buffer":
            return linear(batched, block.w)
        case "matmul":
            return torch.matmul(x, block.w)
        case "addmm":
            return torch.addmm(block.b, x, block.w, alpha=step.alpha, beta=step.beta)
        case "bmm":
            return torch.bmm(batched, block.w)
        case "einsum":
            return torch.einsum("bik,kn->bin", batched, block.w)
        case "einsum_t":
            return torch.einsum("mk,nk->mn", x, block.w)
        case "weight_left":
            return (block.w @ x.t()).t().contiguous()
        case "sliced_input":
            return linear(x[:, :64], block.w)
        case "sliced_weight":
            return linear(x, block.w[32:96])
        case "shared":
            return linear(x, block.w) + linear(x, block.w * 0.5)
        case "merged":
            return linear(x, block.w + block.u @ block.v)
        case "residual":
            return x + x.relu()
        case "scores":
            return (x @ x.t()) @ x / 64
        case "siblings":
            return block.left(x) + block.right(x)
        case "no_grad":
            with torch.no_grad():
                target = block.left(x)
            return block.right(x) - target
        case "lora":
            return block.left(x) + block.up(block.down(x))
    return x.relu()


STEPS = st.lists(
    st.builds(
        Step,
        kind=st.sampled_from(KINDS),
        width=st.sampled_from((64, 96, 128)),
        bias=st.booleans(),
        frozen=st.sampled_from((False, False, False, True)),
        alpha=st.sampled_from((1, 0.5, 2)),
        beta=st.sampled_from((1, -0.5, 0)),
        override=st.sampled_from((None, *OVERRIDES)),
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
    x = torch.randn(BATCH, LENGTH, 128, generator=generator).to(dtype).requires_grad_(x_grad)
    untouched = _run(program, program, x)
    overrides = {name: NAMED[recipe] for name, recipe in program.overrides().items()}
    with Quantized(program, recipe, overrides) as by_hand:
        want = _run(program, program, x, by_hand)
    torch.compiler.reset()
    options = {"recipe": recipe, "compiler": compiler, "strict": True, "min_weight_dim": 0}
    backend = Backend(parse_options({**options, "overrides": overrides}), fragment=True)
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
@settings(max_examples=20, **COMMON)
@given(steps=STEPS, dtype=st.sampled_from((torch.bfloat16, torch.float16)), x_grad=st.booleans())
def test_rewritten_graph_is_the_calls_by_hand(recipe, steps, dtype, x_grad):
    check(steps, dtype, RECIPES[recipe], x_grad, "eager")


@needs_exact_inductor
@settings(max_examples=2, **COMMON)
@given(steps=STEPS, dtype=st.sampled_from((torch.bfloat16, torch.float16)))
def test_inductor_computes_the_calls_by_hand(steps, dtype):
    check(steps, dtype, TRAINING, True, "inductor")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_kind_of_step_by_itself(kind, frozen):
    """What the random programs may miss; the second matmul makes the first one's input a node."""
    step = Step(kind, 96, bias=True, frozen=frozen, alpha=0.5, beta=-0.5, override=None)
    first = dataclasses.replace(step, kind="linear", width=128)
    check([first, step], torch.bfloat16, TRAINING, True, "eager")


@pytest.mark.parametrize("kind", BRANCHES)
@pytest.mark.parametrize("override", OVERRIDES[1:])
def test_siblings_with_recipes_of_their_own(kind, override):
    step = Step(kind, 96, bias=False, frozen=False, alpha=1, beta=1, override=override)
    check([step], torch.bfloat16, TRAINING, True, "eager")


@pytest.mark.parametrize("alpha", [1, 2])
def test_an_addend_with_beta_zero_is_not_read(alpha):
    step = Step("addmm", 96, bias=False, frozen=False, alpha=alpha, beta=0, override=None)
    check([step], torch.bfloat16, TRAINING, True, "eager")
