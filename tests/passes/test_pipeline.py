from __future__ import annotations

from collections import Counter

import pytest
import torch
from graphs import Captured, config, text
from models import MLP, bf16, tokens_of

from fos_compile.passes import lower as lower_module
from fos_compile.passes import pipeline
from fos_compile.passes.errors import FosCompileWarning, PassError, working_on
from fos_compile.passes.lower import lower
from fos_compile.passes.pipeline import lower_graph, rewrite
from fos_compile.passes.report import PassReport


@pytest.fixture
def captured() -> Captured:
    return Captured(bf16(MLP()), tokens_of().requires_grad_())


def breaks_at_the_first_matmul(graph, config):
    for node in graph.nodes:
        if node.target is torch.ops.aten.mm.default:
            with working_on(node):
                raise ValueError("broken on purpose\nand at length")
    return PassReport(name="broken", changed=0)


def test_strict_names_pass_and_node(captured, monkeypatch):
    monkeypatch.setattr(pipeline, "REWRITE", (*pipeline.REWRITE[:2], breaks_at_the_first_matmul))
    with pytest.raises(
        PassError,
        match=r"pass 'breaks_at_the_first_matmul' at node 'mm.*broken on purpose; compile",
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


def fails_after_rewrite(*args):
    raise ValueError("too late\n" + "the whole graph\n" * 100)


@pytest.mark.parametrize("step", ["mark_inputs", "collect"])
def test_what_surrounds_the_passes_is_forgiven_too(captured, monkeypatch, step):
    before = text(captured.graph)
    owner = captured.graph.owning_module
    monkeypatch.setattr(pipeline, step, fails_after_rewrite)
    with pytest.warns(FosCompileWarning, match="too late") as caught:
        report = rewrite(captured.graph, config(strict=False))
    assert all("whole graph" not in text for text in (str(caught[0].message), report.failure))
    assert text(owner.graph) == before
    assert caught[0].filename == __file__


def test_a_graph_is_rewritten_once(captured):
    """Nested regions come again: with the facts of another graph, and with what was decided."""
    first = rewrite(captured.graph, config(skip=["down"]))
    again = captured.graph.owning_module
    copied = torch.fx.GraphModule(again, again.graph.__deepcopy__())
    before = text(copied.graph)
    second = rewrite(copied.graph, config())
    assert text(copied.graph) == before
    assert len(first.sites) == 6 and first.quantizations > 0
    assert not second.sites and second.quantizations == 0


def test_an_untouched_graph_is_not_tried_again(captured, monkeypatch):
    monkeypatch.setattr(pipeline, "REWRITE", (*pipeline.REWRITE, fails_after_rewrite))
    owner = captured.graph.owning_module
    with pytest.warns(FosCompileWarning):
        rewrite(captured.graph, config(strict=False))
    monkeypatch.undo()
    assert not rewrite(owner.graph, config()).sites


def test_every_pass_reports_its_time(captured):
    report = rewrite(captured.graph, config())
    assert [p.name for p in report.passes] == ["detect", "decide", "insert", "share"]
    assert report.pass_seconds > 0


def test_opaque_leaves_the_graph(captured):
    rewrite(captured.graph, config())
    before = text(captured.graph)
    assert lower(captured.graph, config(lowering="opaque")).changed == 0
    assert text(captured.graph) == before


def test_a_device_kernel_is_kept(captured):
    rewrite(captured.graph, config())
    lower_graph(captured.graph, config(lowering="outline"))
    kept = [str(n.target) for n in captured.graph.nodes if "scaled_mm" in str(n.target)]
    assert kept and all(target.startswith("fos.") for target in kept)


def test_outline_replaces_what_has_no_kernel(captured, no_kernel):
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


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_product_is_split_where_only_unpacking_has_a_kernel(monkeypatch, no_kernel, dynamic):
    x = tokens_of()
    if dynamic:
        torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        captured = Captured(bf16(MLP()), x, dynamic=None)
    rewrite(captured.graph, config(recipe="inference"))
    monkeypatch.setattr(lower_module, "_kernels_unpack", lambda node: True)
    lower_graph(captured.graph, config(lowering="outline"))
    captured.graph.lint()
    names = Counter(str(n.target) for n in captured.graph.nodes)
    assert names["fos.dequantize.default"] == 4 and names["aten.mm.default"] == 2
    assert not any("_mm" in name for name in names if "fos" in name)


def test_a_split_product_is_the_same(monkeypatch, no_kernel):
    """Bit for bit on a CPU, where both multiply the same float32 numbers."""
    model, x = bf16(torch.nn.Sequential(torch.nn.Linear(64, 64))), tokens_of()

    def run():
        torch.compiler.reset()
        uncached = torch._inductor.config.patch(force_disable_caches=True)
        with torch.no_grad(), uncached:
            compiled = torch.compile(model, backend="fouroversix", options={"recipe": "inference"})
            return compiled(x)

    whole = run()
    split = []
    unpack = lower_module._unpack
    monkeypatch.setattr(lower_module, "_kernels_unpack", lambda node: True)
    monkeypatch.setattr(
        lower_module, "_unpack", lambda graph, node: split.append(node) or unpack(graph, node)
    )
    assert torch.equal(run(), whole) and len(split) == 1


def test_a_product_on_a_cpu_stays_whole(captured, monkeypatch):
    """Whatever supports `dequantize` there."""
    rewrite(captured.graph, config())
    products = [n for n in captured.graph.nodes if "scaled_mm" in str(n.target)]
    assert products and not any(map(lower_module._kernels_unpack, products))


def test_outline_takes_symbolic_sizes_at_once(no_kernel):
    x = tokens_of()
    torch._dynamo.mark_dynamic(x, 1)
    with torch.no_grad():
        captured = Captured(bf16(MLP()), x, dynamic=None)
    rewrite(captured.graph, config(recipe="inference"))
    lower_graph(captured.graph, config(lowering="outline"))
    libraries = {
        (str(n.args[0]), n.target.namespace)
        for n in captured.graph.nodes
        if "quantize" in str(n.target)
    }
    weights = {library for source, library in libraries if source.startswith("arg")}
    assert weights == {"fos_outlined"}
    assert {library for _, library in libraries} - weights == {"fos_outlined_dynamic"}


def test_inline_leaves_no_operator_but_the_seed(captured, no_kernel):
    rewrite(captured.graph, config())
    report = lower(captured.graph, config(lowering="inline"))
    captured.graph.lint()
    assert {str(n.target) for n in captured.graph.nodes if "fos" in str(n.target)} == {
        "fos.seed.default"
    }
    assert report.changed > 10
    assert all("val" in n.meta for n in captured.graph.nodes if n.op == "call_function")


def test_a_failing_decomposition_is_named_and_undone(captured, no_kernel, monkeypatch):
    rewrite(captured.graph, config())
    before = text(captured.graph)
    owner = captured.graph.owning_module
    monkeypatch.setattr("fos_compile.passes.lower._trace", fails_after_rewrite)
    with pytest.raises(PassError, match="pass 'lower' at node 'amax"):
        lower_graph(captured.graph, config(lowering="inline", strict=False))
    assert text(owner.graph) == before
