"""A readable trace: what each instruction of chosen warps wrote, line by line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np

from tests.emulator.errors import ArgumentsError
from tests.emulator.machine.registers import FULL
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
    for word in words:
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


def tracer(choice: Choice, out: TextIO = sys.stdout) -> Callable[[Warp, int], None]:
    """A function for ``Settings.trace``; shows an instruction when its warp goes on to the next."""
    shown: dict[Warp, int] = {}

    def trace(warp: Warp, pc: int) -> None:
        before = shown.pop(warp, None)
        if before is not None:
            print(_line(warp, before), file=out)
        if _wanted(choice, warp, pc):
            shown[warp] = pc

    return trace


def _wanted(choice: Choice, warp: Warp, pc: int) -> bool:
    if choice.warp not in (None, warp.index) or choice.rank not in (None, warp.cta.rank):
        return False
    instructions = warp.cta.cluster.program.entry.instructions
    return pc < len(instructions) and (
        choice.lines is None or instructions[pc].line in choice.lines
    )


def _line(warp: Warp, pc: int) -> str:
    program = warp.cta.cluster.program
    instruction = program.entry.instructions[pc]
    text = program.module.lines[instruction.line - 1].strip()
    written = [
        f"{register.name}={_value(warp, register)}"
        for register in _registers(instruction.operands[:1])
    ]
    mask = "" if warp.mask == FULL else f" {warp.mask:08x}"
    return f"{warp.name}{mask} {instruction.line:5} {text}   {' '.join(written)}".rstrip()


def _registers(operands: tuple[Operand, ...]) -> Iterator[Register]:
    for each in operands:
        if isinstance(each, Register):
            yield each
        elif isinstance(each, Vector):
            yield from _registers(each.items)
        elif isinstance(each, Pair):
            yield from _registers((each.first, each.second))


def _value(warp: Warp, register: Register) -> str:
    """One number if all lanes agree, else those of the first lanes; `?` where undefined."""
    value = warp.r[register.slot]
    known = warp.d[register.slot]
    if not known & warp.mask:
        return "?"
    if isinstance(value, int):
        return f"{value & FULL:08x}"
    lanes = value[warp.lanes] if warp.lanes.any() else value
    if (lanes == lanes[0]).all():
        return f"{int(lanes[0]):#x}"
    return "[" + " ".join(f"{int(v):x}" for v in np.asarray(lanes)[:4]) + " ..]"
