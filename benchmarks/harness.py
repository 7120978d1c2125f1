"""What every benchmark shares: timing, roofs, the header of a result, markdown and CSV.

Times are medians. Buffers rotate through more memory than the last-level cache holds: every call
reads from DRAM unless a benchmark asks otherwise. On a GPU one round of the rotation is captured
in a CUDA graph, which leaves the host out of the time; the spread says how much to trust a number.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import importlib.metadata
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_CPU_CACHE_BYTES = 64 << 20
_DISTRIBUTIONS = ("torch", "triton", "nvidia-cutlass-dsl", "transformers", "fos-compile")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Microseconds of one call: median, and the 10th and 90th percentile of the samples."""

    us: float
    low_us: float
    high_us: float

    @property
    def spread(self) -> float:
        """Distance between the percentiles as a fraction of the median."""
        return (self.high_us - self.low_us) / self.us

    def rate(self, work: float) -> float:
        """Return `work` (bytes or operations) per second."""
        return work / self.us * 1e6


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Roof:
    """What the device reached just now, by a copy and by a large bf16 matmul."""

    bytes_per_s: float
    flops_per_s: float

    def us(self, *, bytes_: float = 0, flops: float = 0) -> float:
        """Return the shortest time in which work of this size could be done."""
        return max(bytes_ / self.bytes_per_s, flops / self.flops_per_s) * 1e6

    def fraction(self, timing: Timing, *, bytes_: float = 0, flops: float = 0) -> float:
        """Return the share of the roof that `timing` reaches, 1.0 at best."""
        return self.us(bytes_=bytes_, flops=flops) / timing.us


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rotation(
    make: Callable[[int], Sequence[Any]], *, device: torch.device, limit: int = 64
) -> list[Sequence[Any]]:
    """Return argument tuples `make(0), make(1), ...` that together exceed the cache twice over."""
    sets = [make(0)]
    bytes_ = sum(each.nbytes for each in sets[0] if isinstance(each, torch.Tensor))
    wanted = math.ceil(2 * _cache_bytes(device) / max(1, bytes_)) + 1
    sets += [make(index) for index in range(1, min(wanted, limit))]
    return sets


def _cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return _CPU_CACHE_BYTES


def measure(
    function: Callable[..., object],
    arguments: Sequence[Sequence[Any]],
    *,
    device: torch.device,
    seconds: float = 0.3,
    graph: bool = True,
) -> Timing:
    """Time `function(*arguments[i])`, going round the list, for about `seconds`.

    Args:
        function: what to time; its compilation happens before the clock starts.
        arguments: one argument list, or several from `rotation`.
        device: where `function` runs.
        seconds: time to spend on samples; at least 5 rounds are taken.
        graph: on a GPU, replay a CUDA graph of one round; False counts the host's launches too.
    """

    def one_round() -> None:
        for each in arguments:
            function(*each)

    for _ in range(3):
        one_round()
    sample = (
        _cuda_sampler(one_round, graph=graph) if device.type == "cuda" else _cpu_sampler(one_round)
    )
    sample()
    samples: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < deadline:
        samples.append(sample() / len(arguments))
    return _summary(samples)


def _summary(samples: Sequence[float]) -> Timing:
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(us=statistics.median(samples), low_us=deciles[0], high_us=deciles[-1])


def _cpu_sampler(one_round: Callable[[], None]) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        one_round()
        return (time.perf_counter() - start) * 1e6

    return sample


def _cuda_sampler(one_round: Callable[[], None], *, graph: bool) -> Callable[[], float]:
    run = one_round
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            one_round()
        run = captured.replay

    def sample() -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3

    return sample


@functools.cache
def roof(device: torch.device) -> Roof:
    """Measure the roof of `device` once."""
    is_cuda = device.type == "cuda"
    num = (1 << 29) if is_cuda else (1 << 25)
    source = torch.randn(num, device=device).bfloat16()
    target = torch.empty_like(source)
    # A copy by the driver and one by a kernel, with and without a graph: the roof is the best.
    copies = [
        measure(each, [(source,)], device=device, graph=graph)
        for each in (target.copy_, lambda x: torch.neg(x, out=target))
        for graph in (True, False)
    ]
    copy = min(copies, key=lambda timing: timing.us)
    size = 8192 if is_cuda else 1024
    a = torch.randn(size, size, device=device).bfloat16()
    product = measure(torch.mm, [(a, a)], device=device)
    return Roof(
        bytes_per_s=copy.rate(2 * source.nbytes),
        flops_per_s=product.rate(2 * size**3),
    )


def header(device: torch.device, *, with_roof: bool = True) -> dict[str, str]:
    """Return what a reader needs to judge or repeat a result."""
    facts = {"command": _command(), "device": _device_name(device)}
    if with_roof:
        top = roof(device)
        facts["measured roof"] = (
            f"copy {top.bytes_per_s / 1e12:.3g} TB/s, "
            f"bf16 matmul {top.flops_per_s / 1e12:.3g} TFLOP/s"
        )
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if commit:
        is_dirty = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
        facts["commit"] = commit + (" and changes" if is_dirty else "")
    return facts


def _command() -> str:
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    # Where on a machine the files lay helps nobody.
    options = [Path(each).name if Path(each).is_absolute() else each for each in sys.argv[1:]]
    return " ".join(["python", name, *options])


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        cores = torch.get_num_threads()
        return f"CPU, {platform.machine()}, {cores} threads"
    fields = "driver_version,clocks.current.sm,clocks.max.sm,power.limit"
    smi = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
    details = [part.strip() for part in smi.split(",")] if smi else []
    name = torch.cuda.get_device_name(device)
    if len(details) != 4:
        return name
    driver, clock, max_clock, power = details
    return f"{name}, driver {driver}, SM clock {clock} of {max_clock}, {power}"


def _output(*command: str) -> str:
    """Return what a command prints, or nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def parser(description: str | None, *, name: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    made.add_argument("--device", type=torch.device, default=default_device())
    made.add_argument("--md", type=Path, default=RESULTS / f"{name}.md", help="markdown result")
    made.add_argument("--csv", type=Path, default=RESULTS / f"{name}.csv", help="CSV result")
    return made


def markdown_table(rows: Sequence[Any]) -> str:
    """Return dataclass instances as a markdown table, a column a field."""
    names = [field.name for field in dataclasses.fields(rows[0])]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = (_cell(getattr(row, name)) for name in names)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_results(
    rows: Sequence[Any],
    *,
    title: str,
    facts: Mapping[str, str],
    md: Path,
    csv_path: Path | None = None,
    notes: str = "",
    show: bool = True,
) -> None:
    """Write dataclass instances as markdown, printed too unless more will follow, and as CSV."""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines.append(markdown_table(rows))
    if notes:
        lines += ["", notes]
    text = "\n".join(lines) + "\n"
    md.parent.mkdir(parents=True, exist_ok=True)
    md.write_text(text)
    if csv_path is not None:
        write_csv(csv_path, rows)
    if show:
        print(text)


def write_csv(path: Path, rows: Sequence[Any]) -> None:
    """Write dataclass instances of one type as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [field.name for field in dataclasses.fields(rows[0])]
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)
