"""Pass (after partitioning): decide what runs in place of every operator of ours.

Problem
    Quantize operators are opaque until the partitioner has run, so that it saves packed tensors.
    Where no device kernel serves, an opaque call runs the eager reference op by op, 10 to 50 times
    slower than compiled code.
Before
    %quantize = fos.quantize(%x, %amax, ...)
After (outline)
    %quantize = fos_outlined.quantize(%x, %amax, ...)   # compiled once, shared by equal sites;
                                                        # fos_outlined_dynamic for symbolic sizes
After (inline)
    the reference's ``aten`` nodes, which Inductor fuses with the producer of %x
After (a product of FP4 where only unpacking has a kernel: NVIDIA GPUs before Blackwell)
    %dequantize, %dequantize_1 = fos.dequantize(%values, ...), fos.dequantize(%values_1, ...)
    the aten nodes of fos.unpacked_mm(%dequantize, %dequantize_1, ...): the library's matmul, and an
    epilogue that Inductor fuses with what follows
Why legal
    The reference is the definition of the operator; both forms run it on the operator's arguments.
    Unpacked operands, code * scale, are exact in bfloat16.
Bails out when
    ``supports`` of the operator names a device kernel for these arguments, the operator draws
    random numbers (``fos::seed``), or the config says ``opaque``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fos_compile.kernels.dequantize import DEQUANTIZE
from fos_compile.kernels.op import Op
from fos_compile.kernels.outlined import outlined
from fos_compile.kernels.scaled_mm import SCALED_MM, exact_dtype
from fos_compile.kernels.unpacked_mm import UNPACKED_MM
from fos_compile.passes.errors import working_on
from fos_compile.passes.graph_edit import argument, call, inherit, value
from fos_compile.passes.operators import op_of, runs_as
from fos_compile.passes.recipe import PassConfig
from fos_compile.passes.report import PassReport

Decompositions = dict[torch._ops.OpOverload, Callable[..., Any]]


def lower(graph: fx.Graph, config: PassConfig) -> PassReport:
    """Outline or inline every operator of ours that no device kernel serves."""
    if config.lowering == "opaque":
        return PassReport(name="lower", changed=0, notes=("opaque",))
    traced: dict[tuple[Any, ...], fx.GraphModule] = {}
    inlined = outlined_ = 0
    for node in list(graph.nodes):
        op = op_of(node)
        if op is None or not op.inlinable or runs_as(op, node) != "decomposition":
            continue
        with working_on(node):
            if op is SCALED_MM and _kernels_unpack(node):
                op, node = UNPACKED_MM, _unpack(graph, node)
            if config.lowering == "inline" or _is_small(op, node):
                _inline(graph, node, op, traced)
                inlined += 1
            else:
                node.target = outlined(op, dynamic=_has_symbols(node))
                outlined_ += 1
    notes = (f"{inlined} inlined", f"{outlined_} outlined")
    return PassReport(name="lower", changed=inlined + outlined_, notes=notes)


def _kernels_unpack(node: fx.Node) -> bool:
    """Whether device kernels of ``fos::dequantize`` serve both operands of a product on CUDA."""
    if value(argument(node, 0)).device.type != "cuda":
        return False
    return all(
        DEQUANTIZE.supports(*map_arg(args, value), **kwargs)
        for args, kwargs in map(functools.partial(_dequantize, node), (0, 4))
    )


def _dequantize(node: fx.Node, first: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that unpack the operand of a ``scaled_mm`` which begins at argument `first`.

    The padding comes along, as zeros: rows of whole 128 bytes are what cuBLAS is fast with.
    """
    values = argument(node, first)
    half = value(values).shape[-1]
    rows, cols = node.kwargs["m" if first == 0 else "n"], node.kwargs["k"]
    cols = 2 * half if isinstance(half, int) else cols
    format = node.kwargs.get("format", "nvfp4")
    args = (values, argument(node, first + 1), None, rows, cols)
    return args, {"format": format, "dtype": exact_dtype(value(values).device)}


def _unpack(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Put two ``dequantize`` and an ``unpacked_mm``, which is returned, in place of `node`."""
    dequantize = torch.ops.fos.dequantize.default
    with graph.inserting_before(node):
        operands = tuple(
            call(graph, dequantize, *_dequantize(node, first), like=node) for first in (0, 4)
        )
        scales = (argument(node, index) for index in (2, 3, 6, 7))
        bias = argument(node, 8) if len(node.args) > 8 else node.kwargs.get("bias")
        out_dtype = {"out_dtype": node.kwargs["out_dtype"]}
        new = call(graph, UNPACKED_MM.overload, (*operands, *scales, bias), out_dtype, like=node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    return new


def _has_symbols(node: fx.Node) -> bool:
    """True if a size that ``node`` reads is symbolic: it will be called with others."""
    fakes = [value(operand) for operand in node.all_input_nodes]
    sizes = [each for fake in fakes if isinstance(fake, torch.Tensor) for each in fake.shape]
    return any(isinstance(each, torch.SymInt) for each in (*fakes, *sizes))


def _is_small(op: Op, node: fx.Node) -> bool:
    """A few nodes that fuse with a neighbour: the plain amax into the producer's last loop, the
    epilogue of a product into what reads it. Outlined they would go through memory once more."""
    is_plain_amax = op.name == "amax" and not (len(node.args) > 1 and argument(node, 1))
    return is_plain_amax or op is UNPACKED_MM


def _inline(
    graph: fx.Graph, node: fx.Node, op: Op, traced: dict[tuple[Any, ...], fx.GraphModule]
) -> None:
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    inputs = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    key = (op.name, str(spec), *(_signature(leaf) for leaf in leaves))
    if key not in traced:
        traced[key] = _trace(op, leaves, spec, inputs)
    body = traced[key].graph
    placeholders = [n for n in body.nodes if n.op == "placeholder"]
    before = node.prev
    with graph.inserting_before(node):
        outputs: Any = graph.graph_copy(body, dict(zip(placeholders, inputs, strict=True)))
    new = before.next
    while new is not node:
        inherit(new, node)
        new = new.next
    if isinstance(outputs, (tuple, list)):
        for item in list(node.users):
            assert item.target is operator.getitem
            item.replace_all_uses_with(outputs[argument(item, 1)])
            graph.erase_node(item)
    else:
        node.replace_all_uses_with(outputs)
    graph.erase_node(node)


def _signature(leaf: Any) -> Any:
    """What a trace depends on: static arguments by value, tensors by metadata."""
    if not isinstance(leaf, fx.Node):
        return leaf
    fake = value(leaf)
    if not isinstance(fake, torch.Tensor):
        return str(fake)
    return tuple(map(str, fake.shape)), tuple(map(str, fake.stride())), fake.dtype, fake.device


def _trace(
    op: Op, leaves: list[Any], spec: pytree.TreeSpec, inputs: list[fx.Node]
) -> fx.GraphModule:
    def flat(*values: Any) -> Any:
        rest = iter(values)
        filled = [next(rest) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return op.reference(*args, **kwargs)

    fakes = [value(node) for node in inputs]
    mode = detect_fake_mode(fakes)
    assert mode is not None, "a traced graph holds fake tensors"
    with mode:
        gm = make_fx(flat, decomposition_table=_decompositions())(*fakes)
    gm.graph.eliminate_dead_code()
    if any(n.op == "get_attr" for n in gm.graph.nodes):
        raise AssertionError(
            f"the reference of fos::{op.name} creates a tensor constant, which cannot be inlined"
        )
    return gm


def _decompositions() -> Decompositions:
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()
