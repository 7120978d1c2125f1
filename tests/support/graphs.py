"""Builders and text forms of traced graphs, shared by the pass tests."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fos_compile.backend import GraphPasses
from fos_compile.config import BackendConfig, parse_options
from fos_compile.passes.provenance import Origin, mark_inputs


class Captured:
    """The graph that the passes would see for ``fn(*inputs)``, before any of them ran."""

    def __init__(self, fn: Callable[..., Any], *inputs: Any, dynamic: bool | None = False) -> None:
        self.graphs: list[fx.GraphModule] = []
        torch._dynamo.reset()
        torch.compile(fn, backend=self._backend, dynamic=dynamic)(*inputs)

    @property
    def graph(self) -> fx.Graph:
        (only,) = self.graphs
        return only.graph

    def _backend(self, gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
        from torch._dynamo.backends.common import aot_autograd
        from torch._inductor.decomposition import select_decomp_table

        given = GraphPasses(BackendConfig(), gm, example_inputs).inputs

        def keep(joint: fx.GraphModule) -> None:
            mark_inputs(joint.graph, given)
            self.graphs.append(joint)

        def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
            copy = fx.GraphModule(joint, joint.graph.__deepcopy__())
            parts = min_cut_rematerialization_partition(copy, inputs, **kwargs)
            keep(joint)
            return parts

        def infer(graph: fx.GraphModule, inputs: Any) -> Any:
            keep(graph)
            return make_boxed_func(graph.forward)

        return aot_autograd(
            fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
            inference_compiler=infer,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )(gm, example_inputs)


def config(*, training: bool = True, **options: Any) -> Any:
    """The PassConfig that ``options`` give."""
    return parse_options({"strict": True, **options}).pass_config(training=training)


def text(graph: fx.Graph) -> str:
    """One line a node: name = target(args), without what changes between machines or versions."""
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.name}: {_meta(node)}")
        elif node.op == "output":
            lines.append(f"return {node.args[0]}")
        else:
            arguments = [_argument(a) for a in node.args]
            arguments += [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
            name = re.sub(r"\.(default|Tensor|int)$", "", str(node.target)).replace(
                "<built-in function getitem>", "getitem"
            )
            lines.append(f"{node.name} = {name}({', '.join(arguments)})")
    return "\n".join(lines)


def _argument(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_argument, value)) + "]"
    return str(value) if isinstance(value, fx.Node) else repr(value)


def _meta(node: fx.Node) -> str:
    fake = node.meta.get("val")
    if not isinstance(fake, torch.Tensor):
        return "int"
    kind = " parameter" if node.meta.get("fos_input") == Origin.PARAMETER else ""
    return f"{str(fake.dtype).removeprefix('torch.')}[{', '.join(map(str, fake.shape))}]{kind}"
