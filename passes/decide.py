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
from collections.abc import Callable

import torch

from fos_compile.passes.errors import working_on
from fos_compile.passes.graph_edit import value
from fos_compile.passes.recipe import OperandSpec, PassConfig, Recipe
from fos_compile.passes.report import PassReport
from fos_compile.passes.sites import DECISION, MatmulSite, Operand, Plan, Rejection, sites_of

aten = torch.ops.aten
_BATCHED = {aten.bmm.default, aten.baddbmm.default}
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
    """A glob matches a whole module path or its last components (``lm_head``, ``mlp.*``)."""
    return fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"*.{pattern}")


def recipe_for(path: str, config: PassConfig) -> Recipe:
    """The first override that matches ``path``, else the config's recipe."""
    for pattern, recipe in config.overrides:
        if matches(path, pattern):
            return recipe
    return config.recipe


def _no_forward(site: MatmulSite, config: PassConfig) -> Rejection | None:
    if site.role is None:
        return Rejection(code="unlinked", text="backward matmul of no forward matmul in this graph")
    return None


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
    if site.role == "fprop" and site.node.target in _BATCHED and site.weight is None:
        return Rejection(code="no_parameter", text="batched product of two activations (attention)")
    return None


def _tied_head(site: MatmulSite, config: PassConfig) -> Rejection | None:
    weight = site.weight
    if site.role == "fprop" and weight is not None:
        if any(user.target is aten.embedding.default for user in weight.root.users):
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
    """2D tiles exist so that a weight and its transpose agree; other operands get 1D blocks."""
    if spec is not None and spec.block == "2d" and operand.kind != "weight":
        return dataclasses.replace(spec, block="1d")
    return spec
