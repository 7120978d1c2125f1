"""Which instructions a target has (PTX ISA, "Target ISA Notes" of each).

An assembler would refuse them; PTX that was edited or written by hand reaches the emulator first.
"""

from __future__ import annotations

import re

from tests.emulator.errors import PtxError
from tests.emulator.ptx.syntax import Instruction

_HOPPER = frozenset({"mapa", "getctarank", "elect", "setmaxnreg", "stmatrix", "griddepcontrol"})
_FP4 = re.compile(r"e2m1|e2m3|e3m2|ue8m0")


def _needs(instruction: Instruction) -> tuple[int, str, str]:
    """Least architecture, its suffix ("a" or none), and families if not all newer ones."""
    modifiers = instruction.modifiers
    opcode = instruction.opcode
    if opcode == "tcgen05" or (opcode == "cvt" and "rs" in modifiers and "e2m1x4" in modifiers):
        return 100, "a", "100 101 103 110"
    if opcode == "mma" and any(name.startswith("kind::") for name in modifiers):
        return 120, "a", "120 121"
    if opcode == "cvt" and any(_FP4.search(name) for name in modifiers):
        return 100, "a", ""
    if opcode == "redux" and "f32" in modifiers:
        return 100, "a", ""
    if "f32x2" in modifiers:
        return 100, "", ""
    if opcode in _HOPPER or "cluster" in modifiers or "bulk" in modifiers:
        return 90, "", ""
    if opcode == "mbarrier" and {"try_wait", "expect_tx"}.intersection(modifiers):
        return 90, "", ""
    if opcode == "cvt" and any("e4m3" in name or "e5m2" in name for name in modifiers):
        return 89, "", ""
    return 80, "", ""


def check(instruction: Instruction, target: str) -> None:
    """Raise if the target lacks the instruction."""
    found = re.fullmatch(r"sm_(\d+)([af]?)", target)
    if found is None:
        raise PtxError(f"target {target}: the emulator knows sm_80 and newer")
    number, suffix = int(found[1]), found[2]
    least, wanted, families = _needs(instruction)
    if number < least or (wanted and not suffix) or (families and found[1] not in families.split()):
        need = " or ".join(f"sm_{f}a" for f in families.split()) or f"sm_{least}{wanted} or newer"
        raise PtxError(
            f"line {instruction.line}: {instruction.name} needs {need}; this PTX is for {target}"
        )
