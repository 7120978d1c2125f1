"""The front end's result: a module, its entries, and their instructions with operands resolved.

Names are gone after parsing: a register is a :class:`Register` of one declaration, so two blocks
that declare the same name hold two registers, and a label is an index of an instruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "b128": 128}
"""Widths of registers; .u, .s and .f declarations become .b of the same width."""


@dataclass(frozen=True)
class Register:
    """A register: `slot` is its place in a warp's register file."""

    name: str
    bits: int
    slot: int


@dataclass(frozen=True)
class Special:
    """A read-only register of the machine, as in ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A literal: an integer, or the bits of a float of `float_bits` bits."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Variable:
    """A name with an address: a parameter, or a variable of shared, global or local memory."""

    name: str
    space: str
    address: int


@dataclass(frozen=True)
class Label:
    """A place to branch to: index of an instruction."""

    name: str
    index: int


@dataclass(frozen=True)
class Sink:
    """``_``: the result is not wanted."""


@dataclass(frozen=True)
class Not:
    """``!p``: a predicate operand, negated."""

    operand: Register


@dataclass(frozen=True)
class Pair:
    """``d|p``: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Vector:
    """``{a, b}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """``[base+offset]``, or ``[base, {coordinates}]`` of a tensor map."""

    base: Register | Variable | Immediate
    offset: int = 0
    coordinates: Vector | None = None


Operand = Register | Special | Immediate | Variable | Label | Sink | Not | Pair | Vector | Address


@dataclass(frozen=True)
class Guard:
    """``@p`` or ``@!p``."""

    predicate: Register
    negated: bool


@dataclass(frozen=True)
class Location:
    """A line of the kernel's source, from ``.loc``: `file` is a key of :attr:`Module.files`."""

    file: int
    line: int


@dataclass(frozen=True)
class Instruction:
    """One instruction: `opcode` is the word before the first dot, `modifiers` the rest."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Guard | None
    line: int
    location: Location | None

    @property
    def name(self) -> str:
        """The opcode with its modifiers, as written."""
        return ".".join((self.opcode, *self.modifiers))


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter of `size` bytes at `offset` of the parameter space."""

    name: str
    size: int
    offset: int


@dataclass(frozen=True)
class Storage:
    """A variable of shared, global or local memory: `size` 0 for dynamic shared memory."""

    name: str
    space: str
    size: int
    align: int
    content: bytes = b""


@dataclass
class Entry:
    """A kernel."""

    name: str
    parameters: list[Parameter]
    instructions: list[Instruction] = field(default_factory=list)
    registers: list[Register] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)
    """Offsets of static shared variables."""
    static_shared: int = 0
    dynamic_shared: int | None = None
    """Where dynamic shared memory starts; None if the kernel has none."""
    local_bytes: int = 0
    directives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """``reqntid``, ``reqnctapercluster``, ``minnctapersm``, ..."""
    decoded: Any = field(default=None, repr=False, compare=False)
    """What the machine keeps of it between launches."""


@dataclass
class Module:
    """A PTX file."""

    version: str
    target: str
    entries: dict[str, Entry]
    globals: list[Storage]
    lines: list[str]
    """The text, for messages."""
    files: dict[int, str] = field(default_factory=dict)
    """Source files by number."""
