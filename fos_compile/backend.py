"""The ``fouroversix`` backend of ``torch.compile``.

Dynamo hands over a graph; AOTAutograd traces it with its backward; our passes rewrite the joint (or
inference) graph; the partitioner cuts it; our lowering runs on the pieces; Inductor compiles them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._dynamo import compiled_autograd
from torch._inductor.custom_graph_pass import CustomGraphPass

import fos_compile.kernels
import fos_compile.passes
from fos_compile import report_cache, unquantized
from fos_compile.config import BackendConfig, parse_options
from fos_compile.kernels.op import no_kernel
from fos_compile.passes.detect import module_path
from fos_compile.passes.errors import PassError, warn
from fos_compile.passes.pipeline import lower_graph, rewrite
from fos_compile.passes.provenance import Origin, is_tangent
from fos_compile.passes.report import Report, merge

log = logging.getLogger("fos_compile")
CompiledGraph = Callable[..., Any]
SOURCE = "_dynamo_source"
"""Attribute of a placeholder: the expression that Dynamo read it from."""


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


fouroversix.reset = unquantized.forget  # type: ignore[attr-defined]  # torch.compiler.reset calls it


class Backend:
    """A backend with its configuration, which also collects the Report of every graph it compiled.

    ``torch.compile(model, backend=Backend(config))`` is the string form with access to ``report``.
    A ``fragment`` is one of several graphs of a larger function, where a graph without a quantized
    matmul is nothing to warn about.
    """

    def __init__(self, config: BackendConfig, *, fragment: bool = False) -> None:
        self.config = config
        self.fragment = fragment
        self._graphs: list[GraphPasses] = []
        self.quantized_runs = 0
        """Calls of compiled graphs with a quantized matmul; counted for a fragment."""

    reset = staticmethod(unquantized.forget)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> CompiledGraph:
        """Compile one Dynamo graph; called by torch.compile."""
        passes = GraphPasses(self.config, gm, example_inputs, is_fragment=self.fragment)
        key = report_cache.key(gm, example_inputs, passes.uuid)
        original = _copy(gm)  # compile_fx changes gm; a cache hit needs it to explain itself
        is_part = unquantized.is_part(gm)
        compile_graph = {"inductor": _compile_inductor, "eager": _compile_eager}[
            self.config.compiler
        ]
        compiled = compile_graph(gm, example_inputs, passes)
        if passes.reports and self.config.compiler == "inductor":
            report_cache.save(key, passes.report)
        elif not passes.reports:  # AOTAutograd found the compiled graph and never ran the passes
            found = report_cache.load(key) or trace(original, example_inputs, self.config)
            if found.failure:
                warn(f"the graph found in Inductor's cache is not what was asked: {found.failure}")
            passes.reports.append(found)
        self._graphs.append(passes)
        if not self.fragment:
            unquantized.warn_if_nothing_is(passes.report, is_part=is_part)
        elif passes.report.quantized:
            return self._counted(compiled)
        return compiled

    def _counted(self, compiled: CompiledGraph) -> CompiledGraph:
        @functools.wraps(compiled)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.quantized_runs += 1
            return compiled(*args, **kwargs)

        return run

    @property
    def reports(self) -> list[Report]:
        """One for every graph, in order of compilation."""
        return [graph.report for graph in self._graphs]

    @property
    def report(self) -> Report:
        """The reports of all graphs, merged; graph breaks and recompilations give several."""
        return merge(self.reports)


class GraphPasses:
    """Our passes bound to one Dynamo graph: its inputs, its cache key and then its Report."""

    def __init__(
        self,
        config: BackendConfig,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        is_fragment: bool = False,
    ) -> None:
        self.config = config
        self.is_fragment = is_fragment
        self.inputs = {
            index: origin
            for index, (node, example) in enumerate(
                zip(_placeholders(gm), example_inputs, strict=True)
            )
            if (origin := _origin(node, example))
        }
        # Compiled autograd hands over a backward without a mark on its nodes.
        self.is_backward = compiled_autograd.in_compiled_autograd_region
        # Decisions read module paths and inputs, which the graph's code need not show.
        paths = [(n.name, module_path(n)) for n in gm.graph.nodes if n.op == "call_function"]
        # A graph lowered without a device kernel would stay slow after there is one.
        devices = {x.device for x in example_inputs if isinstance(x, torch.Tensor)}
        served = sorted(f"{device.type}: {no_kernel('fos', device)}" for device in devices)
        seen = (sorted(self.inputs.items()), self.is_backward, self.is_fragment, paths, served)
        self.uuid = digest(source_digest(), repr(config), *map(repr, seen))
        self.reports: list[Report] = []
        """One for the graph and for every nested region with its own joint graph."""
        self.lower_failures: list[str] = []
        self._lowers = True

    @property
    def report(self) -> Report:
        """What happened so far; the lowering of a backward may come as late as its first run."""
        report = merge(self.reports)
        failures = (*filter(None, [report.failure]), *self.lower_failures)
        return dataclasses.replace(report, failure="; ".join(failures))

    def cache_uuid(self) -> str | None:
        """``uuid``, or None if the graph is not what it says: then nothing is cached."""
        return None if any(report.failure for report in self.reports) else self.uuid

    def joint(self, graph: fx.Graph) -> None:
        """Rewrite a joint or inference graph; remembers the Report."""
        if self.is_backward:
            for node in graph.nodes:
                node.meta["autograd_backward"] = True
        training = any(is_tangent(node) for node in graph.nodes)
        config = self.config.pass_config(
            training=training, given_weights=training or not self.is_fragment
        )
        report = rewrite(graph, config, self.inputs)
        self.reports.append(report)
        log.info("%s", report)

    def post(self, graph: fx.Graph) -> None:
        """Lower a forward, backward or inference graph after partitioning.

        Raises:
            PassError: a pass failed; the graph is as it was, to be compiled :meth:`unlowered`.
        """
        if not self._lowers:
            return
        try:
            lower_graph(graph, self.config.pass_config(training=False))
        except PassError as error:
            failure = f"{error.summary}; operators run as they are, through the eager reference"
            self.lower_failures.append(failure)
            if not self.config.strict:
                warn(failure)
            raise

    @contextlib.contextmanager
    def unlowered(self) -> Iterator[None]:
        """Lower nothing inside."""
        self._lowers = False
        try:
            yield
        finally:
            self._lowers = True


class _JointPass(CustomGraphPass):
    def __init__(self, passes: GraphPasses) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        self.passes.joint(graph)

    def uuid(self) -> str | None:
        return self.passes.cache_uuid()


class _PostGradPass(CustomGraphPass):
    def __init__(self, passes: GraphPasses) -> None:
        self.passes = passes

    def __call__(self, graph: fx.Graph) -> None:
        self.passes.post(graph)

    def uuid(self) -> str | None:
        return self.passes.cache_uuid()


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
    compiled: Any = compile_fx(
        gm, list(example_inputs), _inner_compile(passes), config_patches=patches
    )
    return compiled


def _inner_compile(passes: GraphPasses) -> Callable[..., Any]:
    """Inductor's compiler of one graph, with a second attempt where our lowering fails.

    A cache entry would have the key of the graph that was to be, so that attempt leaves none.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    def compile_graph(gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        failures = len(passes.lower_failures)
        try:
            return compile_fx_inner(gm, inputs, **kwargs)
        except Exception:
            if passes.config.strict or failures == len(passes.lower_failures):
                raise
        uncached = config.patch(fx_graph_cache=False, fx_graph_remote_cache=False)
        with passes.unlowered(), uncached:
            return compile_fx_inner(gm, inputs, **kwargs)

    return compile_graph


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

    def rewrite_all(gm: fx.GraphModule) -> None:
        """Nested regions first, as Inductor does."""
        regions = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
        for name, module in gm.named_children():
            if name in regions and isinstance(module, fx.GraphModule):
                rewrite_all(module)
        passes.joint(gm.graph)
        gm.recompile()

    def partition(
        joint: fx.GraphModule, inputs: Any, **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        rewrite_all(joint)
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def run(graph: fx.GraphModule, inputs: Any) -> CompiledGraph:
        return make_boxed_func(graph.forward)

    def infer(graph: fx.GraphModule, inputs: Any) -> CompiledGraph:
        rewrite_all(graph)
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
    assert passes.reports
    return passes.report


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph copied, with what Dynamo knows about its inputs."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    copied.meta = dict(gm.meta)
    for old, new in zip(_placeholders(gm), _placeholders(copied), strict=True):
        if hasattr(old, SOURCE):
            setattr(new, SOURCE, getattr(old, SOURCE))
    return copied


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def _origin(node: fx.Node, example: Any) -> Origin:
    """What Dynamo knows about a graph input; nothing for an input like any other."""
    source = getattr(node, SOURCE, None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name  # a method before torch 2.12
    if name.endswith(".grad"):
        return Origin.GRADIENT
    if isinstance(example, torch.nn.Parameter) or "._buffers[" in name:
        return Origin.PARAMETER
    return Origin.NOTHING


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
