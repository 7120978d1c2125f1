"""Pass: turn every matmul site into a plan or a rejection with a reason.

Problem
    Not every matmul should run in four bits: output heads, routers, attention products, float32
    numerics and tiny weights lose accuracy or gain nothing.
Before
    sites, from ``detect``
After
    ``node.meta["fos_decision"]`` is a :class:`Plan` or a :class:`Rejection`
Why legal
    Only metadata changes. No rule looks at a token dimension, so no size is guarded: the operators
    pad, and decode (M = 1) or a symbolic batch takes the same plan as a large one.
Bails out when
    Never; rules are tried in the order of ``RULES`` and the first reason wins.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Sequence

import torch

from fos_compile.passes.errors import working_on
from fos_compile.passes.graph_edit import argument, value
from fos_compile.passes.provenance import is_backward, is_traced_backward
from fos_compile.passes.recipe import OperandSpec, PassConfig, Recipe
from fos_compile.passes.report import PassReport
from fos_compile.passes.sites import DECISION, MatmulSite, Operand, Plan, Rejection, sites_of

aten = torch.ops.aten
_BATCHED = {aten.bmm.default, aten.baddbmm.default}
_LOOKUPS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default}
_DTYPES = (torch.bfloat16, torch.float16)

Rule = Callable[[MatmulSite, PassConfig], Rejection | None]


def decide(graph: torch.fx.Graph, config: PassConfig) -> PassReport:
    """Attach a Plan or a Rejection to every site of ``graph``."""
    planned = 0
    sites = sites_of(graph)
    for site in sites:
        with working_on(site.node):
            decision = _rejection(site, config) or _plan(site, config)
        site.node.meta[DECISION] = decision
        planned += isinstance(decision, Plan)
    return PassReport(name="decide", changed=0, notes=(f"{planned} of {len(sites)} planned",))


def matches(path: str, pattern: str) -> bool:
    """A glob matches a module path, its last components (``lm_head``, ``mlp.*``), or a module that
    contains it: ``encoder`` covers ``encoder.0.up``."""
    parts = path.split(".")
    modules = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return any(
        fnmatch.fnmatchcase(module, pattern) or fnmatch.fnmatchcase(module, f"*.{pattern}")
        for module in modules
    )


def recipe_for(path: str, config: PassConfig) -> Recipe:
    """The first override that matches ``path``, else the config's recipe."""
    for pattern, recipe in config.overrides:
        if matches(path, pattern):
            return recipe
    return config.recipe


def unused_patterns(sites: Sequence[MatmulSite], config: PassConfig) -> tuple[str, ...]:
    """The globs of ``overrides`` and of the user's ``skip`` that match no site."""
    usual = PassConfig(recipe=config.recipe).skip
    patterns = [p for p in config.skip if p not in usual] + [p for p, _ in config.overrides]
    return tuple(p for p in patterns if not any(matches(site.path, p) for site in sites))


def _no_forward(site: MatmulSite, config: PassConfig) -> Rejection | None:
    if site.role is not None:
        return None
    if is_traced_backward(site.node):
        return Rejection(code="traced_backward", text="backward traced into the forward")
    if is_backward(site.node):
        return Rejection(code="unlinked", text="backward matmul of no forward matmul in this graph")
    return Rejection(code="gradient", text="product with a gradient (optimizer arithmetic)")


def _forward_rejected(site: MatmulSite, config: PassConfig) -> Rejection | None:
    if site.forward is None:
        return None
    decision = site.forward.node.meta.get(DECISION)
    # A recipe may keep one product in high precision and quantize the others.
    if isinstance(decision, Rejection) and decision.code != "recipe":
        return decision
    return None


def _no_operator(site: MatmulSite, config: PassConfig) -> Rejection | None:
    if site.node.target is aten._grouped_mm.default:
        return Rejection(code="no_operator", text="_grouped_mm has no scaled counterpart yet")
    return None


def _skipped(site: MatmulSite, config: PassConfig) -> Rejection | None:
    for pattern in config.skip:
        if matches(site.path, pattern):
            return Rejection(code="skip", text=f"module matches skip pattern {pattern!r}")
    return None


def _dtype(site: MatmulSite, config: PassConfig) -> Rejection | None:
    dtype = value(site.node).dtype
    if dtype in _DTYPES:
        return None
    name = str(dtype).removeprefix("torch.")
    hint = "; run it under autocast(dtype=torch.bfloat16)" if dtype == torch.float32 else ""
    return Rejection(
        code="dtype", text=f"{name} matmul: only bfloat16 and float16 are quantized{hint}"
    )


def _no_parameter(site: MatmulSite, config: PassConfig) -> Rejection | None:
    # A graph cannot tell q and k that it is given from x and a weight that it is given; it can tell
    # them once one was computed, from the other or from something else than a parameter.
    batched = site.node.target in _BATCHED
    if site.role != "fprop":
        return None
    if site.weight is not None and site.a.root is site.b.root:
        return Rejection(code="no_parameter", text="product of a tensor with itself (similarities)")
    given = site.functional and config.given_weights and not batched
    if site.weight is not None or given:
        return None
    if any(_looks_up_parameter(operand.root) for operand in site.operands):
        text = "product with a part of a parameter picked by index (gathered experts)"
    elif batched:
        text = "batched product of two activations (attention)"
    else:
        text = "product of two activations (attention, similarities, optimizer arithmetic)"
    return Rejection(code="no_parameter", text=text)


def _looks_up_parameter(node: torch.fx.Node) -> bool:
    return node.target in _LOOKUPS and "fos_input" in argument(node, 0).meta


def _tied_head(site: MatmulSite, config: PassConfig) -> Rejection | None:
    weight = site.weight
    if site.role == "fprop" and weight is not None:
        lookups = (user for user in weight.root.users if user.target in _LOOKUPS)
        if any(argument(user, 0) is weight.root for user in lookups):
            return Rejection(code="tied_head", text="weight is shared with an embedding table")
    return None


def _small_weight(site: MatmulSite, config: PassConfig) -> Rejection | None:
    if site.weight is None or site.role != "fprop":
        return None
    extents = value(site.weight.source).shape[-2:]
    if any(isinstance(extent, int) and extent < config.min_weight_dim for extent in extents):
        text = f"weight {list(extents)} has a dimension below {config.min_weight_dim}"
        return Rejection(code="small_weight", text=text)
    return None


def _recipe(site: MatmulSite, config: PassConfig) -> Rejection | None:
    recipe = recipe_for(site.path, config)
    plan = _plan(site, config)
    if plan.a is None and plan.b is None:
        return Rejection(
            code="recipe", text=f"recipe {recipe.name!r} keeps {site.role} in high precision"
        )
    return None


RULES: tuple[Rule, ...] = (
    _no_forward,
    _forward_rejected,
    _no_operator,
    _skipped,
    _no_parameter,
    _dtype,
    _tied_head,
    _small_weight,
    _recipe,
)


def _rejection(site: MatmulSite, config: PassConfig) -> Rejection | None:
    for rule in RULES:
        if (rejection := rule(site, config)) is not None:
            return rejection
    return None


def _plan(site: MatmulSite, config: PassConfig) -> Plan:
    assert site.role is not None
    token_side, other_side = recipe_for(site.path, config).operands(site.role)
    if site.role == "fprop":
        # The weight may stand on either side (x @ w.T or w @ x); without one, b plays its part.
        weight = site.weight or site.b
        pick = {True: other_side, False: token_side}
        return Plan(a=_fit(pick[site.a is weight], site.a), b=_fit(pick[site.b is weight], site.b))
    a_is_gradient = site.a.kind == "gradient"
    specs = (token_side, other_side) if a_is_gradient else (other_side, token_side)
    return Plan(a=_fit(specs[0], site.a), b=_fit(specs[1], site.b))


def _fit(spec: OperandSpec | None, operand: Operand) -> OperandSpec | None:
    """2D tiles exist so that a weight and its transpose agree. In a product of two activations the
    one that plays the weight's part has no parameter to agree with: it gets 1D blocks."""
    if spec is not None and spec.block == "2d" and operand.kind != "weight":
        return dataclasses.replace(spec, block="1d")
    return spec
