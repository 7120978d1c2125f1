"""The demo from start to end: read text, train three times, evaluate, show."""

from __future__ import annotations

import dataclasses
import math
import platform
import time
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fos_compile.demo.memory import quantized_modules, weight_bytes
from fos_compile.demo.model import WORKLOADS
from fos_compile.demo.results import (
    Row,
    inference_table,
    plot_losses,
    training_table,
    write_json,
)
from fos_compile.demo.text import load_corpus
from fos_compile.demo.training import Trainer, TrainingRun, bits_per_byte

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import TaskID

    from fos_compile.demo.model import Workload
    from fos_compile.demo.text import Corpus

BASELINE = "bf16"
RECIPES = {"bf16": "bf16", "NVFP4": "nvfp4", "4/6": "training"}
INFERENCE_RULES = {"NVFP4": "static_6", "4/6": "mse"}
CAVEAT = (
    "One seed, one small model: an illustration, not evidence. "
    "benchmarks/train_curves.py trains a larger model over several seeds."
)


class Demo:
    """One run of the demo; `run` does everything and returns the table rows."""

    def __init__(
        self, *, workload: Workload, device: torch.device, seed: int, console: Console
    ) -> None:
        self._workload = workload
        self._device = device
        self._seed = seed
        self._console = console
        self._corpus: Corpus = load_corpus()

    def run(self, out: Path) -> dict[str, list[Row]]:
        """Train and evaluate, print both tables, write the plot and the numbers to `out`."""
        started = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)
        self._introduce()
        with self._progress() as progress:
            models, runs = self._train_all(progress)
            training = self._training_rows(models, runs, progress)
            modules = quantized_modules(runs["4/6"].report)
            inference = self._inference_rows(models[BASELINE], training[0], modules, progress)
        self._console.print(training_table(training), inference_table(inference))
        self._console.print(CAVEAT, style="bold")
        rows = {"training": training, "inference": inference}
        plot_losses(
            out / "loss.png", {name: [run] for name, run in runs.items()}, baseline=BASELINE
        )
        total = time.perf_counter() - started
        write_json(out / "results.json", self._facts(runs, total), rows)
        self._console.print(f"Wrote {out / 'loss.png'} and {out / 'results.json'}; {total:.0f} s.")
        return rows

    def _introduce(self) -> None:
        work, corpus = self._workload, self._corpus
        self._console.print(
            f"Text: the standard library of Python {platform.python_version()}, "
            f"{corpus.num_files} files, {corpus.train.numel() / 1e6:.1f} MB to train on and "
            f"{corpus.heldout.numel() / 1e6:.1f} MB held out.\n"
            f"Model: Llama, {work.layers} layers, width {work.hidden}, over bytes; "
            f"{work.steps} steps of {work.batch} x {work.seq} bytes on {self._device_name()}.\n"
            "The first step of every recipe compiles."
        )

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )

    def _train_all(
        self, progress: Progress
    ) -> tuple[dict[str, torch.nn.Module], dict[str, TrainingRun]]:
        models, runs = {}, {}
        for name, recipe in RECIPES.items():
            task = progress.add_task(
                f"train: {name}", total=self._workload.steps, note="compiling the first step"
            )

            def on_step(index: int, loss: float, task: TaskID = task) -> None:
                note = f"{loss / math.log(2):.3f} bits/byte"
                progress.update(task, completed=index + 1, note=note)

            trainer = Trainer(recipe, self._corpus, self._workload, self._device)
            models[name], runs[name] = trainer.train(self._seed, on_step)
            progress.update(task, completed=self._workload.steps)
        return models, runs

    def _training_rows(
        self,
        models: dict[str, torch.nn.Module],
        runs: dict[str, TrainingRun],
        progress: Progress,
    ) -> list[Row]:
        task = progress.add_task("held-out text, in bf16", total=len(models), note="")
        rows: list[Row] = []
        for name, model in models.items():
            run = runs[name]
            heldout = bits_per_byte(model, self._corpus, self._workload, device=self._device)
            rows.append(
                Row(
                    name=name,
                    recipe=run.recipe,
                    train_loss=run.final_loss / math.log(2),
                    heldout=heldout,
                    gap=heldout - rows[0].heldout if rows else None,
                    weight_bytes=weight_bytes(model, quantized_modules(run.report)),
                    saved_bytes=run.saved_bytes,
                    step_ms=run.step_ms,
                )
            )
            progress.advance(task)
        return rows

    def _inference_rows(
        self, model: torch.nn.Module, baseline: Row, modules: set[str], progress: Progress
    ) -> list[Row]:
        rows = [dataclasses.replace(baseline, name="bf16", recipe=_PLAIN)]
        for name, rule in INFERENCE_RULES.items():
            task = progress.add_task(f"held-out text, FP4 {rule}", total=1, note="compiling")
            options: dict[str, Any] = {"recipe": "inference", "scale_rule": rule}
            compiled = torch.compile(model, backend="fouroversix", options=options)
            heldout = bits_per_byte(compiled, self._corpus, self._workload, device=self._device)
            progress.update(task, completed=1, note=f"{heldout:.3f} bits/byte")
            rows.append(
                Row(
                    name=name,
                    recipe=f"inference, {rule}",
                    train_loss=None,
                    heldout=heldout,
                    gap=heldout - baseline.heldout,
                    weight_bytes=weight_bytes(model, modules),
                    saved_bytes=None,
                )
            )
        return rows

    def _device_name(self) -> str:
        if self._device.type == "cuda":
            return torch.cuda.get_device_name(self._device)
        return f"a CPU with {torch.get_num_threads()} threads"

    def _facts(self, runs: dict[str, TrainingRun], total_s: float) -> dict[str, object]:
        return {
            "caveat": CAVEAT,
            "seed": self._seed,
            "device": self._device_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "workload": dataclasses.asdict(self._workload),
            "total_s": total_s,
            "setup_s": {name: run.setup_s for name, run in runs.items()},
            "losses_nats": {name: run.losses for name, run in runs.items()},
        }


_PLAIN = "plain PyTorch"


def run_demo(
    out: Path, *, device: str | None = None, steps: int | None = None, seed: int = 0
) -> dict[str, list[Row]]:
    """Run the demo on `device` (default: a GPU if there is one) and write its results to `out`."""
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    workload = WORKLOADS["gpu" if chosen.type == "cuda" else "cpu"]
    if steps is not None:
        workload = dataclasses.replace(workload, steps=steps)
    return Demo(workload=workload, device=chosen, seed=seed, console=Console()).run(out)
