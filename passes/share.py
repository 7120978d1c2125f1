"""Pass: quantize every tensor once per orientation, and both orientations in one read.

Problem
    q, k and v read one activation, and its transpose feeds three weight gradients; ``insert`` wrote
    a quantization for each use.
Before
    %quantize   = fos.quantize(%x, %amax, ...)                      # for q
    %quantize_1 = fos.quantize(%x, %amax_1, ...)                    # for k
    %quantize_2 = fos.quantize(%x, %amax_2, transpose=True, ...)    # for dW
After
    %quantize_pair = fos.quantize_pair(%x, %amax, %amax_2, ...)
Why legal
    Equal keys (:class:`QuantizeKey`) are the same tensor behind views and casts, quantized with the
    same options and dice; a pair is defined as the two quantizations.
Bails out when
    The two orientations differ in format, scale rule or blocks, or run on different sides of the
    forward/backward cut.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable

import torch
from torch import fx

from fos_compile.passes.errors import working_on
from fos_compile.passes.graph_edit import argument, call
from fos_compile.passes.insert import QuantizeKey
from fos_compile.passes.provenance import Value
from fos_compile.passes.recipe import PassConfig
from fos_compile.passes.report import PassReport
from fos_compile.passes.sites import KEY


def share(graph: fx.Graph, config: PassConfig) -> PassReport:
    """Merge equal amax and quantize nodes, then pair the orientations of one tensor."""
    merged = _merge_equal(graph)
    pairs = _pair(graph)
    notes = (f"{merged} shared", f"{pairs} pairs")
    return PassReport(name="share", changed=merged + pairs, notes=notes)


def _merge_equal(graph: fx.Graph) -> int:
    """Replace later nodes by the first with the same key; count the quantizations."""
    first: dict[Hashable, fx.Node] = {}
    merged = 0
    for node in list(graph.nodes):
        key = node.meta.get(KEY)
        if key is None:
            continue
        kept = first.setdefault((node.target, key), node)
        if kept is node:
            continue
        if _is_quantize(node):
            merged += 1
            _replace_items(graph, node, kept, 0)
        else:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
    return merged


def _replace_items(graph: fx.Graph, old: fx.Node, new: fx.Node, offset: int) -> None:
    """Point the two ``getitem`` of ``old`` at elements ``offset`` and ``offset + 1`` of ``new``."""
    existing = {argument(item, 1): item for item in new.users if item.target is operator.getitem}
    for item in list(old.users):
        index = argument(item, 1) + offset
        if index in existing:
            item.replace_all_uses_with(existing[index])
            graph.erase_node(item)
        else:
            item.args = (new, index)
    graph.erase_node(old)


def _is_quantize(node: fx.Node) -> bool:
    return node.target is torch.ops.fos.quantize.default


def _pair(graph: fx.Graph) -> int:
    rows: dict[Value, list[fx.Node]] = {}
    pairs = 0
    for node in list(graph.nodes):
        # A quantize node without a key is a call that the user wrote.
        if not _is_quantize(node) or KEY not in node.meta:
            continue
        key: QuantizeKey = node.meta[KEY]
        waiting = rows.setdefault(key.value, [])
        partner = next((other for other in waiting if _pairs_with(other, node)), None)
        if partner is None:
            waiting.append(node)
            continue
        waiting.remove(partner)
        row, col = (partner, node) if key.transpose else (node, partner)
        with working_on(node):
            _write_pair(graph, partner, row, col)
        pairs += 1
    return pairs


def _pairs_with(first: fx.Node, second: fx.Node) -> bool:
    a, b = first.meta[KEY], second.meta[KEY]
    same = all(getattr(a.spec, f) == getattr(b.spec, f) for f in ("format", "scale_rule", "block"))
    return same and a.transpose != b.transpose and _side(first) == _side(second)


def _side(node: fx.Node) -> str:
    """Forward or backward of the cut; gradients have no tag of their own but depend on tangents."""
    return (
        "backward"
        if node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")
        else "forward"
    )


def _write_pair(graph: fx.Graph, at: fx.Node, row: fx.Node, col: fx.Node) -> None:
    """One ``quantize_pair`` at ``at``, the earlier of the two nodes."""
    # Equal keys hold equal elements, but the other node may read a view that is made later.
    source = argument(at, 0)
    late_amax = argument(col if at is row else row, 1)
    if at < late_amax:
        if late_amax.target is torch.ops.fos.amax.default:  # mxfp4 has a constant in its place
            late_amax.args = (source, *late_amax.args[1:])
        at.prepend(late_amax)
    spec_row, spec_col = row.meta[KEY].spec, col.meta[KEY].spec
    seed = argument(row, 2) if argument(row, 2) is not None else argument(col, 2)
    with graph.inserting_before(at):
        pair = call(
            graph,
            torch.ops.fos.quantize_pair.default,
            (source, argument(row, 1), argument(col, 1), seed),
            {
                "format": spec_row.format,
                "scale_rule": spec_row.scale_rule,
                "rounding_row": spec_row.rounding,
                "rounding_col": spec_col.rounding,
                "block": spec_row.block,
                "rht_row": spec_row.rht,
                "rht_col": spec_col.rht,
                "stream": row.kwargs["stream"],
            },
            like=at,
        )
    _replace_items(graph, row, pair, 0)
    _replace_items(graph, col, pair, 2)
