"""Training and evaluation of one model under one recipe; nothing but the recipe differs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import fos_compile
from fos_compile.demo.memory import SavedTensors
from fos_compile.demo.model import build_model
from fos_compile.demo.text import heldout_batches, train_batches

if TYPE_CHECKING:
    from fos_compile.demo.model import Workload
    from fos_compile.demo.text import Corpus

Step = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]
OnStep = Callable[[int, float], None]

_WARMUP = 0.06
_FINAL_WINDOW = 0.1
_LAST_RATE = 0.1
_REPORT_EVERY = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """What one training left behind.

    Attributes:
        losses: training loss of every step, in nats per byte.
        setup_s: seconds until the first step was done, compilation included.
        step_ms: mean milliseconds of a step after the first.
        saved_bytes: bytes kept from forward to backward in the first step.
        report: the backend's report, None for plain bf16.
    """

    recipe: str
    seed: int
    losses: list[float] = field(repr=False)
    setup_s: float
    step_ms: float
    saved_bytes: int
    report: Any = None

    @property
    def final_loss(self) -> float:
        """Mean loss over the last tenth of training, in nats per byte."""
        window = max(1, round(len(self.losses) * _FINAL_WINDOW))
        return sum(self.losses[-window:]) / window


def make_step(recipe: str, device: torch.device, saved: SavedTensors) -> Step:
    """Return the training step, compiled under `recipe`; the optimizer stays with the caller."""

    # CUDA graphs: without device kernels a quantized step is hundreds of small launches.
    options = {"mode": "reduce-overhead"} if device.type == "cuda" else {}

    @fos_compile.train_step(recipe=recipe, **options)
    def step(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        saved.observe(loss)
        loss.backward()
        return loss.detach()

    return step


class Trainer:
    """Trains fresh models under one recipe; the compiled step is shared by all of them."""

    def __init__(
        self, recipe: str, corpus: Corpus, workload: Workload, device: torch.device
    ) -> None:
        self.recipe = recipe
        self._corpus = corpus
        self._workload = workload
        self._device = device
        self._saved = SavedTensors()
        self._step = make_step(recipe, device, self._saved)

    def train(
        self, seed: int, on_step: OnStep = lambda _index, _loss: None
    ) -> tuple[torch.nn.Module, TrainingRun]:
        """Train on the windows that `seed` draws, the same in the same order for every recipe."""
        work, device = self._workload, self._device
        model = build_model(work, device=device, seed=seed)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=work.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(work.steps))
        torch.manual_seed(seed)
        losses = torch.zeros(work.steps, device=device)
        clock = [time.perf_counter()]
        batches = train_batches(
            self._corpus.train, batch=work.batch, seq=work.seq, steps=work.steps, seed=seed
        )
        for index, host_batch in enumerate(batches):
            batch = host_batch.to(device)
            if index == 0:
                self._saved.arm(model, [batch])
            losses[index] = self._step(model, batch)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            # Reading a loss waits for the device; a GPU would feel that at every step.
            if device.type == "cpu" or index % _REPORT_EVERY == 0:
                on_step(index, losses[index].item())
            if index == 0:
                clock.append(time.perf_counter())
        run = TrainingRun(
            recipe=self.recipe,
            seed=seed,
            losses=losses.tolist(),
            setup_s=clock[1] - clock[0],
            step_ms=(time.perf_counter() - clock[1]) / max(1, work.steps - 1) * 1e3,
            saved_bytes=self._saved.num_bytes,
            report=getattr(self._step, "report", None),
        )
        return model, run


def _schedule(steps: int) -> Callable[[int], float]:
    warmup = max(1, round(steps * _WARMUP))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, steps - warmup)
        return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))

    return factor


@torch.no_grad()
def bits_per_byte(
    model: Callable[..., Any], corpus: Corpus, workload: Workload, *, device: torch.device
) -> float:
    """Return the mean cross-entropy on held-out text in bits per byte.

    `model` is the module itself (plain bf16 under autocast) or a compiled form of it.
    """
    total = torch.zeros((), device=device, dtype=torch.float64)
    batches = heldout_batches(
        corpus.heldout,
        batch=workload.batch,
        seq=workload.seq,
        num_batches=workload.eval_batches,
    )
    with torch.autocast(device.type, dtype=torch.bfloat16):
        for batch in batches:
            batch = batch.to(device)
            total += model(input_ids=batch, labels=batch).loss.double()
    return total.item() / workload.eval_batches / math.log(2)
