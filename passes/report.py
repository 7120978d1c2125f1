"""What happened to every matmul: frozen data that prints as a table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx

from fos_compile.passes.operators import implementation_of
from fos_compile.passes.sites import DECISION, MatmulSite, Plan, Rejection, sites_of


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PassReport:
    """What one pass did. ``changed`` = 0 promises that the graph text is untouched."""

    name: str
    changed: int
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SiteReport:
    """One matmul site of one graph."""

    path: str
    """Module path; empty for code outside modules."""
    role: str
    """fprop, dgrad, wgrad, or ``?`` for a backward matmul of no forward one."""
    shape: str
    """``[batch x] M x N x K``; symbolic where the graph is."""
    a: str
    """How the left operand is quantized: format, block, scale rule, sr, rht; ``-`` if it is not."""
    b: str
    """The same for the right operand."""
    implementation: str
    """Which implementation of the matmul runs; empty for a rejected site."""
    reason_code: str
    """Empty for a quantized site, else a stable code such as ``skip`` or ``dtype``."""
    reason: str
    flops: int | None
    """2*M*N*K; None if a size is symbolic."""
    bytes_saved: int | None
    """Bytes of the operands at 16 bits minus packed; None if symbolic, 0 if rejected."""

    @property
    def quantized(self) -> bool:
        """Whether an operand runs in four bits."""
        return not self.reason_code


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All sites of one compiled region, with totals. ``str(report)`` is an aligned table."""

    recipe: str
    sites: tuple[SiteReport, ...] = ()
    passes: tuple[PassReport, ...] = ()
    quantizations: int = 0
    """Quantize operators in the graph after sharing; a pair counts once."""
    shared: int = 0
    """Quantizations that another site's made unnecessary."""
    failure: str = ""
    """Set when a pass failed: pass, node, error, and what runs instead."""
    unused: tuple[str, ...] = ()
    """Globs of ``skip`` and ``overrides`` that match no matmul of the graph."""

    @property
    def quantized(self) -> tuple[SiteReport, ...]:
        """Sites with a quantized operand."""
        return tuple(site for site in self.sites if site.quantized)

    @property
    def rejected(self) -> tuple[SiteReport, ...]:
        """Sites left in high precision."""
        return tuple(site for site in self.sites if not site.quantized)

    @property
    def flops(self) -> int:
        """FLOPs of all sites with static sizes."""
        return sum(site.flops or 0 for site in self.sites)

    @property
    def fp4_flops(self) -> int:
        """FLOPs of sites with both operands in four bits."""
        return sum(site.flops or 0 for site in self.quantized if "-" not in (site.a, site.b))

    @property
    def bytes_saved(self) -> int:
        """Sum over the quantized sites with static sizes."""
        return sum(site.bytes_saved or 0 for site in self.quantized)

    @property
    def pass_seconds(self) -> float:
        """Time of all passes before partitioning."""
        return sum(each.seconds for each in self.passes)

    def reasons(self) -> Counter[str]:
        """How many sites were left alone for which reason."""
        return Counter(site.reason for site in self.rejected)

    def summary(self) -> str:
        """One line: sites, share of the FLOPs, quantizations, operand bytes."""
        share = f"{100 * self.fp4_flops / self.flops:.1f}%" if self.flops else "n/a"
        return (
            f"recipe {self.recipe}: {len(self.quantized)} of {len(self.sites)} matmuls quantized, "
            f"{share} of FLOPs in FP4, {self.quantizations} quantizations ({self.shared} shared), "
            f"operands {self.bytes_saved / 2**20:.2f} MiB smaller"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """Header and one row a site, as text."""
        header = ("module", "role", "M x N x K", "a", "b", "runs as / reason")
        body = [
            (
                s.path or "(no module)",
                s.role,
                s.shape,
                s.a,
                s.b,
                s.implementation or f"left alone: {s.reason}",
            )
            for s in self.sites
        ]
        return [header, *body]

    def __str__(self) -> str:
        lines = [*align(self.rows()), self.summary()]
        if self.sites and self.unused:
            lines.append(f"note: no matmul matches {', '.join(map(repr, self.unused))}")
        if self.failure:
            lines.append(f"failed: {self.failure}")
        return "\n".join(lines)


def merge(reports: Sequence[Report]) -> Report:
    """One report for a model that was traced as several graphs (graph breaks, nested regions)."""
    if len(reports) == 1:
        return reports[0]
    speaking = [r for r in reports if r.sites] or reports
    unused = dict.fromkeys(p for r in speaking for p in r.unused)
    return Report(
        recipe=", ".join(dict.fromkeys(r.recipe for r in speaking)),
        sites=tuple(site for r in reports for site in r.sites),
        passes=tuple(each for r in reports for each in r.passes),
        quantizations=sum(r.quantizations for r in reports),
        shared=sum(r.shared for r in reports),
        failure="; ".join(r.failure for r in reports if r.failure),
        unused=tuple(p for p in unused if all(p in r.unused for r in speaking)),
    )


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of left-aligned columns, a rule below the first."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def site_report(site: MatmulSite) -> SiteReport:
    """The row of ``site`` in a rewritten graph."""
    decision = site.node.meta[DECISION]
    shape = " x ".join(([site.batch] if site.batch else []) + [site.m, site.n, site.k])
    rejected = isinstance(decision, Rejection)
    flops = _product(2, site.batch or "1", site.m, site.n, site.k)
    return SiteReport(
        path=site.path,
        role=site.role or "?",
        shape=shape,
        a="-" if rejected or decision.a is None else str(decision.a),
        b="-" if rejected or decision.b is None else str(decision.b),
        implementation="" if rejected else implementation_of(site.node),
        reason_code=decision.code if rejected else "",
        reason=decision.text if rejected else "",
        flops=flops,
        bytes_saved=0 if rejected else _bytes_saved(site, decision),
    )


def _bytes_saved(site: MatmulSite, plan: Plan) -> int | None:
    saved = 0
    for rows, spec in ((site.m, plan.a), (site.n, plan.b)):
        elements = _product(1, site.batch or "1", rows, site.k)
        if elements is None:
            return None
        if spec is not None:
            block = 16 if spec.format == "nvfp4" else 32
            saved += 2 * elements - elements // 2 - elements // block
    return saved


def _product(*factors: Any) -> int | None:
    result = 1
    for factor in factors:
        if not str(factor).isdigit():
            return None
        result *= int(factor)
    return result


def collect(graph: fx.Graph) -> tuple[SiteReport, ...]:
    """Rows of all sites that ``detect`` and ``decide`` left in ``graph``'s metadata."""
    return tuple(site_report(site) for site in sites_of(graph))
