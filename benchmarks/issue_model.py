"""Predict how near to the memory roof the quantize kernels come, from their machine code.

Compiles kernels for the architecture of each device, disassembles them (`nvdisasm`, which the pip
package nvidia-cuda-nvdisasm brings), counts the instructions of a round of the main loop and of
the exact path that undecided blocks take, and compares the cycles these need with the time that
their bytes need. No GPU takes part.
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.metadata
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import harness
import sass

WARP = 32
BLOCK = 16
BYTES_PER_ELEMENT = 2 + 1 / 2 + 1 / BLOCK
"""bf16 in, codes and scales out."""
OVERLAP, SHARE = 3.0, 0.88
NOTES = """\
Instructions are of a thread, an element, in the main loop and, by the share of blocks that are not
decided there, in the exact path; `other` is shared and global memory, special functions, uniform
and control. `bound` is the fraction of copy bandwidth that the fullest pipe (`by`) allows: above 1
memory limits. Threads a cycle and SM: 128 of any kind (four schedulers, a warp each), 128 float32
or float16x2, 64 integer, comparison, selection, 16 special functions, 32 memory, half of 128 for
integer multiply-add and for two float32 in one instruction (table "Throughput of Native Arithmetic
Instructions" of NVIDIA's CUDA programming guide, compute capability 9.0; 10.0 is taken to be the
same). F2FP, the conversions between small floats, is not in that table: 64 is a guess;
`slow_convert` is the bound with the 16 of other conversions.

`estimate` = (0.88^-3 + bound^-3)^(-1/3). Both constants were chosen so that "mse, rows" and
"static_6, rows" come out within 3% of what was measured at 16384x16384. The other measurements
are a check, at 8192x5120, where launch and tail take 15% ("mse, rows" reaches 0.649 there). The
general kernel is 8% below what that leaves. The kernels that go through shared memory reach 0.6 of
the estimate: they wait for copies and barriers, of which counts say nothing. So on other devices
the estimate is one for the kernel for rows, and hardly a bound for those.

Devices: 132 SMs at 1.98 GHz, a copy of 2.97 TB/s (H100, see quantize.md) and 4.25 TB/s (H200, same
script); 148 SMs at 1.965 GHz and 8 TB/s for a B200, of which a copy is taken to move 0.887, as on
the other two (2.97 of 3.35 TB/s). No B200 has run any of this."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A GPU.

    Attributes:
        copy: bytes a second that a copy moves.
    """

    name: str
    arch: str
    sms: int
    hertz: float
    copy: float


DEVICES = (
    Device(name="H100", arch="sm_90a", sms=132, hertz=1.98e9, copy=2.97e12),
    Device(name="H200", arch="sm_90a", sms=132, hertz=1.98e9, copy=4.25e12),
    Device(name="B200", arch="sm_100a", sms=148, hertz=1.965e9, copy=7.1e12),
)
RATES = {"issue": 128, "fma": 128, "alu": 64, "convert": 64, "xu": 16, "lsu": 32}
"""Threads a cycle and SM that start an instruction of a kind; `issue` of any."""
SLOW_CONVERT = 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A kernel and what is known about its work.

    Attributes:
        options: of the operator, as `quantize` takes them.
        undecided: share of blocks that take the exact path after all.
        measured: the row of results/quantize.csv for the same kernel, if there is one.
    """

    name: str
    kernel: str
    options: tuple[object, ...]
    dtype: torch.dtype = torch.bfloat16
    undecided: float = 0.0
    measured: tuple[str, str] | None = None


LARGE, SMALL = "16384x16384", "8192x5120"
NEAR, NEAR_STOCHASTIC = 0.028, 0.067
"""Share of a Gaussian's blocks that the filters leave undecided."""
CASES = (
    Case(
        name="mse, rows",
        kernel="quantize_filtered",
        options=("nvfp4", "mse", "nearest", "1d", False, False),
        undecided=NEAR,
        measured=("mse", LARGE),
    ),
    Case(
        name="static_6, rows",
        kernel="quantize_filtered",
        options=("nvfp4", "static_6", "nearest", "1d", False, False),
        measured=("static_6", LARGE),
    ),
    Case(
        name="mse, rows, RHT",
        kernel="quantize_filtered",
        options=("nvfp4", "mse", "nearest", "1d", True, False),
        undecided=NEAR,
    ),
    Case(
        name="mse, columns",
        kernel="quantize_staged",
        options=("nvfp4", "mse", "nearest", "1d", False, True),
        undecided=NEAR,
        measured=("mse, transposed", SMALL),
    ),
    Case(
        name="mse, rows, stochastic",
        kernel="quantize_staged",
        options=("nvfp4", "mse", "stochastic", "1d", False, False),
        undecided=NEAR_STOCHASTIC,
        measured=("mse, stochastic", SMALL),
    ),
    Case(
        name="mse, rows, general kernel",
        kernel="quantize_blocks",
        options=("nvfp4", "mse", "nearest", "1d", False, False),
    ),
    Case(
        name="mse, rows, general kernel, float16",
        kernel="quantize_blocks",
        options=("nvfp4", "mse", "nearest", "1d", False, False),
        dtype=torch.float16,
        measured=("mse, float16", SMALL),
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kernel on one device."""

    kernel: str
    device: str
    instructions: float
    """Of a thread, an element: main loop and the share of the exact path."""
    fma: float
    alu: float
    convert: float
    other: float
    bound: float
    """Fraction of copy bandwidth that the fullest pipe allows; above 1 memory is what limits."""
    by: str
    slow_convert: float
    """The same if conversions take as long as the table says of those that it has."""
    estimate: float
    measured: float | None


def rounds_of(program: sass.Program) -> list[Counter[str]]:
    """What a round of each loop over blocks needs for one block, by pipe.

    The first is the main loop; the exact path of a kernel that has one is the second. A block has
    one conversion of scales to E4M3, however often the compiler unrolled.
    """
    found = []
    for loop in sass.loops(program):
        try:
            way = sass.shortest_round(program, loop)
        except ValueError:  # code moved out of line
            continue
        blocks = sum("SATFINITE.E4M3" in each.modifiers for each in way)
        if blocks:
            counts = sass.count(way)
            found.append(Counter({pipe: counts[pipe] / blocks for pipe in counts}))
    if not 1 <= len(found) <= 2:
        raise ValueError(f"a main loop and perhaps one for undecided blocks, got {len(found)}")
    return found


def weighted(rounds: Sequence[Counter[str]], undecided: float) -> dict[str, float]:
    """Instructions of a thread for a block, by pipe."""
    main, exact = rounds[0], rounds[-1]
    return {pipe: main[pipe] + undecided * exact[pipe] for pipe in sass.PIPES}


def cycles(counts: Mapping[str, float], rates: Mapping[str, float]) -> dict[str, float]:
    """Cycles that an SM needs for a block a thread of a warp, by what it would wait for."""
    slots = {
        "issue": sum(counts.values()),
        # A multiply-add of integers has half the rate; of two float32, two results.
        "fma": counts["fma"] + 2 * counts["fma_pair"] + 2 * counts["imad"],
        **{pipe: counts[pipe] for pipe in ("alu", "convert", "xu", "lsu")},
    }
    return {name: WARP * slots[name] / rates[name] for name in slots}


def bound(device: Device, needed: Mapping[str, float]) -> tuple[float, str]:
    """Fraction of the copy bandwidth that the slowest of `cycles` allows, and its name."""
    slowest = max(needed, key=lambda name: needed[name])
    elements = device.sms * device.hertz * WARP * BLOCK / needed[slowest]
    return elements * BYTES_PER_ELEMENT / device.copy, slowest


def estimate(limit: float) -> float:
    """Between the bound and what a kernel without arithmetic reaches of a copy."""
    return (SHARE**-OVERLAP + limit**-OVERLAP) ** (-1 / OVERLAP)


def row(case: Case, device: Device, program: sass.Program, measured: float | None) -> Row:
    """Model one kernel on one device."""
    counts = weighted(rounds_of(program), case.undecided)
    limit, by = bound(device, cycles(counts, RATES))
    slow, _ = bound(device, cycles(counts, {**RATES, "convert": SLOW_CONVERT}))
    fma = counts["fma"] + counts["fma_pair"] + counts["imad"]
    shown = {"fma": fma, "alu": counts["alu"], "convert": counts["convert"]}
    total = sum(counts.values())
    return Row(
        kernel=case.name,
        device=f"{device.name} ({device.arch})",
        instructions=total / BLOCK,
        other=(total - sum(shown.values())) / BLOCK,
        bound=limit,
        by=by,
        slow_convert=slow,
        estimate=estimate(limit),
        measured=measured,
        **{name: value / BLOCK for name, value in shown.items()},
    )


def disassembler() -> str:
    """Path of nvdisasm: of the pip package, or wherever it is."""
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "nvdisasm":
            return str(file.locate())
    if found := shutil.which("nvdisasm"):
        return found
    raise SystemExit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")


def machine_code(case: Case, arch: str) -> sass.Program:
    """Compile and disassemble a kernel."""
    from fos_compile.kernels.cute import build
    from fos_compile.kernels.cute.tables import NAMES, TABLES

    entry = next(
        each
        for each in TABLES["quantize"]
        if each.name == case.kernel
        and not each.refuses(NAMES["quantize"], case.dtype, case.options)
    )
    key = entry.key(case.dtype, case.options)
    with tempfile.TemporaryDirectory() as folder:
        compiled = build.compiled(key, arch, f"--keep-cubin --dump-dir {folder}")
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.__cubin__)
        command = [disassembler(), "-c", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sass.parse(text)


def measurements() -> dict[tuple[str, str], float]:
    """Fraction of the copy bandwidth by case and shape, where it was measured on an H100."""
    with (harness.RESULTS / "quantize.csv").open() as file:
        rows = [each for each in csv.DictReader(file) if each["of_copy"]]
    return {(each["case"], each["shape"]): float(each["of_copy"]) for each in rows}


def main() -> None:
    """Model every case on every device and write the table."""
    parser = harness.parser(__doc__, name="issue_model")
    args = parser.parse_args()
    known = measurements()
    rows = []
    for case in CASES:
        programs = {arch: machine_code(case, arch) for arch in {each.arch for each in DEVICES}}
        for device in DEVICES:
            measured = known.get(case.measured or ("", "")) if device.name == "H100" else None
            rows.append(row(case, device, programs[device.arch], measured))
    facts = harness.header(args.device, with_roof=False)
    facts["disassembler"] = _version()
    harness.write_results(
        rows,
        title="Predicted from machine code",
        facts=facts,
        md=args.md,
        csv_path=args.csv,
        notes=NOTES,
    )


def _version() -> str:
    done = subprocess.run([disassembler(), "--version"], capture_output=True, text=True, check=True)
    return next(line for line in done.stdout.splitlines() if "release" in line)


if __name__ == "__main__":
    main()
