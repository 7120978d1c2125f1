"""A pass, a fake or a decomposition that fails costs the quantization, never the model."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, bf16, tokens_of
from torch._dynamo.utils import counters

from fos_compile import report_cache
from fos_compile.backend import Backend
from fos_compile.config import parse_options
from fos_compile.kernels.op import REGISTRY
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


def outcome(model, *, train: bool = True, **options: Any) -> tuple[list[torch.Tensor], Backend]:
    torch.compiler.reset()
    torch.manual_seed(0)
    model.zero_grad()
    backend = Backend(parse_options(options))
    x = tokens_of().requires_grad_(train)
    with torch.set_grad_enabled(train):
        y = torch.compile(model, backend=backend, fullgraph=True)(x)
    if not train:
        return [y], backend
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())], backend


def cached_graphs(folder: Path) -> set[str]:
    """Which of Inductor's caches hold something."""
    return {name for name in ("fxgraph", "aotautograd") if list(folder.glob(f"{name}/**/*"))}


@pytest.mark.parametrize("what", ["pass", "lint", "operator"])
def test_lenient_runs_the_untouched_graph(monkeypatch, what):
    model = bf16(MLP())
    want, _ = outcome(model, recipe="bf16", compiler="eager")
    names = install(monkeypatch, what)
    with our_warnings() as texts:
        got, backend = outcome(model, compiler="eager")
    assert all(map(torch.equal, got, want))
    assert len(texts) == 1 and all(name in texts[0] for name in names), texts
    assert "untouched graph" in texts[0] and "\n" not in texts[0]
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
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    return tmp_path


def test_an_untouched_graph_is_not_cached(cache):
    """The next process, where nothing fails, would get it without a word."""
    model = bf16(MLP())
    with pytest.MonkeyPatch.context() as patch, our_warnings():
        install(patch, "pass")
        untouched, _ = outcome(model, recipe="nvfp4")
    assert not cached_graphs(cache) and not list(cache.glob("fos_compile/**/*.json"))
    for compiled_before in (False, True):
        got, backend = outcome(model, recipe="nvfp4")
        assert not torch.equal(got[0], untouched[0])
        assert len(backend.report.quantized) == 6 and not backend.report.failure
        assert counters["aot_autograd"]["autograd_cache_hit"] == compiled_before
        assert cached_graphs(cache) == {"fxgraph", "aotautograd"}


def test_a_saved_failure_is_told_again(cache):
    with torch.no_grad(), our_warnings() as texts:
        first = Backend(parse_options({}))
        torch.compile(bf16(MLP()), backend=first)(tokens_of())
        (path,) = cache.glob("fos_compile/reports/*.json")
        report_cache.save(path.stem, dataclasses.replace(first.report, failure="lost"))
        assert report_cache.load(path.stem) == first.report  # failures are not saved
        path.write_text(path.read_text().replace('"failure": ""', '"failure": "broken then"'))
        torch.compiler.reset()
        torch.compile(bf16(MLP()), backend=Backend(parse_options({})))(tokens_of())
    assert len(texts) == 1 and "broken then" in texts[0]


def failing_reference(op: Any, *args: Any) -> Any:
    raise ValueError(f"{op.name} broken on purpose")


@pytest.mark.parametrize("train", [False, True])
def test_a_failing_decomposition_keeps_the_operator(monkeypatch, no_kernel, cache, train):
    """Lowering happens behind the partitioner: what is left is the eager reference, same bits.

    A later process may lower what this one could not, so nothing is cached.
    """
    model = bf16(MLP(64, 64))
    options = {"recipe": "nvfp4", "lowering": "inline", "train": train}
    want, _ = outcome(model, **options, compiler="eager")
    monkeypatch.setattr(lower, "_trace", failing_reference)
    with our_warnings() as texts:
        got, backend = outcome(model, **options)
    assert all(map(torch.equal, got, want))
    assert len(texts) == 1 + train and all("pass 'lower' at node" in each for each in texts)
    assert backend.report.failure.count("broken on purpose") == 1 + train
    assert len(backend.report.quantized) == (6 if train else 2)
    assert not cached_graphs(cache)
    with pytest.raises(Exception, match=r"PassError.*pass 'lower' at node 'amax"):
        outcome(model, **options, strict=True)


@pytest.mark.parametrize("op", ["amax", "quantize", "scaled_mm"])
def test_a_failing_fake_is_named(monkeypatch, op):
    """The metadata rule of an operator that is inserted: the model runs as it is."""
    model = bf16(MLP())
    want, _ = outcome(model, recipe="bf16", compiler="eager")
    broken = dataclasses.replace(REGISTRY[op], fake=broken_fake)
    monkeypatch.setitem(REGISTRY, op, broken)
    with our_warnings() as texts:
        got, backend = outcome(model, compiler="eager")
    assert all(map(torch.equal, got, want))
    (text,) = texts
    assert "pass 'insert' at node 'mm " in text and "broken on purpose" in text
    assert text.split(";")[0] in backend.report.failure
