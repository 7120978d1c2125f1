from __future__ import annotations

import warnings

import pytest
import torch
from graphs import Captured, config, text
from models import MLP, bf16, tokens_of

from fos_compile.passes import pipeline
from fos_compile.passes.errors import PassError, working_on
from fos_compile.passes.lower import lower
from fos_compile.passes.pipeline import FosCompileWarning, lower_graph, rewrite
from fos_compile.passes.report import PassReport


@pytest.fixture
def captured() -> Captured:
    return Captured(bf16(MLP()), tokens_of().requires_grad_())


def breaks_at_the_first_matmul(graph, config):
    for node in graph.nodes:
        if node.target is torch.ops.aten.mm.default:
            with working_on(node):
                graph.erase_node(node.next) if not node.next.users else None
                raise ValueError("broken on purpose")
    return PassReport(name="broken", changed=0)


def test_strict_names_pass_and_node(captured, monkeypatch):
    monkeypatch.setattr(pipeline, "REWRITE", (*pipeline.REWRITE[:2], breaks_at_the_first_matmul))
    with pytest.raises(
        PassError, match=r"pass 'breaks_at_the_first_matmul' at node 'mm.*broken on purpose"
    ):
        rewrite(captured.graph, config(strict=True))


def test_lenient_puts_the_graph_back_and_says_so(captured, monkeypatch):
    before = text(captured.graph)
    owner = captured.graph.owning_module
    monkeypatch.setattr(
        pipeline, "REWRITE", (*pipeline.REWRITE, breaks_at_the_first_matmul, fails_after_rewrite)
    )
    with pytest.warns(FosCompileWarning, match="fails_after_rewrite"):
        report = rewrite(captured.graph, config(strict=False))
    assert "fails_after_rewrite" in report.failure
    assert text(owner.graph) == before


def fails_after_rewrite(graph, config):
    raise ValueError("too late")


def test_every_pass_reports_its_time(captured):
    report = rewrite(captured.graph, config())
    assert [p.name for p in report.passes] == ["detect", "decide", "insert", "share"]
    assert report.pass_seconds > 0


def test_opaque_leaves_the_graph(captured):
    rewrite(captured.graph, config())
    before = text(captured.graph)
    assert lower(captured.graph, config(lowering="opaque")).changed == 0
    assert text(captured.graph) == before


def without_cpu_kernel(monkeypatch):
    from fos_compile.kernels.cpu import build
    from fos_compile.kernels.op import Status

    monkeypatch.setattr(build, "library", lambda: Status("off for this test"))


def test_a_device_kernel_is_kept(captured):
    rewrite(captured.graph, config())
    lower_graph(captured.graph, config(lowering="outline"))
    kept = [str(n.target) for n in captured.graph.nodes if "scaled_mm" in str(n.target)]
    assert kept and all(target.startswith("fos.") for target in kept)


def test_outline_replaces_what_has_no_kernel(captured, monkeypatch):
    without_cpu_kernel(monkeypatch)
    rewrite(captured.graph, config())
    lower_graph(captured.graph, config(lowering="outline"))
    targets = {str(n.target) for n in captured.graph.nodes if "fos" in str(n.target)}
    assert targets == {
        "fos.seed.default",
        "fos_outlined.amax.default",
        "fos_outlined.quantize.default",
        "fos_outlined.quantize_pair.default",
        "fos_outlined.scaled_mm.default",
    }


def test_inline_leaves_no_operator_but_the_seed(captured, monkeypatch):
    without_cpu_kernel(monkeypatch)
    rewrite(captured.graph, config())
    report = lower(captured.graph, config(lowering="inline"))
    captured.graph.lint()
    assert {str(n.target) for n in captured.graph.nodes if "fos" in str(n.target)} == {
        "fos.seed.default"
    }
    assert report.changed > 10
    assert all("val" in n.meta for n in captured.graph.nodes if n.op == "call_function")


def test_a_failing_decomposition_falls_back(captured, monkeypatch):
    without_cpu_kernel(monkeypatch)
    rewrite(captured.graph, config())
    before = text(captured.graph)
    owner = captured.graph.owning_module
    monkeypatch.setattr("fos_compile.passes.lower._trace", fails_after_rewrite)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lower_graph(captured.graph, config(lowering="inline", strict=False))
    assert any("pass 'lower' at node" in str(w.message) for w in caught)
    assert text(owner.graph) == before
    with pytest.raises(PassError, match="pass 'lower' at node"):
        lower_graph(owner.graph, config(lowering="inline", strict=True))
