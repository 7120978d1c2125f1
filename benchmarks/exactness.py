"""What does exactness cost the user's graph, and what does it buy?

Cost: step time of parts of a bf16 model under plain Inductor with and without the options that
make compiled code round like eager code. Benefit: how many bytes a compiled quantizer gets
different from the eager reference, alone and fused behind a producer whose bf16 output the graph
returns too, so that the reference can quantize what the graph says it quantized.

    python benchmarks/exactness.py --part cost              # writes exactness.md
    python benchmarks/exactness.py --part bits --jobs 14    # writes exactness_bits.md
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import harness
import isolated
import quantizer_bits
import steps
from fos_compile.kernels.outlined import exact_numerics
from quantizer_bits import BitsRow

PORTION = 16
COST_NOTES = """\
`cost` is the step time with the options over the one without, the median of seven turns, and the
lowest and highest of them; `of_roof` is the share of the copy
bandwidth (RMSNorm, SwiGLU activation) or of the bf16 matmul rate that the step with the options
reaches. Both are plain Inductor: this is what the user's own operators pay."""
BITS_NOTES = """\
Sums over option combinations; one line each in the CSV. `graph` is what the quantizer is compiled
behind (`none`: it reads a graph input); `lowering` and `exact` are the options of the backend;
`amax` counts combinations whose amax differs. A block whose scale byte differs usually changes all
its codes."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CostRow:
    """One part of a model under plain Inductor, with and without exact numerics."""

    part: str
    default_us: float
    exact_us: float
    cost: float
    cost_low: float
    cost_high: float
    of_roof: float


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GroupRow:
    """Bytes that differ, summed over combinations."""

    graph: str
    lowering: str
    exact: bool
    rounding: str
    combinations: int
    not_identical: int
    amax: int
    values_differ: int
    of_values: int
    values_rate: float
    scales_differ: int
    of_scales: int
    scales_rate: float


def cost(part: str, shared: dict[str, Any], roof: harness.Roof) -> CostRow:
    """Measure one part both ways, in turns, in a process of its own."""
    found = isolated.measured(__file__, {"kind": "cost", **shared, "part": part})
    default, exact = found["us"]
    ratios = [b / a for a, b in zip(default, exact, strict=True)]
    bound = steps.roof_us(part, roof, width=shared["width"], tokens=shared["tokens"])
    return CostRow(
        part=part,
        default_us=statistics.median(default),
        exact_us=statistics.median(exact),
        cost=statistics.median(ratios),
        cost_low=min(ratios),
        cost_high=max(ratios),
        of_roof=bound / statistics.median(exact),
    )


def bits(cases: Sequence[dict[str, Any]], shared: dict[str, Any], jobs: int) -> list[BitsRow]:
    """Compare every case, dealt out to `jobs` processes at a time; report what failed."""
    portions = [list(cases[start : start + PORTION]) for start in range(0, len(cases), PORTION)]
    env = {"FOS_CPU_KERNEL": "0"}
    if jobs > 1:
        env["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

    def compare(portion: list[dict[str, Any]]) -> list[BitsRow]:
        case = {"kind": "bits", **shared, "cases": portion}
        try:
            found = isolated.measured(__file__, case, env=env)
        except RuntimeError as error:
            print(f"not compared, {len(portion)} combinations: {error}", flush=True)
            return []
        return [BitsRow(**row) for row in found["rows"]]

    with ThreadPoolExecutor(jobs) as pool:
        rows = [row for rows in pool.map(compare, portions) for row in rows]
    if not rows:
        raise RuntimeError("exactness: every comparison failed; the messages are above")
    return rows


def grouped(rows: Sequence[BitsRow]) -> list[GroupRow]:
    """Sum over the combinations that share graph, lowering, exactness and rounding."""
    keys = dict.fromkeys((row.graph, row.lowering, row.exact, row.rounding) for row in rows)
    groups = []
    for key in keys:
        part = [row for row in rows if (row.graph, row.lowering, row.exact, row.rounding) == key]
        values, of_values = sum(r.values_differ for r in part), sum(r.of_values for r in part)
        scales, of_scales = sum(r.scales_differ for r in part), sum(r.of_scales for r in part)
        groups.append(
            GroupRow(
                graph=key[0],
                lowering=key[1],
                exact=key[2],
                rounding=key[3],
                combinations=len(part),
                not_identical=sum(not row.identical for row in part),
                amax=sum(row.amax_differs for row in part),
                values_differ=values,
                of_values=of_values,
                values_rate=values / of_values,
                scales_differ=scales,
                of_scales=of_scales,
                scales_rate=scales / of_scales,
            )
        )
    return groups


def worker(case: dict[str, Any]) -> dict[str, Any]:
    """Do what a process was started for."""
    if case.pop("kind") == "cost":
        return steps.alternating(case, (None, exact_numerics()))
    rows = quantizer_bits.compare_all(
        case["cases"], device=torch.device(case["device"]), size=case["size"]
    )
    return {"rows": [dataclasses.asdict(row) for row in rows]}


def main() -> None:
    """Print the tables and write them."""
    options = _parser().parse_args()
    if options.worker is not None:
        isolated.report(worker(options.worker))
        return
    if options.part in ("all", "cost"):
        _write_costs(options)
    if options.part in ("all", "bits"):
        _write_bits(options)


def _write_costs(options: argparse.Namespace) -> None:
    gpu = options.device.type == "cuda"
    shared = {
        "device": str(options.device),
        "width": options.width or (4096 if gpu else 512),
        "tokens": options.tokens or (32768 if gpu else 1024),
        "seconds": options.seconds,
    }
    roof = harness.roof(torch.device(options.device))
    harness.write_results(
        [cost(part, shared, roof) for part in options.models.split(",")],
        title=f"Cost of exact numerics, width {shared['width']}, {shared['tokens']} tokens",
        facts=harness.header(options.device),
        md=options.md,
        csv_path=options.csv,
        notes=COST_NOTES,
    )


def _write_bits(options: argparse.Namespace) -> None:
    cases = quantizer_bits.cases(quick=options.quick)[:: options.every]
    size = 256 if options.quick else 1024
    rows = bits(cases, {"device": str(options.device), "size": size}, options.jobs)
    missing = len(cases) - len(rows)
    harness.write_results(
        grouped(rows),
        title=f"Bytes of compiled quantizers that differ from the eager reference, {size} rows",
        facts=harness.header(options.device, with_roof=False),
        md=_beside(options.md),
        notes=BITS_NOTES + (f"\n\n{missing} combinations failed." if missing else ""),
    )
    harness.write_csv(_beside(options.csv), rows)


def _beside(path: Path) -> Path:
    return path.with_stem(path.stem + "_bits")


def _parser() -> argparse.ArgumentParser:
    made = harness.parser(__doc__, name="exactness")
    made.add_argument("--width", type=int, help="default: 4096 on a GPU, 512 on a CPU")
    made.add_argument("--tokens", type=int, help="default: 32768 on a GPU, 1024 on a CPU")
    made.add_argument("--seconds", type=float, default=1.0, help="of samples a step")
    made.add_argument("--part", choices=("all", "cost", "bits"), default="all")
    made.add_argument("--models", default=",".join(steps.PARTS))
    made.add_argument("--quick", action="store_true", help="fewer combinations on smaller tensors")
    made.add_argument("--every", type=int, default=1, help="compare every Nth combination")
    made.add_argument("--jobs", type=int, default=1, help="processes that compare bits at a time")
    made.add_argument("--worker", type=json.loads, help="internal: do this and exit")
    return made


if __name__ == "__main__":
    main()
