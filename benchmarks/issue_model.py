"""Predict how near to the memory roof the quantizers come, from their machine code: no GPU needed.

Compiles kernels for an architecture, disassembles them (`nvdisasm`, of the pip package
nvidia-cuda-nvdisasm), counts what a thread executes by pipe, and compares the cycles with the time
that the bytes take. Prediction: the longer of the two, the former divided by an issue efficiency.

A count is of the likely way through the whole kernel, every instruction as often as its loops run.
That way handles as many blocks as possible, then makes the wide accesses of tiles inside the
matrix, then is the shortest without calls. A loop on it that handles blocks is *exact* (what is
undecided) if it holds FRND, FCHK or CALL, which filters avoid, else *main*. How many blocks a
thread has is known, so trips follow, whatever was unrolled; if they do not, it is an error.

Threads a cycle and SM: table "Throughput of Native Arithmetic Instructions" of NVIDIA's CUDA C++
Programming Guide (13.x: of the Best Practices Guide, 12.1.1). `NOTES` say what it leaves open.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.metadata
import math
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import harness
import sass

WARP, BLOCK, EFFICIENCY = 32, 16, 0.7
NOTES = f"""\
`main` and `exact` are issue slots of a thread an element of x, for all orientations together,
`fma` to `lsu` slots of a pipe. `bound` is the fraction of copy bandwidth that the fullest (`by`)
allows, above 1 memory limits; `slots` is that of the issue slots alone. `at_100` and `at_70` are
the prediction if all cycles are used, and if {EFFICIENCY:.0%} are: a profiler saw 66 to 75% on an
H100, for the rows of mse among others, so that these agree is no test. `measured` is `of_copy` of
quantize.csv (an H100). It is below `at_70` wherever latency, barriers, a last wave (mse loses 0.11
at 8192x5120), or what memory loses against a copy matter: none is in the model. Take a figure of a
device that was not measured for an upper limit.

Rates, threads a cycle and SM. The table for 9.0: 128 float32, 128 float16x2, 64 integer, logic,
comparison, IMAD, 16 special functions. Not from it: 128 of any kind (four schedulers, a warp each),
64 for two float32 in an instruction, 128 bytes of shared or global memory without bank conflicts;
F2FP 32 where it packs, 64 where it unpacks, as others measured on a B300. 10.0 is taken to be as
9.0, though integer sums and minima may be faster there: see `slots`. H100, H200: 132 SMs at 1.98
GHz, copy 3 TB/s (quantize.md) and 4.25 TB/s (same script). B200: 148 SMs at 1.9 GHz, and 8 TB/s is
its peak: if it copies at 0.9 of it, as an H100, `bound` is 1.1 times as high.

Loops of a thread: instructions with inner loops once, blocks an iteration, iterations."""


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """A GPU; `copy` is in bytes a second."""

    name: str
    arch: str
    sms: int
    hertz: float
    copy: float


RATES = {
    "issue": 128, "fma": 128, "half": 128, "alu": 64, "pack": 32, "unpack": 64, "xu": 16, "lsu": 32
}  # fmt: skip
DEVICES = (
    Device("H100", "sm_90a", 132, 1.98e9, 3.0e12),
    Device("H200", "sm_90a", 132, 1.98e9, 4.25e12),
    Device("B200", "sm_100a", 148, 1.9e9, 8e12),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a thread of a kernel does.

    Attributes:
        elements: of x.
        marks: how often a thread executes `mark` for an orientation.
        mark: instruction that stands for a block.
        wide: memory instructions that tiles inside the matrix execute; several: by turns.
        inner: trips of loops inside a main loop: that handle blocks, that store, others.
        warps: that share a queue of undecided blocks; 0 if a warp takes tile by tile.
    """

    elements: int
    marks: int
    mark: str = r"F2FP\.SATFINITE\.E4M3"
    wide: tuple[str, ...] = ("LDGSTS",)
    inner: tuple[int, int, int] = (0, 0, 0)
    warps: int = 4


# 16 rounds; a 128x128 tile; 4 rounds, every other one stores columns; 8 rounds, as in large sizes.
FILTERED = Work(elements=16 * 16, marks=16)
STAGED = Work(elements=4 * 16, marks=4, inner=(2, 0, 0), warps=8)
TILES = Work(
    elements=16 * 16, marks=4, wide=("LDGSTS", r"LDGSTS|STG\.E\.128"), inner=(0, 2, 4), warps=0
)
DEQUANTIZE = Work(elements=8 * 16, marks=8, mark=r"F2FP\.F16\.E4M3\.UNPACK", wide=(r"STG\S*\.128",))
AMAX = Work(elements=8 * 16, marks=16, mark=r"LDG\S*\.128")
ONE, BOTH = 2 + 9 / 16, 2 + 2 * 9 / 16
"""Bytes an element: bf16, codes, scales."""


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """A kernel, named as its row of quantize.csv, with options in the order of `tables.NAMES`.

    `undecided` is the measured share of blocks that take each exact path, `sides` the number of
    orientations that handle blocks of their own.
    """

    name: str
    shape: str
    op: str
    kernel: str
    options: tuple[object, ...]
    work: Work
    bytes_: float
    undecided: tuple[float, ...] = ()
    sides: int = 1


_F, _S, _T = "quantize_filtered", "quantize_staged", "quantize_tiles_staged"
_LARGE, _DEEP, _WEIGHT = "16384x16384", "8192x5120", "14336x4096"
_Q, _P, _4 = "quantize", "quantize_pair", "nvfp4"
_1D, _2D = ("nearest", "1d", False), ("2d", "nearest", "nearest", False, False)
_RHT = ("1d", "nearest", "stochastic", False, True)
CASES = (
    Case("mse", _LARGE, _Q, _F, (_4, "mse", *_1D, False), FILTERED, ONE, (0.028,)),
    Case("static_6", _LARGE, _Q, _F, (_4, "static_6", *_1D, False), FILTERED, ONE, (0.0,)),
    Case("mse, transposed", _DEEP, _Q, _S, (_4, "mse", *_1D, True), STAGED, ONE, (0.028,)),
    Case("mse, stochastic", _DEEP, _Q, _S, (_4, "mse", "stochastic", "1d", False, False),
         STAGED, ONE, (0.067,)),
    Case("mse, row nearest + column RHT stochastic", _DEEP, _P, _S, (_4, "mse", *_RHT),
         STAGED, BOTH, (0.028, 0.067), 2),
    Case("mse, 2D, both orientations", _WEIGHT, _P, _T, (_4, "mse", *_2D), TILES, BOTH, (0.02,)),
    Case("static_6, 2D, both orientations", _WEIGHT, _P, _T, (_4, "static_6", *_2D),
         TILES, BOTH, (0.0,)),
    Case("amax with RHT", _LARGE, "amax", "amax_rotated", (True,), AMAX, 2),
    Case("dequantize to bf16", _LARGE, "dequantize", "dequantize_blocks",
         (_4, False, torch.bfloat16), DEQUANTIZE, ONE),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kernel on one device."""

    kernel: str
    device: str
    main: float
    exact: float
    fma: float
    alu: float
    xu: float
    lsu: float
    bound: float
    by: str
    slots: float
    at_100: float
    at_70: float
    measured: float | None = None


def likely(program: sass.Program, mark: str, wide: str) -> list[int]:
    """Positions on the way from the start to an EXIT that the module's docstring describes."""
    code = program.instructions
    best: dict[int, tuple[tuple[int, int, int], int]] = {}
    for at in reversed(range(len(code))):
        each = code[at]
        onward = [to for to in sass.following(program, at) if to in best]
        ends = each.name == "EXIT" and not each.is_predicated
        if not onward and not ends:
            continue
        to = -1 if ends else max(onward, key=lambda to: best[to][0])
        marks, wides, cost = (0, 0, 0) if ends else best[to][0]
        score = marks + _matches(each, mark), wides + _matches(each, wide), cost - 1
        best[at] = score, to
    if 0 not in best:
        raise ValueError("no way without a call from the start of the kernel to an EXIT")
    way, at = [], 0
    while at >= 0:
        way.append(at)
        at = best[at][1]
    return way


def _matches(each: sass.Instruction, pattern: str) -> bool:
    return re.match(pattern, each.name + each.modifiers) is not None


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """A loop on the likely way: its size and marks when inner loops run once, and its trips."""

    first: int
    last: int
    kind: str
    instructions: int
    marks: int
    trips: float = 1

    def holds(self, at: int) -> bool:
        """Whether an instruction belongs to it."""
        return self.first <= at <= self.last

    def inside(self, others: Sequence[Turn]) -> bool:
        """Whether it is part of another one of them."""
        return any(each != self and each.holds(self.first) and each.holds(self.last)
                   for each in others)  # fmt: skip


def turns_of(program: sass.Program, way: Sequence[int], case: Case) -> list[Turn]:
    """The loops on the likely way; an error if they do not explain the blocks of a thread."""
    work, code = case.work, program.instructions
    marked = [at for at in way if _matches(code[at], work.mark)]
    found = []
    for loop in sass.loops(program):
        here = range(loop.first, loop.last + 1)
        marks, size = (sum(at in here for at in each) for each in (marked, way))
        slow = any(code[at].name in ("FRND", "FCHK", "CALL") for at in here)
        if size:
            kind = "once" if not marks else "exact" if slow else "main"
            found.append(Turn(loop.first, loop.last, kind, size, marks))
    turns, shares = [], list(case.undecided)
    main = [each for each in found if each.kind == "main"]
    for each in found:
        kind, trips = each.kind, 1.0
        if each.inside(main):
            stores = any(it.name == "STG" for it in code[each.first : each.last + 1])
            kind, trips = "inner", work.inner[0 if each.marks else 1 if stores else 2]
            if not trips:
                raise ValueError(f"{case.name}: unknown loop inside a main loop, at {each.first}")
        elif kind == "exact" and any(it.marks and it.inside([each]) for it in found):
            kind = "once"  # around main and exact loops
        elif kind == "exact":
            share = shares.pop(0) if shares else math.nan
            trips = share * work.elements * WARP / BLOCK**2
            if work.warps and share >= 0:  # together, in whole turns of a warp
                trips = math.ceil(share * work.marks * work.warps) / work.warps
        turns.append(dataclasses.replace(each, kind=kind, trips=trips))
    if shares or any(math.isnan(each.trips) for each in turns):
        raise ValueError(f"{case.name}: other exact paths than the {len(case.undecided)} it has")
    looping = [each for each in turns if each.kind in ("main", "exact")]
    left: float = case.sides * work.marks
    left -= sum(not any(each.holds(at) for each in looping) for at in marked)  # unrolled
    for each in sorted(looping, key=lambda each: -each.marks):
        if each.kind == "main":
            once = each.marks + sum((it.trips - 1) * it.marks for it in turns if it.inside([each]))
            # What remains of an unrolled loop has nothing to do where the trips come out even.
            trips = work.marks / once if left > 0 else 0
            left -= once * trips
            turns.remove(each)
            turns.append(dataclasses.replace(each, marks=int(once), trips=trips))
    if left or any(each.trips % 1 for each in turns if each.kind == "main"):
        raise ValueError(f"{case.name}: main loops leave {left:g} of its blocks unexplained")
    return sorted(turns, key=lambda each: each.first)


def slots(each: sass.Instruction) -> dict[str, float]:
    """What an instruction takes of each pipe, in slots of that pipe."""
    pipe = sass.pipe(each)
    if pipe == "fma":
        return {"half" if each.name.startswith("H") else "fma": 1}
    if pipe in ("imad", "fma_pair"):
        return {"fma": 2}  # half the rate; two results
    if pipe == "convert":
        return {"unpack" if each.modifiers.endswith("UNPACK_B") else "pack": 1}
    if pipe == "lsu":
        width = re.search(r"\.(128|64)\b|\.(4)$", each.modifiers)
        return {"lsu": {"128": 4, "64": 2, "4": 4}[width[1] or width[2]] if width else 1}
    return {pipe: 1}


def count(program: sass.Program, case: Case) -> dict[str, Counter[str]]:
    """What a thread takes of each pipe, `issue` being of all, in main and in exact loops."""
    counts = {"main": Counter[str](), "exact": Counter[str]()}
    for wide in case.work.wide:
        way = likely(program, case.work.mark, wide)
        turns = turns_of(program, way, case)
        for at in way:
            around = [each for each in turns if each.holds(at)]
            times = math.prod(each.trips for each in around) / len(case.work.wide)
            kind = "exact" if any(each.kind == "exact" for each in around) else "main"
            for pipe, slot in {"issue": 1.0, **slots(program.instructions[at])}.items():
                counts[kind][pipe] += slot * times  # type: ignore[assignment]
    return counts


def cycles(counts: Mapping[str, float]) -> dict[str, float]:
    """Cycles of an SM for a warp, by what it would wait for."""
    each = {pipe: WARP * counts.get(pipe, 0) / rate for pipe, rate in RATES.items()}
    each["fma"] += each.pop("half")
    each["xu"] += each.pop("pack") + each.pop("unpack")
    return each


def row(case: Case, device: Device, counts: Mapping[str, Mapping[str, float]]) -> Row:
    """Model one kernel on one device."""
    main, exact = ({pipe: counts[kind].get(pipe, 0) / case.work.elements for pipe in RATES}
                   for kind in ("main", "exact"))  # fmt: skip
    total = {pipe: main[pipe] + exact[pipe] for pipe in RATES}
    needed = cycles(total)
    by = max(needed, key=lambda name: needed[name])
    rate = device.sms * device.hertz * WARP * case.bytes_ / device.copy
    return Row(
        kernel=case.name,
        device=f"{device.name} ({device.arch})",
        main=main["issue"],
        exact=exact["issue"],
        fma=total["fma"] + total["half"],
        alu=total["alu"],
        xu=total["xu"] + total["pack"] + total["unpack"],
        lsu=total["lsu"],
        bound=rate / needed[by],
        by=by,
        slots=rate / needed["issue"],
        at_100=min(1.0, rate / needed[by]),
        at_70=min(1.0, EFFICIENCY * rate / needed[by]),
    )


def disassembler() -> str:
    """Path of nvdisasm: of the pip package, of triton, or wherever it is."""
    for name in ("nvidia-cuda-nvdisasm", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for file in importlib.metadata.files(name) or []:
                if file.name == "nvdisasm":
                    return str(file.locate())
    if found := shutil.which("nvdisasm"):
        return found
    raise SystemExit("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")


def machine_code(case: Case, arch: str) -> sass.Program:
    """Compile and disassemble a kernel."""
    from fos_compile.kernels.cute import build
    from fos_compile.kernels.cute.tables import NAMES, TABLES

    dtype = torch.uint8 if case.op == "dequantize" else torch.bfloat16
    able = [each for each in TABLES[case.op] if each.name == case.kernel
            and not each.refuses(NAMES[case.op], dtype, case.options)]  # fmt: skip
    columns = "transposed" in case.name
    entry = next(each for each in able if each.reads.get("by_column", False) == columns)
    with tempfile.TemporaryDirectory() as folder:
        build.compiled(entry.key(dtype, case.options), arch, f"--keep-cubin --dump-dir {folder}")
        (cubin,) = Path(folder).glob("*.cubin")
        command = [disassembler(), "-c", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return sass.parse(done.stdout)


def measurements() -> dict[tuple[str, str], float]:
    """Fraction of the copy bandwidth by case and shape, on an H100."""
    with (harness.RESULTS / "quantize.csv").open() as file:
        rows = [each for each in csv.DictReader(file) if each["of_copy"]]
    return {(each["case"], each["shape"]): float(each["of_copy"]) for each in rows}


def main() -> None:
    """Model every case on every device and write the table."""
    parser = harness.parser(__doc__, name="issue_model")
    parser.add_argument("--devices", default=",".join(each.name for each in DEVICES))
    args = parser.parse_args()
    known = measurements()
    devices = [each for each in DEVICES if each.name in args.devices.split(",")]
    rows, loops = [], ["| kernel | arch | loop | instructions | blocks | trips |", "|---" * 6 + "|"]
    for case in CASES:
        programs = {arch: machine_code(case, arch) for arch in sorted({it.arch for it in devices})}
        for arch, program in programs.items():
            way = likely(program, case.work.mark, case.work.wide[-1])
            for it in turns_of(program, way, case):
                blocks = it.marks * case.work.elements / BLOCK / case.work.marks
                shown = f"{blocks:g}" if it.kind == "main" else ""
                cells = case.name, arch, it.kind, str(it.instructions), shown, f"{it.trips:g}"
                loops.append("| " + " | ".join(cells) + " |")
        for device in devices:
            done = row(case, device, count(programs[device.arch], case))
            if device.name == "H100":
                done = dataclasses.replace(done, measured=known.get((case.name, case.shape)))
            rows.append(done)
    title, facts = "Predicted from machine code", harness.header(args.device, with_roof=False)
    text = "\n".join([NOTES, "", *loops])
    harness.write_results(rows, title=title, facts=facts, md=args.md, csv_path=args.csv, notes=text)


if __name__ == "__main__":
    main()
