"""Where a tensor of a traced graph comes from: parameter, input or gradient, behind views."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

import torch
from torch import fx

from fos_compile.passes.graph_edit import argument, value
from fos_compile.passes.recipe import Kind

aten = torch.ops.aten

_CASTS = {torch.ops.prims.convert_element_type.default, aten._to_copy.default}
_VIEWS = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
}
_COPIES = {
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
}
_TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default}
_OTHER_MOVES = {aten.expand.default, aten.slice.Tensor, aten.select.int}


class Origin(enum.Flag):
    """What the value of a node depends on; constants depend on nothing."""

    NOTHING = 0
    PARAMETER = enum.auto()
    """A parameter or a buffer: what belongs to the model, not to the batch."""
    INPUT = enum.auto()
    TANGENT = enum.auto()
    """A gradient that enters the joint graph."""
    GRADIENT = enum.auto()
    """The ``.grad`` of a tensor, which an optimizer reads."""


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """Identity of the value that a node holds: equal keys, equal tensors.

    ``base`` is the tensor behind row-major views, copies and casts; two nodes of one base with the
    same shape and the same casts on the way hold the same elements.
    """

    base: fx.Node
    shape: tuple[str, ...]
    casts: tuple[torch.dtype, ...]


def mark_inputs(graph: fx.Graph, inputs: Mapping[int, Origin]) -> None:
    """Record which placeholders are parameters or gradients, for :func:`origins`.

    ``inputs`` maps the index of a graph input of the traced module to what it is.
    AOTAutograd drops, reorders and adds inputs; ``meta["desc"]`` keeps their origin.
    """
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        description = node.meta.get("desc")
        if type(description).__name__ in ("ParamAOTInput", "BufferAOTInput"):
            node.meta["fos_input"] = Origin.PARAMETER
        elif type(description).__name__ == "PlainAOTInput" and description.idx in inputs:
            node.meta["fos_input"] = inputs[description.idx]


def is_tangent(node: fx.Node) -> bool:
    """True for a gradient that enters the joint graph."""
    return node.op == "placeholder" and str(node.target).startswith("tangents")


def is_backward(node: fx.Node) -> bool:
    """True for a node that autograd traced."""
    return node.meta.get("partitioner_tag") == "is_backward"


def is_traced_backward(node: fx.Node) -> bool:
    """True for a gradient that the user's own function takes (``torch.func.grad``), and for what
    differentiates one."""
    if node.meta.get("autograd_backward") and not is_backward(node):
        return True
    calls = node.meta.get("source_fn_stack") or node.meta.get("fwd_source_fn_stack") or []
    return any(
        getattr(function, "__name__", "") in ("grad", "_autograd_grad")
        and function.__module__.startswith("torch.")
        for _, function in calls
    )


def origins(graph: fx.Graph) -> dict[fx.Node, Origin]:
    """What each node's data depends on. Sizes are not data: a SymInt contributes nothing."""
    found: dict[fx.Node, Origin] = {}
    for node in graph.nodes:
        origin = Origin.NOTHING
        if node.op == "placeholder":
            if "fos_input" in node.meta:
                origin = node.meta["fos_input"]
            elif is_tangent(node):
                origin = Origin.TANGENT
            elif isinstance(node.meta.get("val"), torch.Tensor):
                origin = Origin.INPUT
        elif _is_data(node):
            for operand in node.all_input_nodes:
                origin |= found[operand]
        found[node] = origin
    return found


def inputs_read(graph: fx.Graph) -> dict[fx.Node, int]:
    """Which tensors given to the graph each node's data depends on, a bit for each."""
    found: dict[fx.Node, int] = {}
    given = 0
    for node in graph.nodes:
        bits = 0
        if is_given(node):
            bits = 1 << given
            given += 1
        elif _is_data(node):
            for operand in node.all_input_nodes:
                bits |= found[operand]
        found[node] = bits
    return found


def is_given(node: fx.Node) -> bool:
    """True for a tensor that the graph gets and does not compute: an input or a constant."""
    return node.op in ("placeholder", "get_attr") and isinstance(node.meta.get("val"), torch.Tensor)


def _is_data(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, int))


def kind_of(origin: Origin) -> Kind:
    """The operand kind that an origin makes."""
    if origin & (Origin.TANGENT | Origin.GRADIENT):
        return "gradient"
    return "weight" if origin == Origin.PARAMETER else "activation"


def swaps_last_two(node: fx.Node) -> bool:
    """True if ``node`` is exactly a transposition of the last two dimensions."""
    if node.target is aten.t.default:
        return value(node).ndim == 2
    ndim = value(node).ndim
    identity = list(range(ndim))
    swapped = [*identity[:-2], *reversed(identity[-2:])]
    if node.target is aten.permute.default:
        return [d % ndim for d in argument(node, 1)] == swapped
    if node.target is aten.transpose.int:
        return {d % ndim for d in (argument(node, 1), argument(node, 2))} == set(identity[-2:])
    return False


def behind_transposes(node: fx.Node) -> tuple[fx.Node, bool]:
    """The tensor behind transpositions of the last two dimensions, and whether it is transposed."""
    transposed = False
    while node.op == "call_function" and swaps_last_two(node):
        node = argument(node, 0)
        transposed = not transposed
    return node, transposed


def value_of(node: fx.Node) -> Value:
    """The identity under which ``node`` may share a quantization with other nodes."""
    shape = tuple(str(extent) for extent in value(node).shape)
    casts: list[torch.dtype] = []
    while node.op == "call_function":
        if node.target in _CASTS:
            if value(node).dtype != value(argument(node, 0)).dtype:
                casts.append(value(node).dtype)
        elif node.target not in _VIEWS and node.target not in _COPIES:
            break
        node = argument(node, 0)
    return Value(node, shape, tuple(casts))


def root_of(node: fx.Node) -> fx.Node:
    """The tensor behind every view, transposition, slice, expansion, copy and cast."""
    moves = _CASTS | _VIEWS | _COPIES | _TRANSPOSES | _OTHER_MOVES
    while node.op == "call_function" and node.target in moves:
        node = argument(node, 0)
    return node
