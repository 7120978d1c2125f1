"""Pass: put quantize operators and ``fos::scaled_mm`` in place of planned matmuls.

Before
    %permute = permute(%weight, [1, 0]);  %mm = mm(%x, %permute)
After
    %amax   = fos.amax(%x);       %quantize   = fos.quantize(%x, %amax, ...)
    %amax_1 = fos.amax(%weight);  %quantize_1 = fos.quantize(%weight, %amax_1, ...)
    %scaled_mm = fos.scaled_mm(%values, %scales, %amax, 1536.0, %values_1, ...)
Why legal
    It is the approximation that the recipe asks for. ``fos::scaled_mm`` has the shape, dtype and
    strides of the matmul it replaces. Operators stay opaque here, so that the partitioner weighs
    the packed tensor against the activation and never looks inside the quantizer.
Bails out when
    Never: ``decide`` planned only what this pass can write.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.checkpoint import CheckpointPolicy

from fos_compile.passes.detect import MATMULS
from fos_compile.passes.errors import working_on
from fos_compile.passes.graph_edit import argument, behind, call, size, unpack, value
from fos_compile.passes.provenance import Value, is_backward, value_of
from fos_compile.passes.recipe import OperandSpec, PassConfig
from fos_compile.passes.report import PassReport
from fos_compile.passes.sites import DECISION, KEY, SITE, MatmulSite, Operand, Plan, sites_of

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, slots=True)
class QuantizeKey:
    """Identity of one quantization: equal keys compute equal tensors."""

    value: Value
    transpose: bool
    spec: OperandSpec


@dataclasses.dataclass(frozen=True, slots=True)
class AmaxKey:
    """Identity of one amax; the orientation matters only under the Hadamard transform."""

    value: Value
    rht: bool
    transpose: bool


@dataclasses.dataclass(frozen=True, slots=True)
class _Quantized:
    """Arguments that ``fos::scaled_mm`` takes for one operand."""

    values: fx.Node
    scales: fx.Node
    amax: fx.Node
    qs: float


def insert(graph: fx.Graph, config: PassConfig) -> PassReport:
    """Rewrite every site of ``graph`` that has a Plan."""
    inserter = _Inserter(graph, config)
    planned = [site for site in sites_of(graph) if isinstance(site.node.meta[DECISION], Plan)]
    for site in planned:
        with working_on(site.node):
            inserter.rewrite(site, site.node.meta[DECISION])
    return PassReport(name="insert", changed=len(planned))


class _Inserter:
    """The state of one run: which tensors have a dice stream, the seed they share, and what stands
    for a matmul that another site reads."""

    def __init__(self, graph: fx.Graph, config: PassConfig) -> None:
        self.graph = graph
        self.config = config
        self.tensors: dict[Value, int] = {}
        self.seeds: dict[torch.device, fx.Node] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}

    def rewrite(self, site: MatmulSite, plan: Plan) -> None:
        node, site = site.node, self._current(site)
        a = self._quantize(site, site.a, plan.a) if plan.a else None
        b = self._quantize(site, site.b, plan.b) if plan.b else None
        with self.graph.inserting_before(node):
            if a and b and plan.a:
                new = self._scaled_mm(site, a, b, plan.a.format)
            else:
                new = self._mixed_mm(site, (a, plan.a), (b, plan.b))
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        self.replaced[node] = new
        new.meta[DECISION] = node.meta[DECISION]
        new.meta[SITE] = dataclasses.replace(site, node=new)

    def _current(self, site: MatmulSite) -> MatmulSite:
        """The site with operands that exist: one site's product may be another's operand."""
        a, b = (
            dataclasses.replace(o, source=self.replaced.get(o.source, o.source))
            for o in site.operands
        )
        return dataclasses.replace(site, a=a, b=b)

    def _quantize(self, site: MatmulSite, operand: Operand, spec: OperandSpec) -> _Quantized:
        source = operand.source
        identity = value_of(source)
        index = self.tensors.setdefault(identity, len(self.tensors))
        # W is a graph input that lives until the backward anyway: quantizing it again there keeps
        # nothing in between, so the saved tensors are those of the activations alone.
        late = (
            operand.kind == "weight"
            and is_backward(site.node)
            and not self.config.save_packed_weights
        )
        owner = (
            site.node
            if late or operand.kind == "gradient" or not site.forward
            else site.forward.node
        )
        seed = self._seed(source) if spec.stochastic else None
        # Weights next to their use, so that packed weights of all layers need not live at once;
        # activations where they are born, so that the forward can pack what the backward reads.
        at_use = late or (operand.kind == "weight" and not is_backward(site.node))
        with self.graph.inserting_before(site.node if at_use else behind(source)):
            amax = self._amax(operand, spec, identity, owner)
            node = call(
                self.graph,
                torch.ops.fos.quantize.default,
                (source, amax, seed),
                {
                    "format": spec.format,
                    "scale_rule": spec.scale_rule,
                    "rounding": spec.rounding,
                    "block": spec.block,
                    "rht": spec.rht,
                    "transpose": operand.transpose,
                    "stream": 2 * index + operand.transpose,
                },
                like=owner,
            )
            node.meta[KEY] = QuantizeKey(identity, operand.transpose, spec)
            if late:
                node.meta["partitioner_tag"] = "must_be_in_backward"
                _cast_again(operand)
            values, scales = unpack(self.graph, node, 2)
        return _Quantized(values, scales, amax, spec.qs)

    def _amax(
        self, operand: Operand, spec: OperandSpec, identity: Value, owner: fx.Node
    ) -> fx.Node:
        if spec.format == "mxfp4":  # no tensor scale: docs/contract.md defines amax as 1
            options = {"dtype": torch.float32, "device": value(operand.source).device}
            node = call(self.graph, aten.full.default, ([], 1.0), options, like=owner)
        else:
            transpose = operand.transpose and spec.rht
            node = call(
                self.graph,
                torch.ops.fos.amax.default,
                (operand.source, spec.rht, transpose),
                like=owner,
            )
            node.meta[KEY] = AmaxKey(identity, spec.rht, transpose)
        return node

    def _seed(self, source: fx.Node) -> fx.Node:
        """One draw a step and device, before everything else, reused by recomputation."""
        device = value(source).device
        if device not in self.seeds:
            first = next(node for node in self.graph.nodes if node.op != "placeholder")
            with self.graph.inserting_before(first):
                seed = call(
                    self.graph, torch.ops.fos.seed.default, (), {"device": device}, like=first
                )
            for stale in (
                "nn_module_stack",
                "fwd_nn_module_stack",
                "recompute",
                "ac_graph_id",
                "autograd_backward",
            ):
                seed.meta.pop(stale, None)
            if "partitioner_tag" in first.meta:
                seed.meta["partitioner_tag"] = "is_forward"
            self.seeds[device] = seed
        return self.seeds[device]

    def _scaled_mm(self, site: MatmulSite, a: _Quantized, b: _Quantized, format: str) -> fx.Node:
        node, out_dtype = site.node, value(site.node).dtype
        bias = _bias(node)
        fused = _is_fused(node, bias)
        extent = {
            "m": size(self.graph, site.a.source, -1 if site.a.transpose else -2, before=node),
            "n": size(self.graph, site.b.source, -1 if site.b.transpose else -2, before=node),
            "k": size(self.graph, site.a.source, -2 if site.a.transpose else -1, before=node),
        }
        new = call(
            self.graph,
            torch.ops.fos.scaled_mm.default,
            (
                a.values,
                a.scales,
                a.amax,
                a.qs,
                b.values,
                b.scales,
                b.amax,
                b.qs,
                bias if fused else None,
            ),
            {"format": format, **extent, "out_dtype": out_dtype if fused else torch.float32},
            like=node,
        )
        return new if fused else self._add_bias(node, new, bias)

    def _add_bias(self, node: fx.Node, product: fx.Node, bias: fx.Node | None) -> fx.Node:
        """``beta * bias + alpha * product`` in float32, rounded once, for what is no plain bias."""
        to = torch.ops.prims.convert_element_type.default
        if bias is not None:
            wide = call(self.graph, to, (bias, torch.float32), like=node)
            wide = call(self.graph, aten.mul.Tensor, (wide, node.kwargs.get("beta", 1)), like=node)
        total = call(self.graph, aten.mul.Tensor, (product, node.kwargs.get("alpha", 1)), like=node)
        if bias is not None:
            total = call(self.graph, aten.add.Tensor, (total, wide), like=node)
        return call(self.graph, to, (total, value(node).dtype), like=node)

    def _mixed_mm(
        self, site: MatmulSite, *sides: tuple[_Quantized | None, OperandSpec | None]
    ) -> fx.Node:
        """One quantized operand: dequantize it and keep the matmul."""
        first = MATMULS[site.node.target]
        args: list[Any] = list(site.node.args)
        for position, (operand, (quantized, spec)) in enumerate(
            zip(site.operands, sides, strict=True)
        ):
            if quantized is None or spec is None:
                continue
            rows, cols = (-1, -2) if operand.transpose else (-2, -1)
            dense = call(
                self.graph,
                torch.ops.fos.dequantize.default,
                (
                    quantized.values,
                    quantized.scales,
                    quantized.amax,
                    size(self.graph, operand.source, rows, before=site.node),
                    size(self.graph, operand.source, cols, before=site.node),
                ),
                {"format": spec.format, "qs": quantized.qs, "dtype": value(site.node).dtype},
                like=site.node,
            )
            # Rows over K are the left operand itself and the transpose of the right one.
            if position == 1:
                # aten.transpose is decomposed before Inductor sees a graph: it knows permute alone.
                order = [
                    *range(value(dense).ndim - 2),
                    value(dense).ndim - 1,
                    value(dense).ndim - 2,
                ]
                dense = call(self.graph, aten.permute.default, (dense, order), like=site.node)
            args[first + position] = dense
        matmul: Any = site.node.target
        return call(self.graph, matmul, tuple(args), dict(site.node.kwargs), like=site.node)


def _cast_again(weight: Operand) -> None:
    """Keep the partitioner from saving what autocast made of a parameter that lives on anyway."""
    if weight.root.op != "placeholder":
        return
    node = weight.source
    while node is not weight.root:
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        node = argument(node, 0)


def _bias(node: fx.Node) -> fx.Node | None:
    """The additive operand, if there is one that counts: ``beta=0`` means that it is not read."""
    if MATMULS[node.target] == 0 or node.kwargs.get("beta", 1) == 0:
        return None
    bias: fx.Node = argument(node, 0)
    return bias


def _is_fused(node: fx.Node, bias: fx.Node | None) -> bool:
    """Whether ``fos::scaled_mm`` can do all of it: it adds an unscaled N-vector at most."""
    if node.kwargs.get("alpha", 1) != 1:
        return False
    if bias is None:
        return True
    # Broadcasting over M is provable only from the rank; a vector of length 1 is not a bias of N.
    full = value(bias).ndim == 1 and statically_known_true(
        value(bias).shape[0] == value(node).shape[-1]
    )
    return bool(full and node.kwargs.get("beta", 1) == 1)
