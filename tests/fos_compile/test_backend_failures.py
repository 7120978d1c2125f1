"""A pass, a fake or a decomposition that fails costs the quantization, never the model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import MLP, bf16, tokens_of

from fos_compile.backend import Backend
from fos_compile.config import parse_options
from fos_compile.kernels.cpu import build
from fos_compile.kernels.op import REGISTRY, Status
from fos_compile.passes import insert, lower, pipeline
from fos_compile.passes.report import PassReport


def fails_in_the_middle(graph, config):
    """A pass that has already changed the graph when it fails."""
    report = insert.insert(graph, config)
    assert report.changed
    raise ValueError("broken on purpose")


def broken_fake(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("broken on purpose")


def breaks_the_graph(graph, config):
    """Reports success and leaves a node before what it reads: only lint can tell."""
    calls = (n for n in graph.nodes if n.op == "call_function")
    reader = next(n for n in calls if any(i.op == "call_function" for i in n.all_input_nodes))
    next(i for i in reader.all_input_nodes if i.op == "call_function").prepend(reader)
    return PassReport(name="breaks_the_graph", changed=1)


def install(monkeypatch: pytest.MonkeyPatch, what: str) -> tuple[str, str]:
    """Break one thing; returns the names of the pass and node that the error must give."""
    if what == "pass":
        broken = (*pipeline.REWRITE[:2], fails_in_the_middle, *pipeline.REWRITE[3:])
        monkeypatch.setattr(pipeline, "REWRITE", broken)
        return "pass 'fails_in_the_middle'", "broken on purpose"
    if what == "lint":
        monkeypatch.setattr(pipeline, "REWRITE", (*pipeline.REWRITE, breaks_the_graph))
        return "pass 'breaks_the_graph'", "before it has been defined"
    # The operator as the pass sees it: everything but its metadata rule works.
    real = insert.call

    def call(graph, target, args, kwargs=None, *, like):
        if target is torch.ops.fos.scaled_mm.default:
            broken_fake()
        return real(graph, target, args, kwargs, like=like)

    monkeypatch.setattr(insert, "call", call)
    return "pass 'insert' at node 'mm", "broken on purpose"


@contextlib.contextmanager
def our_warnings() -> Iterator[list[str]]:
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if type(w.message).__name__ == "FosCompileWarning"]


def outcome(model, **options: Any) -> tuple[list[torch.Tensor], Backend]:
    torch.compiler.reset()
    torch.manual_seed(0)
    model.zero_grad()
    backend = Backend(parse_options(options))
    x = tokens_of().requires_grad_()
    y = torch.compile(model, backend=backend, fullgraph=True)(x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())], backend


@pytest.mark.parametrize("what", ["pass", "lint", "operator"])
def test_lenient_runs_the_untouched_graph(monkeypatch, what):
    model = bf16(MLP())
    want, _ = outcome(model, recipe="bf16", compiler="eager")
    names = install(monkeypatch, what)
    with our_warnings() as texts:
        got, backend = outcome(model, compiler="eager")
    assert all(map(torch.equal, got, want))
    assert len(texts) == 1 and all(name in texts[0] for name in names), texts
    assert "untouched graph" in texts[0]
    assert all(name in backend.report.failure for name in names)
    assert not backend.report.quantized and "left untouched" in str(backend.report)


@pytest.mark.parametrize("what", ["pass", "lint", "operator"])
def test_strict_raises_with_pass_and_node(monkeypatch, what):
    names = install(monkeypatch, what)
    with pytest.raises(Exception, match="PassError") as caught:
        outcome(bf16(MLP()), compiler="eager", strict=True)
    assert all(name in str(caught.value) for name in names)


def test_lenient_runs_the_untouched_graph_through_inductor(monkeypatch):
    model = bf16(MLP())
    fresh = {"fx_graph_cache": False}
    want, _ = outcome(model, recipe="bf16", inductor=fresh)
    install(monkeypatch, "pass")
    with our_warnings() as texts:
        got, backend = outcome(model, inductor=fresh)
    assert all(map(torch.equal, got, want)) and len(texts) == 1
    assert "broken on purpose" in backend.report.failure


@pytest.fixture
def no_kernel(monkeypatch):
    monkeypatch.setattr(build, "library", lambda: Status("off for this test"))


def failing_reference(op: Any, *args: Any) -> Any:
    raise ValueError(f"{op.name} broken on purpose")


def test_a_failing_decomposition_keeps_the_operator(monkeypatch, no_kernel):
    """Lowering happens behind the partitioner: what is left is the eager reference, same bits."""
    model = bf16(MLP(64, 64))
    options = {"recipe": "inference", "inductor": {"fx_graph_cache": False}}
    call_options = {"compiler": "eager", "recipe": "inference"}
    with torch.no_grad():
        torch.compiler.reset()
        want = torch.compile(model, backend="fouroversix", options=call_options)(tokens_of())
        monkeypatch.setattr(lower, "_trace", failing_reference)
        torch.compiler.reset()
        with our_warnings() as texts:
            lenient = Backend(parse_options({**options, "lowering": "inline"}))
            got = torch.compile(model, backend=lenient)(tokens_of())
        assert torch.equal(got, want)
        assert len(texts) == 1 and "pass 'lower' at node" in texts[0]
        assert "broken on purpose" in texts[0]
        strict = Backend(parse_options({**options, "lowering": "inline", "strict": True}))
        torch.compiler.reset()
        with pytest.raises(Exception, match=r"PassError.*pass 'lower' at node 'amax"):
            torch.compile(model, backend=strict)(tokens_of())


def test_a_failing_fake_is_named(monkeypatch):
    """The registered fake, through the dispatcher, not only the pass's own helper."""
    assert REGISTRY["quantize"].fake is not broken_fake
    monkeypatch.setattr("fos_compile.kernels.quantize._spec", broken_fake)
    with our_warnings() as texts:
        outcome(bf16(MLP()), compiler="eager")
    assert len(texts) == 1 and "pass 'insert' at node 'mm" in texts[0]
