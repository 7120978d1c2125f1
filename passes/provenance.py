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
    INPUT = enum.auto()
    TANGENT = enum.auto()


@dataclasses.dataclass(frozen=True, slots=True)
class Value:
    """Identity of the value that a node holds: equal keys, equal tensors.

    ``base`` is the tensor behind row-major views, copies and casts; two nodes of one base with the
    same shape and the same casts on the way hold the same elements.
    """

    base: fx.Node
    shape: tuple[str, ...]
    casts: tuple[torch.dtype, ...]


def mark_parameters(graph: fx.Graph, names: Mapping[int, str]) -> None:
    """Record which placeholders are parameters, for :func:`origins`.

    ``names`` maps the index of a graph input of the traced module to the parameter's name.
    AOTAutograd drops, reorders and adds inputs; ``meta["desc"]`` keeps their origin.
    """
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        description = node.meta.get("desc")
        if type(description).__name__ == "ParamAOTInput":
            node.meta["fos_parameter"] = description.target
        elif type(description).__name__ == "PlainAOTInput" and description.idx in names:
            node.meta["fos_parameter"] = names[description.idx]


def is_tangent(node: fx.Node) -> bool:
    """True for a gradient that enters the joint graph."""
    return node.op == "placeholder" and str(node.target).startswith("tangents")


def is_backward(node: fx.Node) -> bool:
    """True for a node that autograd traced."""
    return node.meta.get("partitioner_tag") == "is_backward"


def origins(graph: fx.Graph) -> dict[fx.Node, Origin]:
    """What each node's data depends on. Sizes are not data: a SymInt contributes nothing."""
    found: dict[fx.Node, Origin] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if "fos_parameter" in node.meta:
                found[node] = Origin.PARAMETER
            elif is_tangent(node):
                found[node] = Origin.TANGENT
            else:
                found[node] = (
                    Origin.INPUT
                    if isinstance(node.meta.get("val"), torch.Tensor)
                    else Origin.NOTHING
                )
            continue
        origin = Origin.NOTHING
        if not isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, int)):
            for operand in node.all_input_nodes:
                origin |= found[operand]
        found[node] = origin
    return found


def kind_of(origin: Origin) -> Kind:
    """The operand kind that an origin makes."""
    if Origin.TANGENT in origin:
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
