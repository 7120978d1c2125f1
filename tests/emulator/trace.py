"""A readable trace: what each instruction of chosen warps wrote, line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from tests.emulator.errors import ArgumentsError
from tests.emulator.machine.cluster import Cluster
from tests.emulator.machine.registers import FULL, lanes_of
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Operand, Pair, Register, Vector


@dataclass(frozen=True)
class Choice:
    """What to trace: a warp of each CTA, a CTA by its rank, a range of PTX lines; None: all."""

    warp: int | None = None
    rank: int | None = None
    lines: range | None = None


def parse(words: list[str]) -> Choice:
    """``warp=0 rank=1 lines=100-140``."""
    found: dict[str, Any] = {}
    for word in (each for given in words for each in given.replace(",", " ").split()):
        name, _, value = word.partition("=")
        try:
            if name == "lines":
                first, _, last = value.partition("-")
                found[name] = range(int(first), int(last or first) + 1)
            elif name in ("warp", "rank"):
                found[name] = int(value)
            else:
                raise ArgumentsError(f"--trace takes warp=, rank= and lines=, got {word}")
        except ValueError as error:
            raise ArgumentsError(f"--trace: {word}: {error}") from error
    return Choice(**found)


class Tracer:
    """For ``Settings.trace``: shows an instruction when its warp goes on to the next.

    `flush` shows the last one of each warp, which may be the one that faulted.
    """

    def __init__(self, choice: Choice, out: TextIO | None = None) -> None:
        self.choice = choice
        self.out = out or sys.stdout
        self.seen: dict[Warp, tuple[int, int]] = {}
        """Program counter and executing lanes of what a warp executes."""
        self.cluster: Cluster | None = None

    def __call__(self, warp: Warp, pc: int) -> None:
        if warp.cta.cluster is not self.cluster:
            self.flush()
            self.cluster = warp.cta.cluster
        self._show(warp)
        if _wanted(self.choice, warp, pc):
            self.seen[warp] = pc, warp.mask

    def _show(self, warp: Warp) -> None:
        if warp in self.seen:
            print(_line(warp, *self.seen.pop(warp)), file=self.out)

    def flush(self) -> None:
        """Show what has not been shown yet."""
        for warp in list(self.seen):
            self._show(warp)
        self.out.flush()


def _wanted(choice: Choice, warp: Warp, pc: int) -> bool:
    if choice.warp not in (None, warp.index) or choice.rank not in (None, warp.cta.rank):
        return False
    instructions = warp.cta.cluster.program.entry.instructions
    return pc < len(instructions) and (
        choice.lines is None or instructions[pc].line in choice.lines
    )


def _line(warp: Warp, pc: int, mask: int) -> str:
    program = warp.cta.cluster.program
    instruction = program.entry.instructions[pc]
    text = program.module.lines[instruction.line - 1].strip()
    written = [
        f"{register.name}={_value(warp, register, mask)}"
        for register in _registers(instruction.operands[:1])
    ]
    lanes = "" if mask == FULL else f" {mask:08x}"
    return f"{warp.name}{lanes} {instruction.line:5} {text}   {' '.join(written)}".rstrip()


def _registers(operands: tuple[Operand, ...]) -> Iterator[Register]:
    for each in operands:
        if isinstance(each, Register):
            yield each
        elif isinstance(each, Vector):
            yield from _registers(each.items)
        elif isinstance(each, Pair):
            yield from _registers((each.first, each.second))


def _value(warp: Warp, register: Register, mask: int) -> str:
    """One number if all lanes agree, else those of the first lanes; `?` where undefined."""
    value = warp.r[register.slot]
    known = warp.d[register.slot]
    if not known & mask:
        return "?"
    if isinstance(value, int):
        return f"{value & FULL:08x}"
    lanes = value[lanes_of(mask)]
    if (lanes == lanes[0]).all():
        return f"{int(lanes[0]):#x}"
    return "[" + " ".join(f"{int(v):x}" for v in np.asarray(lanes)[:4]) + " ..]"
