"""What names mean inside the blocks of a kernel.

PTX blocks nest, and each may declare registers and labels of its own: the same inline assembly
with a local label appears dozens of times in one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.emulator.errors import PtxError
from tests.emulator.ptx.syntax import BITS, Entry, Register, Variable

DYNAMIC = 0x400
"""Where shared memory starts in a CTA's window: hardware keeps the first KiB to itself."""


def width(type_: str, line: int) -> int:
    """Bits of a register type as declared: ``.b32`` and ``.f32`` are both 32."""
    name = type_.lstrip(".")
    if name == "pred":
        return 1
    bits = f"b{name[1:]}"
    if name[:1] not in "busf" or bits not in BITS:
        raise PtxError(f"line {line}: register type {type_} is none of the known ones")
    return BITS[bits]


class Scope:
    """A block: registers, variables and labels by name; asks its parent for what it lacks."""

    def __init__(self, entry: Entry, parent: Scope | None = None) -> None:
        self.entry = entry
        self.parent = parent
        self.registers: dict[str, Register] = {}
        self.ranges: dict[str, tuple[int, int]] = {}
        self.variables: dict[str, Variable] = {}
        self.labels: dict[str, int] = {}

    def chain(self) -> Iterator[Scope]:
        """This block and those around it, innermost first."""
        scope: Scope | None = self
        while scope is not None:
            yield scope
            scope = scope.parent

    def declare(self, name: str, bits: int, line: int) -> None:
        """One register."""
        if name in self.registers:
            raise PtxError(f"line {line}: register {name} is declared twice")
        register = Register(name, bits, len(self.entry.registers))
        self.entry.registers.append(register)
        self.registers[name] = register

    def declare_range(self, stem: str, count: int, bits: int) -> None:
        """``%r<n>``: registers that come into being when first named."""
        self.ranges[stem] = (count, bits)

    def register(self, name: str) -> Register | None:
        """The register of this name, innermost declaration first."""
        stem = name.rstrip("0123456789")
        for scope in self.chain():
            if name in scope.registers:
                return scope.registers[name]
            if stem in scope.ranges and stem != name:
                count, bits = scope.ranges[stem]
                if int(name[len(stem) :]) < count:
                    scope.declare(name, bits, 0)
                    return scope.registers[name]
        return None

    def variable(self, name: str) -> Variable | None:
        """The variable or parameter of this name."""
        return next((s.variables[name] for s in self.chain() if name in s.variables), None)

    def label(self, name: str) -> int | None:
        """Index of the instruction behind a label."""
        return next((s.labels[name] for s in self.chain() if name in s.labels), None)
