"""The order of the passes, and the one place that runs, times, checks and undoes them.

1. ``detect``  which matmuls there are
2. ``decide``  which of them the recipe quantizes
3. ``insert``  quantize operators and scaled matmuls; after ``decide``, so that it cannot half-apply
4. ``share``   after ``insert``, which is simpler for not knowing about other sites
   ---- the partitioner cuts the joint graph into forward and backward ----
5. ``lower``   after the cut, so that the partitioner saves packed tensors
"""

from __future__ import annotations

import copy
import logging
import time
import warnings
from collections.abc import Callable

import torch
from torch import fx

from fos_compile.passes.decide import decide
from fos_compile.passes.detect import detect
from fos_compile.passes.errors import PassError, running
from fos_compile.passes.insert import insert
from fos_compile.passes.lower import lower
from fos_compile.passes.recipe import PassConfig
from fos_compile.passes.report import PassReport, Report, collect
from fos_compile.passes.share import share

log = logging.getLogger("fos_compile")

Pass = Callable[[fx.Graph, PassConfig], PassReport]
REWRITE: tuple[Pass, ...] = (detect, decide, insert, share)
LOWER: tuple[Pass, ...] = (lower,)


class FosCompileWarning(UserWarning):
    """Something was left in high precision that the user may have expected in four bits."""


def rewrite(graph: fx.Graph, config: PassConfig) -> Report:
    """Quantize the matmuls of a joint or inference graph in place.

    Args:
        graph: joint graph (training) or inference graph, placeholders marked by
            :func:`fos_compile.passes.provenance.mark_parameters`.
        config: recipe and guards.

    Raises:
        PassError: a pass failed and ``config.strict`` is set. Otherwise the graph of the owning
            module is put back and the report says what failed.
    """
    try:
        passes = _run(REWRITE, graph, config)
    except PassError as error:
        if config.strict:
            raise
        return Report(recipe=config.recipe.name, failure=error.summary)
    ops = torch.ops.fos
    quantizations = sum(
        n.target in (ops.quantize.default, ops.quantize_pair.default) for n in graph.nodes
    )
    shared = sum(
        int(note.split()[0]) for p in passes for note in p.notes if note.endswith(" shared")
    )
    return Report(
        recipe=config.recipe.name,
        sites=collect(graph),
        passes=passes,
        quantizations=quantizations,
        shared=shared,
    )


def lower_graph(graph: fx.Graph, config: PassConfig) -> tuple[PassReport, ...]:
    """Run the passes behind the partitioner on a forward, backward or inference graph."""
    try:
        return _run(LOWER, graph, config)
    except PassError:
        if config.strict:
            raise
        return ()


def _run(passes: tuple[Pass, ...], graph: fx.Graph, config: PassConfig) -> tuple[PassReport, ...]:
    backup = None if config.strict else _copy(graph)
    reports = []
    for each in passes:
        start = time.perf_counter()
        try:
            with running(each.__name__):
                report = each(graph, config)
                if report.changed:
                    graph.lint()
        except PassError as error:
            if backup is None:
                raise
            owner = graph.owning_module
            assert owner is not None
            owner.graph = backup
            warnings.warn(
                f"{error.summary}; fell back to the untouched graph",
                FosCompileWarning,
                stacklevel=2,
            )
            raise
        seconds = time.perf_counter() - start
        log.debug(
            "pass %s: %d changes, %s, %.3f s",
            report.name,
            report.changed,
            ", ".join(report.notes),
            seconds,
        )
        reports.append(_timed(report, seconds))
    return tuple(reports)


def _copy(graph: fx.Graph) -> fx.Graph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # copying a joint graph's tree specs warns
        return copy.deepcopy(graph)


def _timed(report: PassReport, seconds: float) -> PassReport:
    return PassReport(name=report.name, changed=report.changed, notes=report.notes, seconds=seconds)
