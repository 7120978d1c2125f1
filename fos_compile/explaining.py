"""``explain``: what would happen to every matmul of a model, without compiling it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from fos_compile.backend import trace
from fos_compile.config import parse_options
from fos_compile.kernels.own_code import own_code
from fos_compile.passes.recipe import Recipe
from fos_compile.passes.report import Report, merge


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    recipe: str | Recipe | None = None,
    options: Any = None,
    **kwargs: Any,
) -> Report:
    """Trace ``model(*inputs, **kwargs)`` and say what the backend does with each matmul.

    Nothing is compiled: the model runs once in eager mode, in high precision. With gradients
    enabled and parameters that require them the backward is traced and reported too. A model and
    inputs on the meta device work, so an 8B model is explained without its memory.

    Args:
        model: a module, function or already compiled module.
        inputs: example inputs.
        recipe: as in ``options``; default: ``training`` if there is a backward, else ``inference``.
        options: the ``options`` dict of ``torch.compile(..., backend="fouroversix")``.
        kwargs: keyword arguments of the model.

    Returns:
        A :class:`~fos_compile.Report`; print it.
    """
    config = parse_options(
        {**(options or {}), **({"recipe": recipe} if recipe is not None else {})}
    )
    reports: list[Report] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        reports.append(trace(gm, example_inputs, config))
        return gm.forward

    target = _separate(getattr(model, "_orig_mod", model))
    # What lies behind a graph break keeps its code object, and every call here is a new backend.
    with torch._dynamo.config.patch(
        recompile_limit=_NO_LIMIT, accumulated_recompile_limit=_NO_LIMIT
    ):
        torch.compile(target, backend=backend)(*inputs, **kwargs)
    if not reports:
        return Report(recipe=config.pass_config(training=False).recipe.name)
    return merge(reports)


_NO_LIMIT = 2**31 - 1


def _separate(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model in a function of its own, so that no trace counts against later compilations."""
    if not isinstance(model, torch.nn.Module):
        return own_code(model)

    def call(*inputs: Any, **kwargs: Any) -> Any:
        return model(*inputs, **kwargs)

    return own_code(call)
