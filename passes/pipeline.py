"""The order of the passes, and the one place that runs, times, checks and undoes them.

1. ``detect``  which matmuls there are
2. ``decide``  which of them the recipe quantizes
3. ``insert``  quantize operators and scaled matmuls; after ``decide``, so that it cannot half-apply
4. ``share``   after ``insert``, which is simpler for not knowing about other sites
   ---- the partitioner cuts the joint graph into forward and backward ----
5. ``lower``   after the cut, so that the partitioner saves packed tensors
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import fx

from fos_compile.passes.decide import decide, unused_patterns
from fos_compile.passes.detect import detect
from fos_compile.passes.errors import PassError, running, warn
from fos_compile.passes.insert import insert
from fos_compile.passes.lower import lower
from fos_compile.passes.provenance import Origin, mark_inputs
from fos_compile.passes.recipe import PassConfig
from fos_compile.passes.report import PassReport, Report, collect
from fos_compile.passes.share import share
from fos_compile.passes.sites import DONE, sites_of

log = logging.getLogger("fos_compile")

Pass = Callable[[fx.Graph, PassConfig], PassReport]
REWRITE: tuple[Pass, ...] = (detect, decide, insert, share)
LOWER: tuple[Pass, ...] = (lower,)


def rewrite(
    graph: fx.Graph, config: PassConfig, inputs: Mapping[int, Origin] | None = None
) -> Report:
    """Quantize the matmuls of a joint or inference graph in place.

    Args:
        graph: joint graph (training) or inference graph.
        config: recipe and guards.
        inputs: for :func:`fos_compile.passes.provenance.mark_inputs`; None if that was done.

    Raises:
        PassError: a pass failed and ``config.strict`` is set. Otherwise the graph of the owning
            module is put back, and a warning and the report say what failed.
    """
    owner = graph.owning_module
    try:
        with _put_back_on_failure(graph, config):
            with running("mark"):
                mark_inputs(graph, inputs or {})
            passes = _run(REWRITE, graph, config)
            with running("report"):
                report = _report(graph, config, passes)
    except PassError as error:
        if config.strict:
            raise
        warn(f"{error.summary}; fell back to the untouched graph")
        failure = f"{error.summary}; the graph was left untouched"
        report = Report(recipe=config.recipe.name, failure=failure)
    for node in (owner.graph if owner is not None else graph).nodes:
        node.meta[DONE] = True
    return report


def lower_graph(graph: fx.Graph, config: PassConfig) -> tuple[PassReport, ...]:
    """Run the passes behind the partitioner on a forward, backward or inference graph.

    Raises:
        PassError: a pass failed; without ``config.strict`` the owning module has its graph back.
    """
    with _put_back_on_failure(graph, config):
        return _run(LOWER, graph, config)


@contextlib.contextmanager
def _put_back_on_failure(graph: fx.Graph, config: PassConfig) -> Iterator[None]:
    backup = None if config.strict else _copy(graph)
    try:
        yield
    except PassError:
        if backup is not None:
            owner = graph.owning_module
            assert owner is not None
            owner.graph = backup
        raise


def _run(passes: tuple[Pass, ...], graph: fx.Graph, config: PassConfig) -> tuple[PassReport, ...]:
    reports = []
    for each in passes:
        start = time.perf_counter()
        with running(each.__name__):
            report = each(graph, config)
            if report.changed:
                graph.lint()
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


def _report(graph: fx.Graph, config: PassConfig, passes: tuple[PassReport, ...]) -> Report:
    ops = torch.ops.fos
    written = (ops.quantize.default, ops.quantize_pair.default)
    shared = (note for each in passes for note in each.notes if note.endswith(" shared"))
    return Report(
        recipe=config.recipe.name,
        sites=collect(graph),
        passes=passes,
        quantizations=sum(node.target in written and DONE not in node.meta for node in graph.nodes),
        shared=sum(int(note.split()[0]) for note in shared),
        unused=unused_patterns(sites_of(graph), config),
    )


def _copy(graph: fx.Graph) -> fx.Graph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # copying a joint graph's tree specs warns
        return copy.deepcopy(graph)


def _timed(report: PassReport, seconds: float) -> PassReport:
    return PassReport(name=report.name, changed=report.changed, notes=report.notes, seconds=seconds)
