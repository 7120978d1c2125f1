"""The facts about one matmul of a traced graph, and what was decided about it."""

from __future__ import annotations

import dataclasses

from torch import fx

from fos_compile.passes.recipe import Kind, OperandSpec, Role


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Operand:
    """One side of a matmul, as rows over K: quantizing ``source`` (or its transpose) gives it."""

    kind: Kind
    source: fx.Node
    """The tensor the matmul reads, [.., R, C], behind transpositions of the last two dims."""
    transpose: bool
    """K runs along the rows of ``source``: quantize its transpose."""
    root: fx.Node
    """The tensor behind all views and casts; a placeholder for an ordinary weight."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MatmulSite:
    """One matmul ``a [.., M, K] @ b [.., K, N]``; sizes may be symbolic."""

    index: int
    """Position among the matmuls of the graph, in graph order."""
    node: fx.Node
    path: str
    """Module path as in ``named_modules``; empty for code outside modules."""
    role: Role | None
    """None for a backward matmul that belongs to no forward matmul of the graph."""
    a: Operand
    b: Operand
    functional: bool
    """Whether an operand is a tensor given to the graph on which the other does not depend: a
    weight passed as an argument, as far as a graph can tell."""
    batch: str
    m: str
    n: str
    k: str
    """Sizes as text, since they may be symbolic expressions."""
    forward: MatmulSite | None = None
    """For dgrad and wgrad: the forward site that it differentiates."""

    @property
    def operands(self) -> tuple[Operand, Operand]:
        """Both sides, left first."""
        return self.a, self.b

    @property
    def weight(self) -> Operand | None:
        """The side that is a parameter, the right one if both are."""
        return next((o for o in (self.b, self.a) if o.kind == "weight"), None)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Quantize the operands of a site by these specs; None keeps that side in high precision."""

    a: OperandSpec | None
    b: OperandSpec | None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rejection:
    """Why a site is left alone. ``code`` is stable, ``text`` is for people."""

    code: str
    text: str


SITE = "fos_site"
DECISION = "fos_decision"
"""Keys under which ``node.meta`` carries a site and its Plan or Rejection between passes."""
KEY = "fos_key"
"""What a quantize or amax node computes, from ``insert`` for ``share``."""
FACTS = (SITE, DECISION, KEY)
DONE = "fos_done"
"""Marks the nodes of a graph that all passes have seen, or that one has failed on."""


def sites_of(graph: fx.Graph) -> list[MatmulSite]:
    """The sites that ``detect`` left in the metadata, in graph order."""
    return [node.meta[SITE] for node in graph.nodes if SITE in node.meta]
