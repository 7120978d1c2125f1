"""Through Inductor: modes, passes of the user, and the same bits from every lowering."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from models import MLP, SwiGLU, bf16, needs_exact_inductor, tokens_of
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import CustomGraphPass

from fos_compile.backend import Backend
from fos_compile.config import parse_options
from fos_compile.kernels.cpu import build


def compiled(model: nn.Module, *, dynamic: bool, **options: Any) -> tuple[Any, Backend]:
    torch.compiler.reset()
    backend = Backend(parse_options({"strict": True, **options}))
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic), backend


def run(
    model: nn.Module, x: Tensor, *, train: bool, **options: Any
) -> tuple[list[Tensor], Backend]:
    torch.compiler.reset()
    torch.manual_seed(6)
    model.zero_grad()
    backend = Backend(parse_options({"strict": True, **options}))
    call = torch.compile(model, backend=backend, fullgraph=True)
    if not train:
        with torch.no_grad():
            return [call(x)], backend
    out = call(x)
    out.backward(torch.ones_like(out) / 8)
    return [out.detach(), *(p.grad.clone() for p in model.parameters())], backend


def linear() -> nn.Module:
    return bf16(nn.Sequential(nn.Linear(64, 64, bias=True)))


@needs_exact_inductor
def test_inductor_gives_the_bits_of_eager():
    """Norms, residuals and SwiGLU around the quantizers, forward and backward."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(64)
            self.mlp = SwiGLU()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    model = bf16(Block())
    x = tokens_of()
    want, _ = run(model, x, train=True, compiler="eager")
    got, backend = run(model, x, train=True)
    assert len(backend.report.quantized) == 9
    names = ["out", *(name for name, _ in model.named_parameters())]
    differ = [n for n, a, b in zip(names, want, got, strict=True) if not torch.equal(a, b)]
    assert differ == []


@pytest.mark.parametrize("recipe", ["inference", "weight_only"])
@pytest.mark.parametrize("lowering", ["outline", "opaque"])
def test_lowerings_have_the_same_bits(no_kernel, recipe, lowering):
    x = tokens_of()
    want, _ = run(linear(), x, train=False, recipe=recipe, compiler="eager")
    got, backend = run(linear(), x, train=False, recipe=recipe, lowering=lowering)
    assert torch.equal(*want, *got)
    (site,) = backend.report.quantized
    assert "kernel" not in site.implementation


@pytest.mark.slow
@needs_exact_inductor
@pytest.mark.parametrize(
    "recipe, lowering",
    [("inference", "inline"), ("nvfp4", "outline"), ("nvfp4", "inline"), ("training", "opaque")],
)
def test_lowerings_have_the_same_bits_forward_and_backward(no_kernel, recipe, lowering):
    x = tokens_of().requires_grad_()
    want, _ = run(linear(), x, train=True, recipe=recipe, compiler="eager")
    got, _ = run(linear(), x, train=True, recipe=recipe, lowering=lowering)
    assert all(map(torch.equal, want, got))


@needs_exact_inductor
def test_inlined_quantizer_has_the_same_bits(no_kernel):
    """Behind a producer that Inductor fuses with it; static_6 keeps the compile short."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            # A factor, no summand: eager CPU rounds an added scalar to bf16, Inductor does not.
            return self.inner((x * 1.7).relu() * x)

    x = tokens_of()
    options = {"recipe": "inference", "scale_rule": "static_6"}
    want, _ = run(bf16(Scaled()), x, train=False, compiler="eager", **options)
    got, _ = run(bf16(Scaled()), x, train=False, lowering="inline", **options)
    assert torch.equal(*want, *got)


def test_the_kernel_and_the_reference_have_the_same_bits(request):
    if not build.status():
        pytest.skip(str(build.status()))
    model, x = bf16(MLP()), tokens_of()
    kernel, backend = run(model, x, train=True, compiler="eager")
    assert all("(kernel)" in s.implementation for s in backend.report.quantized)
    request.getfixturevalue("no_kernel")
    reference, backend = run(model, x, train=True, compiler="eager")
    assert all("(decomposition)" in s.implementation for s in backend.report.quantized)
    assert all(map(torch.equal, kernel, reference))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_as_option(mode):
    x = tokens_of()
    want, _ = run(linear(), x, train=False)
    got, backend = run(linear(), x, train=False, mode=mode)
    assert torch.equal(*want, *got) and len(backend.report.quantized) == 1
    assert backend.config.mode == mode


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_as_keyword(mode):
    x = tokens_of()
    want, _ = run(linear(), x, train=False)
    torch.compiler.reset()
    with torch.no_grad():
        call = torch.compile(linear(), backend="fouroversix", mode=mode)
        assert torch.equal(call(x), *want) and torch.equal(call(x), *want)


def test_modes_and_exactness_become_inductor_options():
    patches = parse_options({"mode": "max-autotune", "inductor": {"max_autotune": False}})
    patches = patches.inductor_patches()
    assert patches["triton.cudagraphs"] and patches["coordinate_descent_tuning"]
    assert patches["max_autotune"] is False  # what the user names wins over the mode
    assert patches["emulate_precision_casts"]
    assert "emulate_precision_casts" not in parse_options({"exact": False}).inductor_patches()


class Recorder(CustomGraphPass):
    """A user's pass; remembers which of our operators it saw."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append(sum("fos." in str(node.target) for node in graph.nodes))

    def uuid(self) -> str:
        return "recorder"


@pytest.mark.parametrize("place", ["global", "option"])
def test_passes_of_the_user_keep_running(place):
    joint, post = Recorder(), Recorder()
    theirs = {
        "joint_custom_pre_pass": joint,
        "post_grad_custom_pre_pass": post,
        "fx_graph_cache": False,
    }
    model, x = linear(), tokens_of()
    if place == "option":
        run(model, x, train=False, inductor=theirs)
    else:
        with torch._inductor.config.patch(theirs):
            run(model, x, train=False)
    assert joint.seen and joint.seen[0] > 0  # after our rewriting
    assert post.seen and post.seen[0] > 0  # before our lowering


@needs_exact_inductor
def test_dynamic_sizes_compile_once_through_inductor():
    model = bf16(MLP())
    static, _ = compiled(model, dynamic=False, compiler="eager")
    call, backend = compiled(model, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 16), (3, 5), (4, 33)):
            x = tokens_of(batch=batch, length=length)
            assert torch.equal(call(x), static(x)), (batch, length)
    assert len(backend.reports) == 1 and len(backend.report.quantized) == 2


def test_a_dynamic_graph_compiles_its_quantizers_once(no_kernel):
    """Outlined: at the first length; more lengths, and more layers, compile nothing."""
    model = bf16(MLP(64, 64))
    call, backend = compiled(model, dynamic=True, scale_rule="static_6", recipe="inference")
    counts = []
    with torch.no_grad():
        for length in (17, 18, 24, 40):
            before = counters["stats"]["unique_graphs"]
            assert call(tokens_of(length=length)).isfinite().all()
            counts.append(counters["stats"]["unique_graphs"] - before)
    assert counts[0] > 0 and counts[1:] == [0, 0, 0], counts
    assert len(backend.reports) == 1


@needs_exact_inductor
def test_autocast_trains_through_inductor():
    model = bf16(nn.Sequential(nn.Linear(64, 64))).float()
    x = tokens_of().float()
    with torch.autocast("cpu", torch.bfloat16):
        want, _ = run(model, x, train=True, compiler="eager")
        got, backend = run(model, x, train=True)
    assert len(backend.report.quantized) == 2
    assert all(map(torch.equal, want, got))
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32]
    assert all(g.any() for g in got)


class Regions(nn.Module):
    """Two uses of a region with its own graph, and a layer outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)

    @torch.compiler.nested_compile_region
    def region(self, x: Tensor) -> Tensor:
        return self.inner(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.region(x) + self.region(x * 2))


class Branches(nn.Module):
    """Two branches of which data decides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        run = lambda x: self.inner(x)  # noqa: E731
        return torch.cond(x.sum() > 0, run, lambda x: run(x) * 2, (x,))


@needs_exact_inductor
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("model", [Regions, Branches])
def test_nested_graphs_are_rewritten_and_reported_once(model, train):
    """Inductor shows them to the passes several times; strict fails on the slightest trouble."""
    model, x = bf16(model()), tokens_of().requires_grad_(train)
    plain, _ = run(model, x, train=train, compiler="eager", recipe="bf16")
    want, eager = run(model, x, train=train, compiler="eager")
    got, backend = run(model, x, train=train)
    assert torch.equal(want[0], got[0]) and not torch.equal(got[0], plain[0])
    sites = [
        [(s.path, s.role, s.shape, s.reason) for s in b.report.sites] for b in (eager, backend)
    ]
    assert sorted(sites[0]) == sorted(sites[1])
    assert eager.report.quantizations == backend.report.quantizations
    assert {s.path for s in backend.report.quantized} == {n for n, _ in model.named_children()}
    if isinstance(model, Regions):
        # The region's graph once, however often it runs.
        roles = Counter(s.role for s in backend.report.quantized)
        assert roles == ({"fprop": 2, "dgrad": 2, "wgrad": 2} if train else {"fprop": 2})
