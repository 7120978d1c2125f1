"""What the demo leaves behind: a table on the terminal, a plot and numbers on disk."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from fos_compile.demo.training import TrainingRun

_MISSING = "-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the demo's table; None prints as a dash.

    Attributes:
        train_loss: mean over the last tenth of training, in bits per byte.
        heldout: bits per byte of held-out text.
        saved_bytes: bytes kept from forward to backward of one step.
    """

    name: str
    recipe: str
    train_loss: float | None
    heldout: float
    gap: float | None
    weight_bytes: int
    saved_bytes: int | None
    step_ms: float | None = None


def training_table(rows: Sequence[Row]) -> Table:
    """Return the table of the three trainings."""
    table = Table(title="Training: same model, seed and data; only the recipe differs")
    for column in ("", "recipe"):
        table.add_column(column)
    for column in (
        "train loss\nbits/byte",
        "held-out\nbits/byte",
        "gap to\nbf16",
        "weights\nMiB",
        "saved\nMiB",
        "ms per\nstep",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            row.recipe,
            _number(row.train_loss),
            _number(row.heldout),
            _gap(row.gap),
            _mebibytes(row.weight_bytes),
            _mebibytes(row.saved_bytes),
            f"{row.step_ms:.0f}" if row.step_ms is not None else _MISSING,
        )
    return table


def inference_table(rows: Sequence[Row]) -> Table:
    """Return the table of the bf16-trained model, evaluated in four bits."""
    table = Table(title="Inference: the model trained in bf16, weights and activations in FP4")
    table.add_column("")
    table.add_column("options")
    for column in ("held-out\nbits/byte", "gap to\nbf16", "weights\nMiB"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            row.recipe,
            _number(row.heldout),
            _gap(row.gap),
            _mebibytes(row.weight_bytes),
        )
    return table


def _number(value: float | None) -> str:
    return _MISSING if value is None else f"{value:.4f}"


def _gap(value: float | None) -> str:
    return _MISSING if value is None else f"{value:+.4f}"


def _mebibytes(value: int | None) -> str:
    return _MISSING if value is None else f"{value / 2**20:.2f}"


def write_json(path: Path, payload: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]) -> None:
    """Write `payload` and the tables' rows as JSON."""
    tables = {name: [dataclasses.asdict(row) for row in part] for name, part in rows.items()}
    path.write_text(json.dumps({**payload, **tables}, indent=1) + "\n")


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return trailing means over up to `window` values."""
    total, means = 0.0, []
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means


def plot_losses(path: Path, runs: Mapping[str, Sequence[TrainingRun]], *, baseline: str) -> None:
    """Draw the loss curves, and below them their distance to `baseline`, one line a seed.

    Raises:
        RuntimeError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise RuntimeError(
            'demo: matplotlib must be installed; run pip install "fos-compile[demo]"'
        ) from error
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    losses, gaps = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    bits = {
        name: {run.seed: [loss / math.log(2) for loss in run.losses] for run in part}
        for name, part in runs.items()
    }
    for color, (name, by_seed) in enumerate(bits.items()):
        for index, (seed, values) in enumerate(by_seed.items()):
            window = max(1, len(values) // 20)
            style: dict[str, Any] = {"color": f"C{color}", "label": None if index else name}
            losses.plot(smoothed(values, window), linewidth=1.2, **style)
            reference = bits.get(baseline, {}).get(seed)
            if name != baseline and reference is not None:
                apart = [a - b for a, b in zip(values, reference, strict=True)]
                gaps.plot(smoothed(apart, window), linewidth=1.2, **style)
    losses.set_ylabel("training loss (bits per byte)")
    losses.legend()
    gaps.axhline(0, color="black", linewidth=0.6)
    gaps.set_ylabel(f"distance to {baseline}")
    gaps.set_xlabel("step (trailing mean over 5% of the steps)")
    figure.savefig(path, dpi=120)
