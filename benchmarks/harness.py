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
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fos_compile.bench.timing import (
    Timing,
    default_device,
    device_name,
    markdown_table,
    measure,
    output,
    rotation,
    versions,
)

__all__ = [
    "RESULTS",
    "ROOT",
    "Roof",
    "Timing",
    "default_device",
    "device_name",
    "header",
    "markdown_table",
    "measure",
    "output",
    "parser",
    "roof",
    "rotation",
    "versions",
    "write_csv",
    "write_results",
]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


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
    facts = {"command": _command(), "device": device_name(device)}
    if with_roof:
        top = roof(device)
        facts["measured roof"] = (
            f"copy {top.bytes_per_s / 1e12:.3g} TB/s, "
            f"bf16 matmul {top.flops_per_s / 1e12:.3g} TFLOP/s"
        )
    facts["versions"] = versions()
    commit = output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    if commit:
        is_dirty = output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
        facts["commit"] = commit + (" and changes" if is_dirty else "")
    return facts


def _command() -> str:
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    # Where on a machine the files lay helps nobody.
    options = [Path(each).name if Path(each).is_absolute() else each for each in sys.argv[1:]]
    return " ".join(["python", name, *options])


def parser(description: str | None, *, name: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    made.add_argument("--device", type=torch.device, default=default_device())
    made.add_argument("--md", type=Path, default=RESULTS / f"{name}.md", help="markdown result")
    made.add_argument("--csv", type=Path, default=RESULTS / f"{name}.csv", help="CSV result")
    return made


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
