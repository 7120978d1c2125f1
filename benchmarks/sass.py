"""Loops of a kernel in the text that `nvdisasm -c` prints, and which pipes their instructions take.

Pure functions: what is counted can be tested without a compiler or a disassembler.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_LABEL = re.compile(r"\s*(\.L\w+):")
_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_PARTS = re.compile(r"(@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_]*)([.\w]*)")
_TARGET = re.compile(r"`\((\.L\w+)\)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One of a function."""

    name: str
    """Without modifiers: ``FFMA``."""
    modifiers: str
    is_predicated: bool
    target: str
    """The label that a branch names, or nothing."""


@dataclass(frozen=True, slots=True)
class Program:
    """A function: instructions, and the position of each label among them."""

    instructions: Sequence[Instruction]
    labels: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Loop:
    """Positions of the first instruction and of the branch back to it."""

    first: int
    last: int


def parse(text: str) -> Program:
    """Read what nvdisasm prints of one function."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif (found := _LINE.match(line)) and (parts := _PARTS.match(found[2])):
            target = _TARGET.search(found[2])
            # A branch may also be conditional by a second predicate: "BRA !P0, `(.L_x_3)".
            conditional = parts[1] is not None or re.search(r"BRA\S* !?U?P\d", found[2]) is not None
            instructions.append(
                Instruction(parts[2], parts[3], conditional, target[1] if target else "")
            )
    return Program(instructions, labels)


def loops(program: Program) -> list[Loop]:
    """All branches back, in the order of the program, without a kernel's last branch to itself."""
    found = []
    for at, each in enumerate(program.instructions):
        if each.name == "BRA" and (to := program.labels.get(each.target, at)) < at:
            found.append(Loop(to, at))
    return found


def shortest_round(program: Program, loop: Loop) -> list[Instruction]:
    """The way through a loop with the fewest instructions, without calls.

    That leaves out what is not the rule: slow paths of divisions, divisions by IEEE instructions
    where there are faster ones beside them.
    """
    best: dict[int, int | None] = {loop.first: None}
    queue = [(1, loop.first, -1)]
    seen: set[int] = set()
    while queue:
        cost, at, before = heapq.heappop(queue)
        if at in seen:
            continue
        seen.add(at)
        best[at] = before if before >= 0 else None
        if at == loop.last:
            break
        for to in following(program, at):
            if loop.first <= to <= loop.last and to not in seen:
                heapq.heappush(queue, (cost + 1, to, at))
    if loop.last not in seen:
        raise ValueError(f"no way without a call through the loop at {loop.first}")
    way: list[Instruction] = []
    step: int | None = loop.last
    while step is not None:
        way.append(program.instructions[step])
        step = best[step]
    return way[::-1]


def following(program: Program, at: int) -> Iterable[int]:
    """Positions that may come after one."""
    each = program.instructions[at]
    if each.name == "BRA" and each.target in program.labels:
        yield program.labels[each.target]
    leaves = each.name in ("BRA", "BRX", "EXIT", "RET")
    if each.name != "CALL" and (each.is_predicated or not leaves):
        yield at + 1


_FMA = {"FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2"}
_PAIRS = {"FADD2", "FMUL2", "FFMA2"}
_XU = {"MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"}
_LSU = {"LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS", "ATOMS", "RED", "ATOMG", "SHFL"}
_LSU |= {"LDC", "MATCH", "REDUX", "MOVM"}
_CONTROL = {"BRA", "BRX", "BSSY", "BSYNC", "EXIT", "NOP", "WARPSYNC", "BAR", "DEPBAR", "CALL"}
_CONTROL |= {"RET", "LDGDEPBAR", "YIELD", "CCTL", "ERRBAR", "MEMBAR"}
PIPES = ("fma", "fma_pair", "imad", "alu", "convert", "xu", "lsu", "uniform", "control")


def pipe(instruction: Instruction) -> str:
    """Which of `PIPES` executes it: everything that is not known to be elsewhere is ALU."""
    name = instruction.name
    if name in _FMA:
        return "fma"
    if name in _PAIRS:
        return "fma_pair"
    if name == "IMAD":
        return "imad"
    if name == "F2FP":
        return "convert"
    for found, names in (("xu", _XU), ("lsu", _LSU), ("control", _CONTROL)):
        if name in names:
            return found
    # UIADD3, ULDC, ULEA, and R2UR on its way there.
    return "uniform" if name.startswith("U") or name in ("R2UR", "S2UR") else "alu"


def count(instructions: Iterable[Instruction]) -> Counter[str]:
    """How many go to each of `PIPES`."""
    return Counter(pipe(each) for each in instructions)
