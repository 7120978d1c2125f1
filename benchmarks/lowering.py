"""What does a training step cost with our kernels, and without them for every way of lowering?

Forward and backward of a SwiGLU MLP and of one Llama block, bf16, recipe `training`: the eager
reference op by op (opaque), the reference compiled once and shared (outline), the reference
compiled into the graph (inline), and our kernels, which are the default (C++ on a CPU, CuTe DSL on
a GPU), next to plain Inductor in bf16 and the roof of the linear layers. Host time counts. Each
line is a process of its own with cold caches.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch

import harness
import isolated
import steps

VARIANTS = ("bf16", "opaque", "outline", "inline", "kernels")
PARTS = ("SwiGLU MLP", "Llama block")
NOTES = """\
`step_us` is the median of forward and backward, launches included; `over_bf16` is its ratio to
plain Inductor in bf16, `faster_than_opaque` the factor to the eager reference (required above 1 for
inline). `of_roof` is the time that the step's linear layers need at the measured bf16 roof over
step_us. opaque, outline and inline run the reference; `kernels` are ours: C++ on a CPU, CuTe DSL on
a GPU, where they quantize and unpack, and cuBLAS multiplies in bf16."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One way of lowering one part of a model."""

    part: str
    lowering: str
    step_us: float
    spread: float
    over_bf16: float
    faster_than_opaque: float | None
    of_roof: float
    compile_s: float
    quantized: int
    matmul_runs_as: str


def case_of(variant: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return backend and options of a variant, and its environment."""
    if variant == "bf16":
        return {"backend": "inductor", "options": None}, {}
    lowering = "outline" if variant == "kernels" else variant
    options = {"recipe": "training", "lowering": lowering}
    switch = "1" if variant == "kernels" else "0"
    switches = {"FOS_CPU_KERNEL": switch, "FOS_CUTE_KERNELS": switch}
    return {"backend": "fouroversix", "options": options}, switches


def run(part: str, variants: list[str], shared: dict[str, Any], roof: harness.Roof) -> list[Row]:
    """Measure every variant of one part."""
    times = {}
    for variant in variants:
        case, env = case_of(variant)
        times[variant] = isolated.measured(__file__, {**shared, **case, "part": part}, env=env)
        print(f"{part}, {variant}: {times[variant]}", flush=True)
    bound = steps.roof_us(part, roof, width=shared["width"], tokens=shared["tokens"])
    opaque = times.get("opaque")
    return [
        Row(
            part=part,
            lowering=variant,
            step_us=each["us"],
            spread=(each["high_us"] - each["low_us"]) / each["us"],
            over_bf16=each["us"] / times["bf16"]["us"],
            faster_than_opaque=opaque["us"] / each["us"] if opaque else None,
            of_roof=bound / each["us"],
            compile_s=each["compile_s"],
            quantized=each["quantized"],
            matmul_runs_as=each.get("implementation", ""),
        )
        for variant, each in times.items()
    ]


def main() -> None:
    """Print the table and write it."""
    made = harness.parser(__doc__, name="lowering")
    made.add_argument("--width", type=int, help="default: 2048 on a GPU, 512 on a CPU")
    made.add_argument("--tokens", type=int, help="default: 8192 on a GPU, 1024 on a CPU")
    made.add_argument("--seconds", type=float, default=2.0, help="of samples a line")
    made.add_argument("--parts", default=",".join(PARTS))
    made.add_argument("--variants", help="some of " + ", ".join(VARIANTS) + "; bf16 is needed")
    made.add_argument("--worker", type=json.loads, help="internal: measure this case and exit")
    options = made.parse_args()
    if options.worker is not None:
        isolated.report(steps.worker(options.worker))
        return
    gpu = options.device.type == "cuda"
    shared = {
        "device": str(options.device),
        "width": options.width or (2048 if gpu else 512),
        "tokens": options.tokens or (8192 if gpu else 1024),
        "seconds": options.seconds,
    }
    variants = options.variants.split(",") if options.variants else list(VARIANTS)
    roof = harness.roof(torch.device(options.device))
    rows = [row for part in options.parts.split(",") for row in run(part, variants, shared, roof)]
    harness.write_results(
        rows,
        title=f"Step time by lowering, width {shared['width']}, {shared['tokens']} tokens",
        facts=harness.header(options.device),
        md=options.md,
        csv_path=options.csv,
        notes=NOTES,
    )


if __name__ == "__main__":
    main()
