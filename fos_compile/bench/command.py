"""The command `bench matmul`: its arguments, and where its results go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fos_compile.bench import cases, matmul, providers, tuning
from fos_compile.bench.timing import default_device
from fos_compile.kernels import formats
from fos_compile.kernels.errors import InvalidArgument

DEFAULT_SHAPES = "squares,mlp,decode"
QUICK_SECONDS, SECONDS = 0.02, 0.3


def run(
    shapes: str | None,
    *,
    quick: bool,
    device: str | None,
    format: str,
    model: bool,
    tune: bool,
    md: Path | None,
    csv: Path | None,
    echo: Callable[[str], object],
) -> matmul.Report:
    """Measure, print, and write what is asked for.

    Raises:
        InvalidArgument: of shapes, format, or files that cannot be written.
    """
    if format not in formats.FORMATS:
        required = f"one of {', '.join(formats.FORMATS)}"
        raise InvalidArgument("bench", "format", required, repr(format))
    where = default_device() if device is None else torch.device(device)
    # Of the others a CPU would take hours.
    default = "quick" if quick or where.type == "cpu" else DEFAULT_SHAPES
    chosen = cases.parse(default if shapes is None else shapes)
    _writable(md, csv)
    seconds = QUICK_SECONDS if quick else SECONDS
    tuned = tuning.tune_all(chosen, device=where, format=format) if tune else []
    report = matmul.run(chosen, device=where, format=format, seconds=seconds)
    rows, log = list(report.rows), [*tuned, *report.log]
    if model:
        found, line = _mlp(where, seconds)
        rows += found
        log.append(line)
    report = matmul.Report(rows, log)
    text = matmul.text_of(report, matmul.header(where))
    echo(text)
    if md is not None:
        md.write_text(text)
    if csv is not None:
        matmul.write_csv(csv, rows)
    return report


def _mlp(device: torch.device, seconds: float) -> tuple[list[matmul.Row], str]:
    try:
        return matmul.mlp_rows(device, seconds), "MLP, training: timed"
    except Exception as error:  # the table of products is worth keeping
        return [], f"MLP, training: FAILED: {providers.said(error)}"


def _writable(*files: Path | None) -> None:
    """Complain before an hour is spent."""
    for file in files:
        if file is not None and (file.is_dir() or not file.resolve().parent.is_dir()):
            raise InvalidArgument("bench", "a result", "a file in a folder that exists", str(file))
