"""When to warn that nothing was quantized: once, and not for a part of a model that has its share
elsewhere."""

from __future__ import annotations

import logging

from torch import fx

from fos_compile.passes.errors import is_users, stack, warn
from fos_compile.passes.report import Report

log = logging.getLogger("fos_compile")
_said: set[tuple[str, ...]] = set()
"""Place, recipe and reasons of every warning since the last ``torch.compiler.reset``."""


def forget() -> None:
    """Warn again about what was said."""
    _said.clear()


def warn_if_nothing_is(report: Report, *, is_part: bool) -> None:
    """Warn if all matmuls of a graph were left alone, or if a whole model has none."""
    if report.quantized or report.failure or report.recipe == "bf16":
        return
    if is_part and not report.sites:
        log.info("a part of the compiled function has no matmul")
        return
    caller = next((frame for frame in stack() if is_users(frame)), None)
    place = f"{caller.f_code.co_filename}:{caller.f_lineno}" if caller else ""
    said = (place, report.recipe, *sorted(report.reasons()))
    if said in _said:
        return
    _said.add(said)
    reasons = "; ".join(f"{count}x {reason}" for reason, count in report.reasons().items())
    warn(
        f"fouroversix quantized nothing (recipe {report.recipe!r}): "
        f"{reasons or 'the graph has no matmul'}"
    )


def is_part(gm: fx.GraphModule) -> bool:
    """Whether ``gm`` is a part of what the user compiled: a graph break ends it, or Dynamo met its
    function while a broken one was running."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        return True
    in_dynamo = False
    for frame in stack():
        module = frame.f_globals.get("__name__", "")
        if module == "torch._dynamo.convert_frame":
            in_dynamo = True
        elif in_dynamo and module == "torch._dynamo.eval_frame":
            return False
        elif in_dynamo and is_users(frame):
            return True
    return False
