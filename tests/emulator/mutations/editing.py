"""An editable copy of a kernel: its instructions, its launch, its data.

Places are found by structure, never by line number, so that faults survive another compiler. What
is taken out becomes a no-op and what is put in shifts labels, so that branches still land right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.emulator.host import Host
from tests.emulator.launch import Launch
from tests.emulator.operators import Problem
from tests.emulator.ptx.syntax import (
    Address,
    Guard,
    Immediate,
    Instruction,
    Label,
    Not,
    Operand,
    Pair,
    Register,
    Vector,
)
from tests.emulator.tensor_map import TensorMap, decode, encode

_NO_RESULT = ("st", "bra", "bar", "barrier", "fence", "membar", "cp", "ret", "exit", "prefetch")


class Kernel:
    """A copy of a kernel to put one fault into; what it was copied from stays as it is."""

    def __init__(self, host: Host) -> None:
        (entry,) = host.module.entries.values()
        self.host = host
        self.entry = replace(
            entry, instructions=list(entry.instructions), registers=list(entry.registers)
        )
        self.code = self.entry.instructions
        self.launch_edits: list[Callable[[Launch], Launch]] = []
        self.data_edits: list[Callable[[Problem], Problem]] = []

    # Finding -----------------------------------------------------------------------------------

    def find(
        self, opcode: str, *modifiers: str, start: int = 0, stop: int | None = None
    ) -> list[int]:
        """Indices of the instructions with an opcode and, among others, these modifiers."""
        stop = len(self.code) if stop is None else stop
        return [
            index
            for index in range(start, stop)
            if self.code[index].opcode == opcode
            and all(name in self.code[index].modifiers for name in modifiers)
        ]

    def writers(self, register: Operand, start: int = 0, stop: int | None = None) -> list[int]:
        """Indices of the instructions that write a register."""
        stop = len(self.code) if stop is None else stop
        return [i for i in range(start, stop) if register in _results(self.code[i])]

    def definition(self, register: Operand, before: int) -> int:
        """Index of the last instruction in the text before an index that writes a register."""
        found = self.writers(register, 0, before)
        assert found, f"nothing writes {register} before {self.code[before].name}"
        return found[-1]

    # Changing ----------------------------------------------------------------------------------

    def drop(self, *indices: int) -> None:
        """Make instructions do nothing."""
        for index in indices:
            old = self.code[index]
            self.code[index] = Instruction(
                "nanosleep", ("u32",), (Immediate(0),), None, old.line, old.location
            )

    def change(self, index: int, **fields: Any) -> None:
        """Set fields of an instruction."""
        self.code[index] = replace(self.code[index], **fields)

    def operand(self, index: int, number: int, new: Operand) -> None:
        """Set an operand."""
        operands = list(self.code[index].operands)
        operands[number] = new
        self.change(index, operands=tuple(operands))

    def immediate(self, index: int, change: Callable[[int], int]) -> None:
        """Change the only literal among an instruction's operands."""
        operands = self.code[index].operands
        (number,) = [n for n, each in enumerate(operands) if isinstance(each, Immediate)]
        literal = operands[number]
        assert isinstance(literal, Immediate)
        self.operand(index, number, Immediate(change(literal.value)))

    def move_address(self, index: int, number: int, by: int) -> None:
        """Add to the offset of an operand in brackets."""
        address = self.code[index].operands[number]
        assert isinstance(address, Address)
        self.operand(index, number, replace(address, offset=address.offset + by))

    def insert(self, index: int, *added: Instruction) -> None:
        """Put instructions before an index; branches to there execute them, too."""
        count = len(added)
        for i, each in enumerate(self.code):
            shifted = tuple(_shift(operand, index, count) for operand in each.operands)
            if shifted != each.operands:
                self.code[i] = replace(each, operands=shifted)
        here = self.code[min(index, len(self.code) - 1)]
        self.code[index:index] = [
            replace(
                each,
                line=here.line,
                location=here.location,
                operands=tuple(_shift(operand, index, count) for operand in each.operands),
            )
            for each in added
        ]

    def register(self, bits: int) -> Register:
        """A new register."""
        made = Register(f"%new{len(self.entry.registers)}", bits, len(self.entry.registers))
        self.entry.registers.append(made)
        return made

    def add_to_coordinate(self, index: int, dimension: int, by: int) -> None:
        """Move the box of a tensor copy."""
        code = self.code[index]
        (number,) = [
            n for n, o in enumerate(code.operands) if isinstance(o, Address) and o.coordinates
        ]
        address = code.operands[number]
        assert isinstance(address, Address)
        assert address.coordinates is not None
        items = list(address.coordinates.items)
        moved = self.register(32)
        add = instruction("add.s32", moved, items[dimension], Immediate(by))
        items[dimension] = moved
        self.operand(index, number, replace(address, coordinates=Vector(tuple(items))))
        self.insert(index, add)

    # Launch and data ---------------------------------------------------------------------------

    def tensor_map(self, number: int, change: Callable[[TensorMap], TensorMap]) -> None:
        """Change a tensor map among the parameters: 0 A, 1 B, 2 SFA, 3 SFB, 4 output."""

        def edit(launch: Launch) -> Launch:
            params = list(launch.params)
            maps = [i for i, each in enumerate(params) if len(each) == 128]
            assert len(maps) == 5
            params[maps[number]] = encode(change(decode(params[maps[number]])))
            return replace(launch, params=tuple(params))

        self.launch_edits.append(edit)

    def launch(self, change: Callable[[Launch], Launch]) -> None:
        """Change the launch."""
        self.launch_edits.append(change)

    def mutated(self) -> MutatedHost:
        """The host code with the changed kernel behind it."""
        return MutatedHost(self)


class MutatedHost(Host):
    """Host code that launches a changed kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.__dict__.update(kernel.host.__dict__)
        self.module = replace(kernel.host.module, entries={kernel.entry.name: kernel.entry})
        self._edits = kernel.launch_edits

    def launches(self, *arguments: Any) -> list[Launch]:
        """What the host code launches, changed."""
        found = super().launches(*arguments)
        for edit in self._edits:
            found = [edit(launch) for launch in found]
        return found


def instruction(name: str, *operands: Operand, guard: Guard | None = None) -> Instruction:
    """A new instruction, as written in PTX."""
    opcode, *modifiers = name.split(".")
    return Instruction(opcode, tuple(modifiers), operands, guard, 0, None)


def _results(each: Instruction) -> tuple[Operand, ...]:
    """Registers that an instruction writes."""
    if not each.operands or each.opcode in _NO_RESULT:
        return ()
    first = each.operands[0]
    if isinstance(first, Vector):
        return first.items
    if isinstance(first, Pair):
        return (first.first, first.second)
    return (first,)


def _shift(operand: Operand, start: int, count: int) -> Operand:
    if isinstance(operand, Label) and operand.index > start:
        return replace(operand, index=operand.index + count)
    return operand


def register_of(operand: Operand) -> Register:
    """The register of an operand: itself, negated, or the base of an address."""
    if isinstance(operand, Not):
        operand = operand.operand
    if isinstance(operand, Address):
        operand = operand.base
    assert isinstance(operand, Register)
    return operand
