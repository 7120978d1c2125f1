"""How far does training in NVFP4, with and without 4/6, end from training in bf16?

Trains the demo's larger model from scratch on the standard library's source, for every recipe and
seed: same initial weights, same batches, same compiler, only the recipe differs. The gap is taken
within a seed, so that luck with weights and data cancels. Held-out text is read in bf16 by every
model: the gap is what training in four bits did to the weights.

    python benchmarks/train_curves.py --minutes 9                   # all runs, or as many as fit
    python benchmarks/train_curves.py --seeds 1,2 --recipes nvfp4   # some of them
    python benchmarks/train_curves.py --merge                       # tables and plot from the runs

Every finished run is a JSON file in --runs; a run that is already there is not repeated, so that
the work can be split over several commands and machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import harness
from fos_compile.demo.model import WORKLOADS, Workload
from fos_compile.demo.results import plot_losses
from fos_compile.demo.text import Corpus, load_corpus
from fos_compile.demo.training import Trainer, TrainingRun, bits_per_byte

BASELINE = "bf16"
RECIPES = {"bf16": "bf16", "nvfp4": "NVFP4", "training": "NVFP4 with 4/6"}
NOTES = """\
Losses and gaps are in bits per byte. Train loss is the mean over the last tenth of the steps; a
gap is a run's value minus that of the bf16 run with the same seed; sd is the standard deviation
over seeds. A gap smaller than its sd is not a difference that this benchmark can see."""


class OutOfTime(Exception):
    """The time limit passed in the middle of a run, which is given up."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One finished run, as its JSON file holds it.

    Attributes:
        workload: fields of the `Workload` that was trained; runs are compared within one only.
        losses: training loss of every step, in nats per byte.
        heldout: bits per byte of held-out text, read in bf16.
        quantized: how many matmuls ran in four bits, forward and backward.
    """

    recipe: str
    seed: int
    workload: dict[str, Any]
    num_parameters: int
    losses: list[float]
    heldout: float
    quantized: int
    setup_s: float
    step_ms: float
    facts: dict[str, str]

    @property
    def train_loss(self) -> float:
        """Mean training loss over the last tenth of the steps, in bits per byte."""
        return self.as_run().final_loss / math.log(2)

    def as_run(self) -> TrainingRun:
        """Return the part that the demo's plot draws."""
        return TrainingRun(
            recipe=self.recipe,
            seed=self.seed,
            losses=self.losses,
            setup_s=self.setup_s,
            step_ms=self.step_ms,
            saved_bytes=0,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """One line of the CSV: one run."""

    recipe: str
    seed: int
    train_loss: float
    train_gap: float
    heldout: float
    heldout_gap: float
    quantized: int
    step_ms: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RecipeRow:
    """One line of the markdown table: mean and spread over the seeds of a recipe."""

    recipe: str
    seeds: int
    train_loss: str
    train_gap: str
    heldout: str
    heldout_gap: str
    heldout_gap_range: str
    step_ms: float


def train_all(
    recipes: Sequence[str],
    seeds: Sequence[int],
    *,
    workload: Workload,
    device: torch.device,
    runs: Path,
    deadline: float,
) -> None:
    """Train what `runs` lacks, a recipe at a time so that each compiles once, until `deadline`."""
    corpus = load_corpus()
    facts = harness.header(device, with_roof=False)
    for recipe in recipes:
        missing = [seed for seed in seeds if not _path(runs, recipe, seed).exists()]
        trainer = Trainer(recipe, corpus, workload, device)
        for seed in missing:
            try:
                result = _train(trainer, seed, corpus, workload, device, deadline, facts)
            except OutOfTime:
                print(f"{recipe}, seed {seed}: out of time, given up", flush=True)
                return
            path = _path(runs, recipe, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(dataclasses.asdict(result)) + "\n")


def _path(runs: Path, recipe: str, seed: int) -> Path:
    return runs / f"{recipe}-seed{seed}.json"


def _train(
    trainer: Trainer,
    seed: int,
    corpus: Corpus,
    workload: Workload,
    device: torch.device,
    deadline: float,
    facts: dict[str, str],
) -> Result:
    started = time.perf_counter()

    def on_step(index: int, loss: float) -> None:
        seconds = time.perf_counter() - started
        if index % 200 == 0:
            print(
                f"{trainer.recipe}, seed {seed}: step {index}, {loss / math.log(2):.3f} bits/byte, "
                f"{seconds:.0f} s",
                flush=True,
            )
        if time.monotonic() > deadline:
            raise OutOfTime

    model, run = trainer.train(seed, on_step)
    heldout = bits_per_byte(model, corpus, workload, device=device)
    print(
        f"{run.recipe}, seed {seed}: train {run.final_loss / math.log(2):.4f}, held-out "
        f"{heldout:.4f} bits/byte, {run.step_ms:.1f} ms a step, first step {run.setup_s:.0f} s",
        flush=True,
    )
    return Result(
        recipe=run.recipe,
        seed=seed,
        workload=dataclasses.asdict(workload),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        losses=[round(loss, 5) for loss in run.losses],
        heldout=heldout,
        quantized=len(run.report.quantized) if run.report is not None else 0,
        setup_s=run.setup_s,
        step_ms=run.step_ms,
        facts=facts,
    )


def load_results(runs: Path) -> list[Result]:
    """Read every run in `runs`, recipes in the order of `RECIPES`.

    Raises:
        ValueError: if there is none, or if they trained different workloads.
    """
    results = [Result(**json.loads(path.read_text())) for path in sorted(runs.glob("*.json"))]
    if not results:
        raise ValueError(f"train_curves: --runs must hold finished runs, got none in {runs}")
    if any(result.workload != results[0].workload for result in results):
        raise ValueError(
            f"train_curves: the runs in {runs} must share one workload; move some away"
        )
    order = list(RECIPES)
    return sorted(results, key=lambda result: (order.index(result.recipe), result.seed))


def run_rows(results: Iterable[Result]) -> list[RunRow]:
    """Return a row a run; runs without a bf16 run of the same seed are left out."""
    results = list(results)
    baseline = {result.seed: result for result in results if result.recipe == BASELINE}
    return [
        RunRow(
            recipe=result.recipe,
            seed=result.seed,
            train_loss=result.train_loss,
            train_gap=result.train_loss - baseline[result.seed].train_loss,
            heldout=result.heldout,
            heldout_gap=result.heldout - baseline[result.seed].heldout,
            quantized=result.quantized,
            step_ms=result.step_ms,
        )
        for result in results
        if result.seed in baseline
    ]


def recipe_rows(rows: Sequence[RunRow]) -> list[RecipeRow]:
    """Return mean and spread over seeds for every recipe."""
    summary = []
    for recipe, label in RECIPES.items():
        part = [row for row in rows if row.recipe == recipe]
        if not part:
            continue
        gaps = [row.heldout_gap for row in part]
        summary.append(
            RecipeRow(
                recipe=label,
                seeds=len(part),
                train_loss=_spread([row.train_loss for row in part]),
                train_gap=_spread([row.train_gap for row in part], sign="+"),
                heldout=_spread([row.heldout for row in part]),
                heldout_gap=_spread(gaps, sign="+"),
                heldout_gap_range=f"{min(gaps):+.4f} to {max(gaps):+.4f}",
                step_ms=statistics.mean(row.step_ms for row in part),
            )
        )
    return summary


def _spread(values: Sequence[float], sign: str = "") -> str:
    deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "n/a"
    return f"{statistics.mean(values):{sign}.4f} (sd {deviation})"


def write_summary(runs: Path, *, md: Path, csv_path: Path, png: Path) -> None:
    """Write the tables and the plot of all finished runs."""
    results = load_results(runs)
    rows = run_rows(results)
    if not rows:
        raise ValueError(f"train_curves: --runs must hold a {BASELINE} run, got none in {runs}")
    work = Workload(**results[0].workload)
    facts = {
        "model": f"Llama, {work.layers} layers, width {work.hidden}, ffn {work.ffn}, "
        f"{results[0].num_parameters / 1e6:.1f}M parameters, over bytes",
        "training": f"{work.steps} steps of {work.batch} x {work.seq} bytes, AdamW, peak rate "
        f"{work.learning_rate}",
        **{name: "; ".join(_distinct(results, name)) for name in results[0].facts},
    }
    harness.write_results(
        recipe_rows(rows),
        title="Loss gap to bf16 of training in four bits",
        facts=facts,
        md=md,
        notes=NOTES,
    )
    harness.write_csv(csv_path, rows)
    curves = {
        label: [result.as_run() for result in results if result.recipe == recipe]
        for recipe, label in RECIPES.items()
    }
    plot_losses(png, curves, baseline=RECIPES[BASELINE])


def _distinct(results: Iterable[Result], fact: str) -> list[str]:
    return list(dict.fromkeys(result.facts[fact] for result in results if fact in result.facts))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, unless --merge, and write what the finished runs say."""
    options = _parser().parse_args(arguments)
    deadline = time.monotonic() + options.minutes * 60
    if not options.merge:
        workload = WORKLOADS[options.workload]
        if options.steps is not None:
            workload = dataclasses.replace(workload, steps=options.steps)
        train_all(
            options.recipes,
            options.seeds,
            workload=workload,
            device=options.device,
            runs=options.runs,
            deadline=deadline,
        )
    try:
        write_summary(options.runs, md=options.md, csv_path=options.csv, png=options.png)
    except ValueError as error:
        sys.exit(str(error))


def _parser() -> argparse.ArgumentParser:
    made = harness.parser(__doc__, name="train_curves")
    made.add_argument("--png", type=Path, default=harness.RESULTS / "train_curves.png")
    made.add_argument("--runs", type=Path, default=harness.RESULTS / "train_curves")
    made.add_argument("--seeds", type=_integers, default=[0, 1, 2], help="default: 0,1,2")
    made.add_argument("--recipes", type=_recipes, default=list(RECIPES), help="default: all")
    made.add_argument("--steps", type=int, help="default: the workload's")
    made.add_argument("--workload", choices=sorted(WORKLOADS), default="gpu")
    made.add_argument("--minutes", type=float, default=math.inf, help="start no step after this")
    made.add_argument("--merge", action="store_true", help="train nothing, summarize --runs")
    return made


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _recipes(text: str) -> list[str]:
    names = text.split(",")
    unknown = sorted(set(names) - set(RECIPES))
    if unknown:
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(RECIPES)}, got {unknown}")
    return names


if __name__ == "__main__":
    main()
