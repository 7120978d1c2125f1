"""The register file of a kernel: declared registers, literals and special registers by slot.

A value is the raw bits of 32 lanes: uint8, uint16, uint32 or uint64 [32]; a predicate is an int of
32 bits. Values are never changed in place, so a move shares them. Beside each is an int of 32
bits that says in which lanes it is defined.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulator.ptx.syntax import Entry, Immediate

FULL = 0xFFFFFFFF
LANES = np.arange(32, dtype=np.uint32)
DTYPES: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def uniform(value: int, bits: int) -> np.ndarray:
    """The same number in every lane."""
    return np.full(32, value & ((1 << bits) - 1), DTYPES[bits])


def blank(bits: int) -> Any:
    """What an undefined register holds: all ones, NaN in every float format."""
    return 0 if bits == 1 else uniform(-1, bits)


def bits_of(lanes: np.ndarray) -> int:
    """[32] bool to an int with lane i in bit i."""
    return int.from_bytes(np.packbits(lanes, bitorder="little").tobytes(), "little")


_LANES_OF: dict[int, np.ndarray] = {}


def lanes_of(bits: int) -> np.ndarray:
    """[32] bool of an int; shared, not to be changed."""
    found = _LANES_OF.get(bits)
    if found is None:
        if len(_LANES_OF) > 65536:
            _LANES_OF.clear()
        raw = np.frombuffer(bits.to_bytes(4, "little"), np.uint8)
        found = np.unpackbits(raw, bitorder="little").astype(bool)
        _LANES_OF[bits] = found
    return found


class RegisterFile:
    """Slots of an entry, grown while its instructions are decoded."""

    def __init__(self, entry: Entry) -> None:
        self.initial: list[Any] = [blank(register.bits) for register in entry.registers]
        self.defined: list[int] = [0] * len(self.initial)
        self.specials: dict[str, int] = {}
        self._constants: dict[tuple[int, int], int] = {}
        self._sinks: dict[int, int] = {}

    def _slot(self, value: Any, defined: int) -> int:
        self.initial.append(value)
        self.defined.append(defined)
        return len(self.initial) - 1

    def constant(self, value: int, bits: int) -> int:
        """Slot of a number."""
        key = value & ((1 << bits) - 1), bits
        if key not in self._constants:
            filled = (FULL if value & 1 else 0) if bits == 1 else uniform(value, bits)
            self._constants[key] = self._slot(filled, FULL)
        return self._constants[key]

    def immediate(self, literal: Immediate, bits: int) -> int:
        """Slot of a literal."""
        return self.constant(literal.value, bits)

    def special(self, name: str, bits: int) -> int:
        """Slot that each warp fills with a special register of its own."""
        key = f"{name}:{bits}"
        if key not in self.specials:
            self.specials[key] = self._slot(blank(bits), FULL)
        return self.specials[key]

    def sink(self, bits: int) -> int:
        """Slot of results nobody wants."""
        if bits not in self._sinks:
            self._sinks[bits] = self._slot(blank(bits), 0)
        return self._sinks[bits]
