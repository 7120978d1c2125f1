"""Our FP4 matmul beside NVIDIA's of the same tile, by the machine code; needs no GPU.

Both kernels are compiled for sm_100a and disassembled (`nvdisasm`, of the pip package
nvidia-cuda-nvdisasm). Loops are found by what they hold: UTCOMMA (the MMA warp), UTMALDG (the load
warp), LDTM (the epilogue). A count is of the shortest way once through the innermost such loop that
comes by all of these instructions: slow paths of a wait, and what one thread does for all, are not
on it. A second table predicts times with the cost model of `kernels/cute/matmul_tiles.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import harness
import issue_model
import sass
from fos_compile.bench import cases

ARCH, BF16, BOX = "sm_100a", torch.bfloat16, 32
TILES = (
    ((128, 64), (1, 1)),
    ((128, 128), (1, 1)),
    ((128, 192), (1, 1)),
    ((128, 256), (1, 1)),
    ((256, 64), (2, 1)),
    ((256, 128), (2, 1)),
    ((256, 192), (2, 1)),
    ((256, 256), (2, 1)),
)
"""Each tile in its smallest cluster."""
SHAPES = (*cases.SQUARES, *cases.DECODE)
Tile = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One kernel."""

    tile: str
    kernel: str
    mma_loop: int
    """Instructions of the MMA warp for a stage."""
    per_mma: float
    issue: float
    """Instructions of the MMA warp a cycle that the tensor core needs for the stage."""
    mma_syncs: int
    """Barriers that it waits for or arrives at, for a stage."""
    load_loop: int
    load_syncs: int
    stages: int
    in_flight: int
    """Bytes an SM."""
    registers: int
    epilogue: float
    """Instructions of a thread a number of the output."""
    scaling: float
    """Those among them that multiply by alpha."""
    box_barriers: float
    """Of all epilogue warps, for 32 columns."""


LOWER = ("mma_loop", "per_mma", "mma_syncs", "load_loop", "load_syncs", "registers", "epilogue",
         "box_barriers")  # fmt: skip
"""Columns of which less is better; of `stages` and `in_flight` more is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as the assembler made it."""

    program: sass.Program
    registers: int
    stages: int
    stage_bytes: int


def shortest(program: sass.Program, loop: sass.Loop, start: int, end: int) -> list[int] | None:
    """Positions of the shortest way inside a loop from `start` to `end`, both included."""
    best: dict[int, int] = {}
    queue = [(1, start, -1)]
    while queue:
        cost, at, before = heapq.heappop(queue)
        if at in best:
            continue
        best[at] = before
        if at == end:
            way = [at]
            while best[way[-1]] >= 0:
                way.append(best[way[-1]])
            return way[::-1]
        for to in sass.following(program, at):
            if loop.first <= to <= loop.last and to not in best:
                heapq.heappush(queue, (cost + 1, to, at))
    return None


def once_through(program: sass.Program, name: str) -> list[sass.Instruction]:
    """The shortest way through the innermost loop that holds `name`, by every one of them.

    Raises:
        ValueError: no loop holds it, or no way comes by all.
    """
    code = program.instructions
    found = [
        (loop.last - loop.first, loop.first, loop)
        for loop in sass.loops(program)
        if any(each.name == name for each in code[loop.first : loop.last + 1])
    ]
    if not found:
        raise ValueError(f"no loop with {name}")
    loop = min(found, key=lambda each: each[:2])[2]
    marks = [at for at in range(loop.first, loop.last) if code[at].name == name]
    way = [loop.first]
    for to in (*marks, loop.last):
        part = shortest(program, loop, way[-1], to)
        if part is None:
            raise ValueError(f"no way through the loop at {loop.first} comes by every {name}")
        way += part[1:]
    return [code[at] for at in way]


def count(way: Sequence[sass.Instruction], pattern: str) -> int:
    """Instructions whose name and modifiers match."""
    return sum(re.match(pattern, each.name + each.modifiers) is not None for each in way)


def cycles(tile: Tile) -> float:
    """Of a tensor core for a stage."""
    from fos_compile.kernels.cute import matmul_layout, matmul_tiles

    return matmul_layout.BAND * tile[0][1] * matmul_layout.TILE_K / matmul_tiles.rates(ARCH).macs


SYNC = r"SYNCS|UTCBAR|BAR\.|UCGABAR"


def row(tile: Tile, kernel: str, found: Compiled) -> Row:
    """What the table says of a kernel."""
    mma, load, epilogue = (
        once_through(found.program, name) for name in ("UTCOMMA", "UTMALDG", "LDTM")
    )
    boxes = count(epilogue, r"LDTM.*\.x32")
    if boxes != count(epilogue, "LDTM"):
        raise ValueError(f"{kernel}: an LDTM of other than {BOX} columns")
    return Row(
        tile="{}x{} cluster {}x{}".format(*tile[0], *tile[1]),
        kernel=kernel,
        mma_loop=len(mma),
        per_mma=len(mma) / count(mma, "UTCOMMA"),
        issue=len(mma) / cycles(tile),
        mma_syncs=count(mma, SYNC),
        load_loop=len(load),
        load_syncs=count(load, SYNC),
        stages=found.stages,
        in_flight=found.stages * found.stage_bytes,
        registers=found.registers,
        epilogue=len(epilogue) / (boxes * BOX),
        scaling=count(epilogue, "FMUL2?$") / (boxes * BOX),
        box_barriers=count(epilogue, r"BAR\.") / boxes,
    )


def worse(ours: Row, theirs: Row) -> list[str]:
    """Columns in which ours is worse."""
    found = [name for name in LOWER if getattr(ours, name) > getattr(theirs, name)]
    more = ("stages", "in_flight")
    return found + [name for name in more if getattr(ours, name) < getattr(theirs, name)]


# Compilation --------------------------------------------------------------------------------------


def disassembled(folder: Path) -> tuple[sass.Program, int]:
    """Program and registers of the one cubin in a folder."""
    (cubin,) = folder.glob("*.cubin")
    texts = []
    for options in (["-c"], []):
        command = [issue_model.disassembler(), *options, str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        texts.append(done.stdout)
    return sass.parse(texts[0]), registers(texts[1])


def registers(text: str) -> int:
    """Of a thread, by the attributes of a cubin."""
    word = r"\.word\s+\S+\s+"
    found = re.search(rf"EIATTR_REGCOUNT.*?{word}.*?\.word\s+(0x[0-9a-f]+)", text, re.DOTALL)
    if found is None:
        raise ValueError("nvdisasm prints no EIATTR_REGCOUNT")
    return int(found[1], 16)


def ours(tile: Tile) -> Compiled:
    """Our kernel: bf16 output, no bias."""
    from fos_compile.kernels.cute import build, host_matmul_sm100

    key = host_matmul_sm100.key_of("nvfp4", *tile, dtype=BF16, cols=64)
    with tempfile.TemporaryDirectory() as folder:
        build.compiled(key, ARCH, f"--keep-cubin --dump-dir {folder}")
        program, count = disassembled(Path(folder))
    layout = host_matmul_sm100.tiling(key)
    return Compiled(program, count, layout.stages, layout.load_bytes)


def nvidia(tile: Tile) -> Compiled:
    """NVIDIA's, of nvidia-cutlass-operators: bf16 output, neither alpha nor bias."""
    from cutlass import AddressSpace, BFloat16, Float4E2M1FN, Float8E4M3FN, Int32, cute
    from cutlass.cute.nvgpu.common import OperandMajorMode
    from cutlass.cute.runtime import make_fake_stream, make_ptr
    from cutlass.operators.providers.cutedsl.gemm.implementations import (
        sm100_dense_blockscaled_static_persistent_impl as implementation,
    )
    from cutlass.tensor_utils import LayoutEnum

    kernel: Any = implementation.PersistentDenseBlockScaledGemmKernel(16, *tile)
    types = (Float4E2M1FN, Float4E2M1FN, Float8E4M3FN, Float8E4M3FN, BFloat16)
    pointers = [make_ptr(each, 0, AddressSpace.gmem, assumed_align=32) for each in types]
    layouts = (OperandMajorMode.K, OperandMajorMode.K, LayoutEnum.ROW_MAJOR)
    sizes = tuple(Int32(0) for _ in range(4))
    with tempfile.TemporaryDirectory() as folder:
        cute.compile(
            kernel, *pointers, layouts, sizes, 148, make_fake_stream(),
            options=f"--gpu-arch {ARCH} --keep-cubin --dump-dir {folder}",
        )  # fmt: skip
        program, count = disassembled(Path(folder))
    # Of a pair of CTAs the barrier of one counts what arrives at both.
    stage_bytes = kernel.num_tma_load_bytes // (tile[0][0] // 128)
    return Compiled(program, count, kernel.num_ab_stage, stage_bytes)


# Prediction ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """One shape on a B200, both kernels with the tile that the model chooses for ours."""

    shape: str
    choice: str
    in_flight: int
    """Bytes an SM."""
    us: float
    tflops: float
    of_peak: float
    of_roof: float
    """The longer of peak and DRAM, over the predicted time."""
    nvidia_us: float


def predict(shape: cases.Shape, rows: Sequence[Row]) -> Prediction:
    """By the cost model, with the counted instructions of either epilogue."""
    from fos_compile.kernels.cute import matmul_tiles as tiles

    device = tiles.rates(ARCH)
    sizes = (shape.m, shape.n, shape.k, 1)
    given: dict[str, Any] = {
        "format": "nvfp4", "dtype": BF16, "arch": ARCH, "num_sms": device.num_sms
    }  # fmt: skip
    (choice,) = tiles.best(*sizes, **given)
    tile = "{}x{}".format(*choice.tile)
    counted = {each.kernel: each.epilogue for each in rows if each.tile.split()[0] == tile}
    seconds = {
        name: tiles.seconds(choice, *sizes, **given, instructions=counted[name])
        for name in ("ours", "NVIDIA")
    }
    values = (shape.m + shape.n) * shape.k * 0.5625 + 2 * shape.m * shape.n
    roof = max(shape.flops / device.flops, values / device.dram)
    rate = shape.flops / seconds["ours"]
    return Prediction(
        shape=str(shape),
        choice=str(choice),
        in_flight=tiles.bytes_in_flight(choice, format="nvfp4", dtype=BF16, arch=ARCH),
        us=seconds["ours"] * 1e6,
        tflops=rate / 1e12,
        of_peak=rate / device.flops,
        of_roof=roof / seconds["ours"],
        nvidia_us=seconds["NVIDIA"] * 1e6,
    )


NOTES = """\
`mma_loop` and `load_loop` are instructions of one warp for a stage of 256 columns, `mma_syncs` and
`load_syncs` those among them that wait for or arrive at a barrier (SYNCS, UTCBAR). `issue` is
`mma_loop` over the cycles that the tensor core needs for the stage. `epilogue` is instructions of a
thread a number of the output, `scaling` those among them that multiply by alpha, `box_barriers`
barriers of all four epilogue warps (BAR.SYNC) for 32 columns. `in_flight` is stages times bytes of
a stage, an SM. In tiles of 64 and 128 columns the epilogue's loop is over tiles, in wider ones over
boxes of a tile: `epilogue` of the former includes what is done once a tile.
"""


def main() -> None:
    """Compile, count, predict, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--md", type=Path, default=harness.RESULTS / "matmul_static.md")
    parser.add_argument("--csv", type=Path, default=harness.RESULTS / "matmul_static.csv")
    args = parser.parse_args()
    rows: list[Row] = []
    verdicts: list[str] = []
    for tile in TILES:
        pair = row(tile, "ours", ours(tile)), row(tile, "NVIDIA", nvidia(tile))
        rows += pair
        columns = ", ".join(
            f"`{name}` {getattr(pair[0], name):.4g} to {getattr(pair[1], name):.4g}"
            for name in worse(*pair)
        )
        verdicts.append(f"- {pair[0].tile}: {columns or 'nowhere'}")
    predictions = [predict(shape, rows) for shape in SHAPES]
    parts = [NOTES, "Where ours is worse:", "", *verdicts, "", REASONS, "", "## Predicted", ""]
    text = "\n".join([*parts, harness.markdown_table(predictions), "", PREDICTED])
    facts = harness.header(torch.device("cpu"), with_roof=False)
    title = "Our FP4 matmul beside NVIDIA's, from machine code"
    harness.write_results(rows, title=title, facts=facts, md=args.md, csv_path=args.csv, notes=text)


REASONS = """\
Why:

- `epilogue`: ours multiplies by alpha (`scaling`), which this kernel of NVIDIA's does not have: its
  caller would need another kernel, and would round twice. In wide tiles the rest is no more than
  NVIDIA's, and a warp waits for no other (`box_barriers`). In narrow ones what is done once a tile
  is in the count: ours finds the tile's place in an order that is kind to the L2 cache by a few
  divisions, between asking whether the accumulator is there and waiting for it.
- `mma_loop`: 3 to 6 instructions more in three tiles, fewer in the other five: how descriptors are
  recomputed for a stage, which is the assembler's choice. The warp has more time than it needs
  (`issue`).
- `registers`: nothing depends on it. Shared memory allows one CTA of 192 threads an SM, for which
  there are 341 registers a thread; neither kernel spills."""
PREDICTED = """\
By the model of kernels/cute/matmul_tiles.py at the published rates of a B200 (148 SMs, 9 PFLOP/s,
8 TB/s), which nothing has measured here. `nvidia_us` is the same tile and schedule with the counted
epilogue of NVIDIA's kernel: neither has been timed."""


if __name__ == "__main__":
    main()
