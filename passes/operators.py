"""Operators of the library ``fos`` as graph nodes: which one, and what serves it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fos_compile.kernels.op import REGISTRY, Op
from fos_compile.passes.graph_edit import argument, value

aten = torch.ops.aten
_EPILOGUE = {
    aten.add.Tensor,
    aten.mul.Tensor,
    torch.ops.prims.convert_element_type.default,
}
"""What ``insert`` writes behind the product, the product always its first argument."""


def op_of(node: fx.Node) -> Op | None:
    """The registered operator that ``node`` calls, if it is one of ours."""
    if node.op != "call_function" or getattr(node.target, "namespace", "") != "fos":
        return None
    target: Any = node.target
    return REGISTRY.get(target._schema.name.removeprefix("fos::"))


def runs_as(op: Op, node: fx.Node) -> str:
    """``kernel`` if a device kernel serves this call, else ``decomposition``."""
    args, kwargs = map_arg((node.args, node.kwargs), value)
    return "kernel" if op.supports(*args, **kwargs) else "decomposition"


def implementation_of(node: fx.Node) -> str:
    """How a rewritten matmul runs, for reports."""
    while node.target in _EPILOGUE:  # the bias that fos::scaled_mm could not add
        node = argument(node, 0)
    op = op_of(node)
    if op is None:
        return "dequantize, then the matmul"
    return f"fos::{op.name} ({runs_as(op, node)})"
