"""The ``fouroversix`` backend of ``torch.compile``.

Dynamo hands over a graph; AOTAutograd traces it with its backward; our passes rewrite the joint (or
inference) graph; the partitioner cuts it; our lowering runs on the pieces; Inductor compiles them.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

import fos_compile.kernels
import fos_compile.passes
from fos_compile import report_cache
from fos_compile.config import BackendConfig, parse_options
from fos_compile.kernels.op import no_kernel
from fos_compile.passes.detect import module_path
from fos_compile.passes.pipeline import FosCompileWarning, lower_graph, rewrite
from fos_compile.passes.provenance import is_tangent, mark_parameters
from fos_compile.passes.report import Report, merge

log = logging.getLogger("fos_compile")
CompiledGraph = Callable[..., Any]


def fouroversix(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> CompiledGraph:
    """The registered backend: ``torch.compile(model, backend="fouroversix", options={...})``.

    ``options`` are the fields of :class:`~fos_compile.config.BackendConfig`; torch.compile passes
    either ``options`` or ``mode``, never both.
    """
    return Backend(parse_options(options, mode))(gm, example_inputs)


class Backend:
    """A backend with its configuration, which also collects the Report of every graph it compiled.

    ``torch.compile(model, backend=Backend(config))`` is the string form with access to ``report``.
    A ``fragment`` is one of several graphs of a larger function, where a graph without a matmul is
    nothing to warn about.
    """

    def __init__(self, config: BackendConfig, *, fragment: bool = False) -> None:
        self.config = config
        self.fragment = fragment
        self.reports: list[Report] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> CompiledGraph:
        """Compile one Dynamo graph; called by torch.compile."""
        passes = GraphPasses(self.config, gm, example_inputs)
        key = report_cache.key(gm, example_inputs, passes.uuid)
        # compile_fx owns and changes gm; a cache hit needs the original to explain itself.
        original = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        original.meta = dict(gm.meta)
        compile_graph = {"inductor": _compile_inductor, "eager": _compile_eager}[
            self.config.compiler
        ]
        compiled = compile_graph(gm, example_inputs, passes)
        if passes.report is not None:
            report = passes.report
            report_cache.save(key, report)
        else:  # AOTAutograd found the compiled graph on disk and never ran the passes
            report = report_cache.load(key) or trace(original, example_inputs, self.config)
        self.reports.append(report)
        if not self.fragment:
            _warn_if_nothing_quantized(report)
        return compiled

    @property
    def report(self) -> Report:
        """The reports of all graphs, merged; graph breaks and recompilations give several."""
        return merge(self.reports)


class GraphPasses:
    """Our passes bound to one Dynamo graph: its parameters, its cache key and then its Report."""

    def __init__(
        self, config: BackendConfig, gm: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> None:
        self.config = config
        self.parameters = {
            index: node.name
            for index, (node, example) in enumerate(
                zip(_placeholders(gm), example_inputs, strict=True)
            )
            if isinstance(example, torch.nn.Parameter)
        }
        # Decisions read module paths and parameters, which the graph's code need not show.
        paths = [(n.name, module_path(n)) for n in gm.graph.nodes if n.op == "call_function"]
        # A graph lowered without a device kernel would stay slow after there is one.
        devices = {x.device for x in example_inputs if isinstance(x, torch.Tensor)}
        served = sorted(f"{device.type}: {no_kernel('fos', device)}" for device in devices)
        self.uuid = digest(
            source_digest(), repr(config), repr(sorted(self.parameters)), repr(paths), repr(served)
        )
        self.report: Report | None = None

    def joint(self, graph: fx.Graph) -> None:
        """Rewrite a joint or inference graph; remembers the Report."""
        mark_parameters(graph, self.parameters)
        training = any(is_tangent(node) for node in graph.nodes)
        self.report = rewrite(graph, self.config.pass_config(training=training))
        log.info("%s", self.report)

    def post(self, graph: fx.Graph) -> None:
        """Lower a forward, backward or inference graph after partitioning."""
        lower_graph(graph, self.config.pass_config(training=False))


class _JointPass(CustomGraphPass):
    def __init__(self, passes: GraphPasses) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        self.passes.joint(graph)

    def uuid(self) -> str:
        return self.passes.uuid


class _PostGradPass(CustomGraphPass):
    def __init__(self, passes: GraphPasses) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        self.passes.post(graph)

    def uuid(self) -> str:
        return self.passes.uuid


def _compile_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], passes: GraphPasses
) -> CompiledGraph:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    patches = passes.config.inductor_patches()
    # A user's own passes keep running, after ours on the joint graph and before our lowering.
    joint = patches.get("joint_custom_pre_pass", config.joint_custom_pre_pass)
    post = patches.get("post_grad_custom_pre_pass", config.post_grad_custom_pre_pass)
    patches["joint_custom_pre_pass"] = _chain(_JointPass(passes), joint)
    patches["post_grad_custom_pre_pass"] = _chain(post, _PostGradPass(passes))
    compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled


def _chain(*passes: Any) -> Any:
    flat = [
        p
        for each in passes
        if each is not None
        for p in (each if isinstance(each, (list, tuple)) else [each])
    ]
    return flat[0] if len(flat) == 1 else _Chain(flat)


class _Chain(CustomGraphPass):
    """Several passes as one: torch 2.11 takes no list."""

    def __init__(self, passes: list[Any]) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        owner = graph.owning_module
        assert owner is not None
        for each in self.passes:
            each(owner.graph)  # a failed pass of ours puts another graph there

    def uuid(self) -> Any:
        """None, which switches caching off, if a pass has no identity."""
        ids = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        return ids if all(ids) else None


def _compile_eager(
    gm: fx.GraphModule, example_inputs: Sequence[Any], passes: GraphPasses
) -> CompiledGraph:
    """AOTAutograd with our passes, the min-cut partitioner, and no code generation."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def partition(
        joint: fx.GraphModule, inputs: Any, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        passes.joint(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def run(graph: fx.GraphModule, inputs: Any) -> CompiledGraph:
        return make_boxed_func(graph.forward)

    def infer(graph: fx.GraphModule, inputs: Any) -> CompiledGraph:
        passes.joint(graph.graph)
        graph.recompile()
        return run(graph, inputs)

    compiler = aot_autograd(
        fw_compiler=run,
        inference_compiler=infer,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )
    return compiler(gm, list(example_inputs))


def trace(gm: fx.GraphModule, example_inputs: Sequence[Any], config: BackendConfig) -> Report:
    """Run the passes on a Dynamo graph without compiling or running it."""
    passes = GraphPasses(config, gm, example_inputs)
    _compile_eager(gm, example_inputs, passes)
    assert passes.report is not None
    return passes.report


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _warn_if_nothing_quantized(report: Report) -> None:
    if report.quantized or report.failure or report.recipe == "bf16":
        return
    reasons = "; ".join(f"{count}x {reason}" for reason, count in report.reasons().items())
    warnings.warn(
        f"fouroversix quantized nothing (recipe {report.recipe!r}): "
        f"{reasons or 'the graph has no matmul'}",
        FosCompileWarning,
        stacklevel=3,
    )


def digest(*parts: str) -> str:
    """SHA-256 of the parts, each delimited by its length."""
    sha = hashlib.sha256()
    for part in parts:
        data = part.encode()
        sha.update(len(data).to_bytes(8, "little") + data)
    return sha.hexdigest()


@functools.cache
def source_digest() -> str:
    """Digest of this file and of the sources of passes and kernels: new code, new graphs."""
    roots = [Path(package.__path__[0]) for package in (fos_compile.kernels, fos_compile.passes)]
    files = [
        Path(__file__),
        Path(__file__).with_name("config.py"),
        Path(__file__).with_name("recipes.py"),
    ]
    files += [path for root in roots for path in sorted(root.rglob("*.py"))]
    return digest(*(path.name + path.read_text() for path in files))
