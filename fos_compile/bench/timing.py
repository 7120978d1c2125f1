"""Timing, the machine, and tables: what measurements of the package and of benchmarks/ share.

Times are medians. Buffers rotate through more memory than the last-level cache holds: every call
reads from DRAM unless a caller asks otherwise. On a GPU one round of the rotation is captured in a
CUDA graph, which leaves the host out of the time; the spread says how much to trust a number.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

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


def versions() -> str:
    """Return those of Python and of what results depend on."""
    found = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    return ", ".join(f"{name} {version}" for name, version in found.items())


def device_name(device: torch.device) -> str:
    """Return what a device is, and of a GPU driver, clocks and power limit."""
    if device.type != "cuda":
        cores = torch.get_num_threads()
        return f"CPU, {platform.machine()}, {cores} threads"
    fields = "driver_version,clocks.current.sm,clocks.max.sm,power.limit"
    smi = output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0")
    details = [part.strip() for part in smi.split(",")] if smi else []
    name = torch.cuda.get_device_name(device)
    if len(details) != 4:
        return name
    driver, clock, max_clock, power = details
    return f"{name}, driver {driver}, SM clock {clock} of {max_clock}, {power}"


def output(*command: str) -> str:
    """Return what a command prints, or nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


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
