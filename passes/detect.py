"""Pass: name every matmul of a joint or inference graph.

Problem
    After AOTAutograd a model is hundreds of ``aten`` nodes; which are matmuls of which module,
    what each computes (forward, gradient of the input, gradient of the weight) and which tensor
    stands behind its views is spread over metadata.
Before
    %permute = permute(%weight, [1, 0]);  %mm = mm(%x, %permute)
After
    the same graph; ``%mm.meta["fos_site"]`` is a :class:`MatmulSite`
Why legal
    Only metadata changes.
Bails out when
    A matmul was decided on in an enclosing graph before (regions are traced on their own, cut, and
    shown to the passes again). A matmul that fits no role is a site with ``role=None``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import fx

from fos_compile.passes.errors import working_on
from fos_compile.passes.graph_edit import argument, value
from fos_compile.passes.provenance import (
    Origin,
    behind_transposes,
    inputs_read,
    is_backward,
    is_given,
    is_traced_backward,
    kind_of,
    origins,
    root_of,
)
from fos_compile.passes.recipe import PassConfig, Role
from fos_compile.passes.report import PassReport
from fos_compile.passes.sites import DONE, FACTS, SITE, MatmulSite, Operand

aten = torch.ops.aten

# Target -> position of the left operand; a bias, where there is one, stands before it.
MATMULS: dict[Any, int] = {
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
    aten._grouped_mm.default: 0,
}


def detect(graph: fx.Graph, config: PassConfig) -> PassReport:
    """Attach a :class:`MatmulSite` to every matmul node of ``graph``."""
    found = _Provenance(origins(graph), inputs_read(graph))
    forward: dict[int | None, list[MatmulSite]] = defaultdict(list)
    for node in graph.nodes:  # copies of nodes carry facts about the graph they come from
        for key in FACTS:
            node.meta.pop(key, None)
    matmuls = [node for node in graph.nodes if node.target in MATMULS and DONE not in node.meta]
    for index, node in enumerate(matmuls):
        with working_on(node):
            site = _match(node, index, found, forward)
        node.meta[SITE] = site
        if site.role == "fprop":
            forward[node.meta.get("seq_nr")].append(site)
    return PassReport(name="detect", changed=0, notes=(f"{len(matmuls)} matmuls",))


def module_path(node: fx.Node) -> str:
    """Module path of ``node`` as ``named_modules`` spells it, from the tracer's module stack."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    if not stack:
        return ""
    raw = list(stack.values())[-1][0]
    path = re.sub(r"""\[['"]?([^\]'"]*)['"]?\]""", r".\1", raw)  # x['a'][0] -> x.a.0
    parts = [part for part in path.split(".") if part and part != "_modules"]
    if parts and parts[0] in ("L", "G"):
        parts = parts[
            2:
        ]  # L['self'].model.layers -> model.layers: the root's name is the user's variable
    return ".".join(parts)


class _Provenance(NamedTuple):
    """Of every node of the graph."""

    origins: dict[fx.Node, Origin]
    inputs: dict[fx.Node, int]


def _match(
    node: fx.Node,
    index: int,
    found: _Provenance,
    forward: dict[int | None, list[MatmulSite]],
) -> MatmulSite:
    first = MATMULS[node.target]
    left, right = argument(node, first), argument(node, first + 1)
    a = _operand(left, found, k_last=True)
    b = _operand(right, found, k_last=False)
    role: Role | None = "fprop"
    partner = None
    if is_traced_backward(node):
        role = None
    elif is_backward(node) or "gradient" in (a.kind, b.kind):
        role, partner = _role(node, a, b, forward)
    shape_a, shape_b = value(left).shape, value(right).shape
    return MatmulSite(
        index=index,
        node=node,
        path=partner.path if partner else module_path(node),
        role=role,
        a=a,
        b=b,
        functional=_is_weight_of(a, right, found) or _is_weight_of(b, left, found),
        batch=str(shape_a[0]) if len(shape_a) == 3 else "",
        m=str(shape_a[-2]),
        n=str(shape_b[-1]),
        k=str(shape_a[-1]),
        forward=partner,
    )


def _operand(node: fx.Node, found: _Provenance, *, k_last: bool) -> Operand:
    source, transposed = behind_transposes(node)
    return Operand(
        kind=kind_of(found.origins[node]),
        source=source,
        transpose=transposed if k_last else not transposed,
        root=root_of(source),
    )


def _is_weight_of(operand: Operand, other: fx.Node, found: _Provenance) -> bool:
    """Whether ``operand`` may be a weight that was passed as an argument: a tensor given to the
    graph, multiplied as it is with something that was not made from it."""
    root = operand.root
    return is_given(root) and not found.inputs[root] & found.inputs[other]


def _role(
    node: fx.Node, a: Operand, b: Operand, forward: dict[int | None, list[MatmulSite]]
) -> tuple[Role | None, MatmulSite | None]:
    """Find the forward matmul that ``node`` differentiates, and with respect to what.

    Autograd gives a backward node the sequence number of its forward node; the operand that is not
    a gradient must be one that the forward matmul read.
    """
    others = [o for o in (a, b) if o.kind != "gradient"]
    if len(others) != 1:
        return None, None
    other = others[0]
    candidates = forward.get(node.meta.get("seq_nr"), []) or [
        s for group in forward.values() for s in group
    ]
    for site in candidates:
        if site.b.root is other.root or site.a.root is other.root:
            if (site.a.kind == "weight") != (site.b.kind == "weight"):
                return ("dgrad" if other.kind == "weight" else "wgrad"), site
            return ("dgrad" if site.b.root is other.root else "wgrad"), site
    return None, None
