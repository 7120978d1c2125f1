"""`python -m fos_compile bench matmul`: every way to multiply in FP4 on this machine, side by side.

A row is a shape and a provider. Before it is timed a result is compared with float64; a provider
that raises or disagrees is not timed, and the self-test log says so.
"""

from __future__ import annotations

import csv
import dataclasses
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fos_compile.bench import mlp
from fos_compile.bench.cases import Operands, Shape, disagreement, limited, operands, rotated
from fos_compile.bench.providers import Provider, everything, said
from fos_compile.bench.timing import device_name, markdown_table, measure, versions
from fos_compile.kernels import target

_KINDS = {(10, 0): "sm_100a", (10, 3): "sm_103a", (12, 0): "sm_120a", (12, 1): "sm_121a"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One provider, one shape."""

    shape: str
    provider: str
    us: float
    spread: float
    tflops: float
    of_peak: float | None
    """Of the dense FP4 rate that is published for the device, where it has one."""
    of_bf16: float | None
    """Time as a multiple of bf16 torch.mm of the same shape."""
    what: str


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Rows of the table, and a line for each self-test."""

    rows: Sequence[Row]
    log: Sequence[str]

    @property
    def failures(self) -> list[str]:
        """Self-tests that a provider did not pass, though it said that it serves."""
        return [line for line in self.log if ": FAILED" in line]


def peak(device: torch.device) -> float | None:
    """Dense FP4 operations a second, by the published rates and the number of SMs."""
    if device.type != "cuda":
        return None
    arch = _KINDS.get(torch.cuda.get_device_capability(device))
    if arch is None:
        return None
    from fos_compile.kernels.cute import matmul_tiles

    known = matmul_tiles.rates(arch)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return known.flops * num_sms / known.num_sms


def run(
    shapes: Iterable[Shape],
    *,
    device: torch.device,
    format: str = "nvfp4",
    seconds: float = 0.3,
    providers: Sequence[Provider] | None = None,
) -> Report:
    """Test and time every provider on every shape."""
    rows: list[Row] = []
    log: list[str] = []
    shapes = list(shapes)
    if device.type == "cuda":
        shapes, large = limited(shapes, torch.cuda.mem_get_info(device)[0])
        log += [f"{shape}: skipped, too large for the memory that is free" for shape in large]
    for shape in shapes:
        given = operands(shape, device=device, format=format)
        bf16: float | None = None
        for provider in everything() if providers is None else providers:
            row, line = _one(provider, given, device, seconds, bf16)
            log.append(f"{shape}, {provider.name}: {line}")
            if row is not None:
                rows.append(row)
                bf16 = row.us if not provider.counts else bf16
    return Report(rows, log)


def _one(
    provider: Provider, given: Operands, device: torch.device, seconds: float, bf16: float | None
) -> tuple[Row | None, str]:
    """The row of a provider, and the line of its self-test."""
    shape = given.shape
    if reason := provider.refuses(shape, device, given.format):
        return None, f"not here: {reason}"
    try:
        multiply, what = provider.make(given)
        wrong = disagreement(multiply(given), given) if provider.counts else ""
        if wrong:
            return None, f"FAILED: {wrong}"
        timing = measure(multiply, rotated(given), device=device, seconds=seconds)
    except Exception as error:  # of a compiler, a driver or a library: the others go on
        return None, f"FAILED: {said(error)}"
    rate = timing.rate(shape.flops)
    top = peak(device) if provider.counts else None
    row = Row(
        shape=str(shape),
        provider=provider.name,
        us=timing.us,
        spread=timing.spread,
        tflops=rate / 1e12,
        of_peak=None if top is None else rate / top,
        of_bf16=None if bf16 is None else timing.us / bf16,
        what=what,
    )
    return row, "passed" if provider.counts else "not compared: it does not quantize"


def mlp_rows(device: torch.device, seconds: float) -> list[Row]:
    """Rows of the MLP: on a GPU of Llama-8B's sizes, else tiny."""
    sizes = mlp.LLAMA_8B if device.type == "cuda" else mlp.TINY
    width, hidden, tokens = sizes
    flops = 3 * 3 * 2 * width * hidden * tokens
    found = mlp.timings(sizes, device, seconds)
    base = next(iter(found.values())).us
    return [
        Row(
            shape=f"MLP {width}-{hidden}, {tokens} tokens",
            provider=name,
            us=timing.us,
            spread=timing.spread,
            tflops=timing.rate(flops) / 1e12,
            of_peak=None,
            of_bf16=timing.us / base,
            what="forward and backward",
        )
        for name, timing in found.items()
    ]


def header(device: torch.device) -> dict[str, str]:
    """What a reader needs to judge or repeat the table."""
    # Where on a machine the files lay helps nobody.
    words = [Path(each).name if Path(each).is_absolute() else each for each in sys.argv[1:]]
    facts = {"command": " ".join(["python -m fos_compile", *words]), "device": device_name(device)}
    top = peak(device)
    facts["published FP4 peak"] = "none" if top is None else f"{top / 1e12:.4g} TFLOP/s, dense"
    if device.type == "cuda":
        facts["our kernels"] = str(target.status(device))
    facts["versions"] = versions()
    return facts | _commit()


def _commit() -> dict[str, str]:
    """Of the checkout that the package is installed from, if it is one."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return {}
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"commit": done.stdout.strip()} if done.returncode == 0 else {}


def text_of(report: Report, facts: dict[str, str]) -> str:
    """The result as markdown."""
    lines = ["# FP4 matmul", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [markdown_table(report.rows) if report.rows else "Nothing was timed."]
    lines += ["", "## Self-tests", "", *(f"- {line}" for line in report.log)]
    return "\n".join(lines) + "\n"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, and their names even where there are none."""
    names = [field.name for field in dataclasses.fields(Row)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)
