"""What share of the compile time of a Llama training step do our passes take?

Forward and backward of one step, everything from Dynamo to the last generated kernel, every cache
cold, each compiler in a process of its own. Compile time is the first step minus a later one.
Timers of our own surround the passes, lowering and the backend's bookkeeping (cache keys, copies).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import harness
import isolated
import workloads

BOUND = 0.03
PEER = "Inductor, bf16"
PASSES = ("detect", "decide", "insert", "share", "lower")
NOTES = """\
Seconds. `ours_s` is all that our code adds between Dynamo and Inductor: the passes, lowering both
graphs, lint and the copies that a failed pass falls back to, cache keys. `share` is ours_s over
compile_s of the same line; `of_bf16` is ours_s over the compile time of plain Inductor, which knows
no 4-bit matmul. Required: share at most 0.03."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One compiler: seconds of compilation and what of it is ours."""

    compiler: str
    compile_s: float
    ours_s: float | None = None
    share: float | None = None
    of_bf16: float | None = None
    holds: bool | None = None
    detect_s: float | None = None
    decide_s: float | None = None
    insert_s: float | None = None
    share_s: float | None = None
    lower_s: float | None = None
    other_s: float | None = None
    step_ms: float


class Clock:
    """Adds up the time spent in functions of ours, by name."""

    def __init__(self) -> None:
        self.seconds: collections.defaultdict[str, float] = collections.defaultdict(float)

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function` with its time added to `name`."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return wrapped


@contextlib.contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Time the passes and the backend while in this context."""
    from fos_compile import backend
    from fos_compile.passes import pipeline

    def of(owner: Any, name: str, key: str) -> Any:
        return mock.patch.object(owner, name, clock.timed(key, getattr(owner, name)))

    def run(passes: Any, graph: Any, config: Any) -> Any:
        reports = untimed(passes, graph, config)
        for each in reports:
            clock.seconds[each.name] += each.seconds
        return reports

    untimed = pipeline._run
    with (
        mock.patch.object(pipeline, "_run", run),
        of(backend.GraphPasses, "joint", "joint"),
        of(backend.GraphPasses, "post", "post"),
        of(backend.Backend, "__call__", "backend"),
        of(backend, "_compile_inductor", "inductor"),
    ):
        yield


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """Compile one training step in this process; return its times."""
    from fos_compile.backend import Backend
    from fos_compile.config import parse_options

    device = torch.device(case["device"])
    model = workloads.llama(
        hidden=case["hidden"],
        layers=case["layers"],
        heads=case["hidden"] // 64,
        ffn=3 * case["hidden"],
        vocabulary=1024,
        seq=case["seq"],
    ).to(device, torch.bfloat16)
    tokens = torch.randint(1024, (case["batch"], case["seq"]), device=device)
    options = case["options"]
    clock = Clock()
    with watched(clock):
        backend: Any = "inductor" if options is None else Backend(parse_options(options))
        loss = torch.compile(workloads.llama_loss, backend=backend, dynamic=False, fullgraph=True)
        seconds = [_step(loss, model, tokens) for _ in range(4)]
    steady = min(seconds[1:])
    result = {"compile_s": seconds[0] - steady, "step_ms": steady * 1e3, **clock.seconds}
    if options is not None:
        assert backend.report.quantized and not backend.report.failure, backend.report
    return result


def _step(loss: Callable[..., torch.Tensor], model: torch.nn.Module, x: torch.Tensor) -> float:
    start = time.perf_counter()
    loss(model, x).backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def run(name: str, case: dict[str, Any], bf16_s: float | None) -> Row:
    """Measure one compiler."""
    times = isolated.measured(__file__, case)
    if case["options"] is None:
        return Row(compiler=name, compile_s=times["compile_s"], step_ms=times["step_ms"])
    bookkeeping = times["backend"] - times["inductor"]
    ours = times["joint"] + times["post"] + bookkeeping
    share = ours / times["compile_s"]
    return Row(
        compiler=name,
        compile_s=times["compile_s"],
        ours_s=ours,
        share=share,
        of_bf16=None if bf16_s is None else ours / bf16_s,
        holds=share <= BOUND,
        **{f"{each}_s": times.get(each, 0.0) for each in PASSES},
        other_s=ours - sum(times.get(each, 0.0) for each in PASSES),
        step_ms=times["step_ms"],
    )


def main() -> None:
    """Print the table and write it."""
    made = harness.parser(__doc__, name="compile_time")
    made.add_argument("--layers", type=int, default=12)
    made.add_argument("--hidden", type=int, default=256, help="a multiple of 64")
    made.add_argument("--seq", type=int, default=128)
    made.add_argument("--batch", type=int, default=2)
    made.add_argument("--lowerings", default="outline", help="of outline, inline, opaque; commas")
    made.add_argument("--worker", type=json.loads, help="internal: measure this case and exit")
    options = made.parse_args()
    if options.worker is not None:
        isolated.report(worker(options.worker))
        return
    case = {name: getattr(options, name) for name in ("layers", "hidden", "seq", "batch")}
    case["device"] = str(options.device)
    rows = [run(PEER, {**case, "options": None}, None)]
    for lowering in options.lowerings.split(","):
        ours = {"recipe": "training", "lowering": lowering}
        rows.append(run(f"ours, {lowering}", {**case, "options": ours}, rows[0].compile_s))
    harness.write_results(
        rows,
        title=f"Compile time of a training step: Llama, {options.layers} layers, "
        f"hidden {options.hidden}, {options.batch} x {options.seq} tokens, bf16",
        facts=harness.header(options.device, with_roof=False),
        md=options.md,
        csv_path=options.csv,
        notes=NOTES,
    )


if __name__ == "__main__":
    main()
