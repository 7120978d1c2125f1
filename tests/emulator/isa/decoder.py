"""From instructions to steps: every modifier is taken by someone, or the instruction is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from tests.emulator.errors import EmulatorError, PtxError, UnsupportedError
from tests.emulator.isa import targets, tensor_loads
from tests.emulator.machine.registers import RegisterFile
from tests.emulator.machine.signals import Branch, Outcome, Signal, Step, Wait
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import (
    Address,
    Entry,
    Immediate,
    Instruction,
    Label,
    Not,
    Operand,
    Register,
    Sink,
    Special,
    Variable,
    Vector,
)

TYPES = {
    **{f"{kind}{bits}": bits for kind in "busf" for bits in (8, 16, 32, 64)},
    "pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32, "u16x2": 32, "s16x2": 32, "f32x2": 64,
    "tf32": 32, "b128": 128, "e4m3x2": 16, "e5m2x2": 16, "e2m1x2": 8, "ue8m0x2": 16,
    "e2m1x4": 16, "e4m3x4": 32, "e5m2x4": 32, "e2m3x2": 16, "e3m2x2": 16, "s8x4": 32, "u8x4": 32,
}  # fmt: skip
"""Types that a modifier can name, and their bits. s2f6x2 and others are unknown and refused."""

MODULES = (
    "integer", "floating", "packed", "convert", "moves", "compare", "control", "lanes", "bits",
    "memory", "atomics", "barriers", "copies", "tensor_core", "matrix",
)  # fmt: skip
"""Modules of this package that register instructions."""

_REGISTRY: dict[str, Callable[[Decoder], Step]] = {}
_LONG = frozenset({"%clock64", "%globaltimer"})


def instruction(*opcodes: str) -> Callable[[Callable[[Decoder], Step]], Callable[[Decoder], Step]]:
    """Register what decodes these opcodes."""

    def register(function: Callable[[Decoder], Step]) -> Callable[[Decoder], Step]:
        for opcode in opcodes:
            assert opcode not in _REGISTRY, opcode
            _REGISTRY[opcode] = function
        return function

    return register


class Decoder:
    """One instruction while it is decoded."""

    def __init__(self, instruction: Instruction, file: RegisterFile) -> None:
        self.instruction = instruction
        self.opcode = instruction.opcode
        self.operands = instruction.operands
        self.line = instruction.line
        self.file = file
        self.left = list(instruction.modifiers)

    # Modifiers ---------------------------------------------------------------------------------

    def flag(self, *names: str) -> bool:
        """Take a modifier if it is there; more names are synonyms."""
        for name in names:
            if name in self.left:
                self.left.remove(name)
                return True
        return False

    def choice(self, names: Iterable[str], default: str = "") -> str:
        """Take the one of these modifiers that is there."""
        for name in names:
            if self.flag(name):
                return name
        return default

    def types(self) -> list[str]:
        """Take all type modifiers."""
        found = [name for name in self.left if name in TYPES]
        self.left = [name for name in self.left if name not in TYPES]
        return found

    def type(self, *allowed: str) -> str:
        """Take the only type modifier; refuse all but those allowed, if any are given."""
        found = self.types()
        if len(found) != 1 or (allowed and found[0] not in allowed):
            raise self.refuse(f"type {'.'.join(found) or 'missing'}")
        return found[0]

    def refuse(self, what: str) -> UnsupportedError:
        """For the caller to raise: this form is not implemented."""
        name = self.instruction.name
        return UnsupportedError(f"line {self.line}: {name}: {what} is not emulated")

    def finish(self) -> None:
        """Refuse what nobody took."""
        if self.left:
            raise self.refuse(f"modifier .{self.left[0]}")

    # Operands ----------------------------------------------------------------------------------

    def count(self, *allowed: int) -> int:
        """Number of operands, if it is an allowed one."""
        if len(self.operands) not in allowed:
            raise self.refuse(f"a form with {len(self.operands)} operands")
        return len(self.operands)

    def source(self, operand: Operand | int, bits: int) -> int:
        """Slot of an operand to read, by index or itself."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        if isinstance(operand, Register):
            if operand.bits != bits:
                raise PtxError(
                    f"line {self.line}: {self.instruction.name} reads {operand.name} of "
                    f"{operand.bits} bits as {bits}"
                )
            return operand.slot
        if isinstance(operand, Immediate):
            if operand.float_bits and operand.float_bits != bits:
                raise PtxError(f"line {self.line}: a literal of {operand.float_bits} bits")
            return self.file.immediate(operand, bits)
        if isinstance(operand, Special):
            own = 64 if operand.name in _LONG else 32
            if own != bits:
                raise self.refuse(f"{operand.name} as {bits} bits")
            return self.file.special(operand.name, bits)
        if isinstance(operand, Variable):
            return self.variable(operand, bits)
        raise self.refuse(f"operand {operand}")

    def variable(self, variable: Variable, bits: int) -> int:
        """Slot of a variable's address in its own space; shared ones depend on the CTA."""
        if variable.space == "shared":
            return self.file.special(f"&{variable.address}", bits)
        if variable.space not in ("param", "local"):
            raise self.refuse(f"variable {variable.name} of .{variable.space}")
        return self.file.constant(variable.address, bits)

    def wide(self, operand: Operand | int) -> tuple[int, int]:
        """Slot and own width of an operand whose register may be wider than the type."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        if isinstance(operand, Register):
            return operand.slot, operand.bits
        if isinstance(operand, Immediate):
            return self.file.immediate(operand, 64), 64
        return self.source(operand, 32), 32

    def destination(self, operand: Operand | int, bits: int, *, wider: bool = False) -> int:
        """Slot of a register to write; `wider` registers are allowed where the ISA says so."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        if isinstance(operand, Sink):
            return self.file.sink(bits)
        if not isinstance(operand, Register):
            raise PtxError(f"line {self.line}: {self.instruction.name} cannot write {operand}")
        if operand.bits != bits and not (wider and operand.bits > bits):
            raise PtxError(
                f"line {self.line}: {self.instruction.name} writes {bits} bits to "
                f"{operand.name} of {operand.bits}"
            )
        return operand.slot

    def predicate(self, operand: Operand | int) -> tuple[int, bool]:
        """Slot of a predicate to read, and whether it is negated."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        if isinstance(operand, Not):
            return operand.operand.slot, True
        return self.source(operand, 1), False

    def items(self, operand: Operand | int) -> tuple[Operand, ...]:
        """Elements of a vector operand, or the operand itself."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        return operand.items if isinstance(operand, Vector) else (operand,)

    def address(self, operand: Operand | int) -> Address:
        """An operand in brackets."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        if not isinstance(operand, Address):
            raise PtxError(f"line {self.line}: {operand} is no address")
        return operand

    def label(self, operand: Operand | int) -> int:
        """Index of the instruction that a label names."""
        if isinstance(operand, int):
            operand = self.operands[operand]
        if not isinstance(operand, Label):
            raise self.refuse(f"a jump to {operand}")
        return operand.index


def _guarded(step: Step, slot: int, negated: bool) -> Step:
    """The step, only in lanes where the predicate says so."""

    def guarded(warp: Warp) -> Outcome:
        warp.require(slot, "the guard predicate")
        mask = warp.mask
        chosen = mask & (~warp.r[slot] if negated else warp.r[slot])
        if chosen == mask:
            return step(warp)
        if not chosen:
            return None
        warp.activate(chosen)
        outcome = step(warp)
        if outcome is None or outcome is Signal.EXIT:
            if outcome is None:
                warp.activate(mask)
            return outcome
        return _partial(outcome, chosen, mask, warp)

    return guarded


def _partial(outcome: Outcome, chosen: int, mask: int, warp: Warp) -> Outcome:
    """What a guarded step that did not just go on means for all lanes."""
    warp.activate(mask)
    if isinstance(outcome, int):
        return Branch(chosen, outcome)
    if isinstance(outcome, Wait):
        # The other lanes stop with these: PTX allows that, and kernels do not depend on it.
        return _waiting_for(outcome, chosen, warp)
    return outcome


def _waiting_for(wait: Outcome, chosen: int, warp: Warp) -> Outcome:
    assert isinstance(wait, Wait)
    then = wait.then

    def resume(ready: bool) -> None:
        mask = warp.mask
        warp.activate(chosen)
        if then is not None:
            then(ready)
        warp.activate(mask)

    return Wait(wait.ready, wait.reason, resume, wait.patience)


_CRASHES = (KeyError, ValueError, AttributeError, IndexError, TypeError, OverflowError)


def _built(build: Callable[[Decoder], Step], decoder: Decoder) -> Step:
    """The step; what no decoder foresaw is refused by name, too."""
    try:
        step = build(decoder)
        decoder.finish()
    except EmulatorError:
        raise
    except _CRASHES as error:
        raise decoder.refuse(f"this form ({type(error).__name__}: {error})") from error
    return step


def decode(entry: Entry, file: RegisterFile, target: str) -> list[Step]:
    """Steps of an entry, one an instruction and one for its end."""
    for name in MODULES:
        importlib.import_module(f"tests.emulator.isa.{name}")
    loaded = tensor_loads.loaded_registers(entry)
    steps: list[Step] = []
    for each in entry.instructions:
        build = _REGISTRY.get(each.opcode)
        if build is None:
            raise UnsupportedError(f"line {each.line}: opcode {each.name} is not emulated")
        targets.check(each, target)
        step = _built(build, Decoder(each, file))
        step = tensor_loads.tracked(step, each, loaded)
        if each.guard is not None:
            step = _guarded(step, each.guard.predicate.slot, each.guard.negated)
        steps.append(step)
    steps.append(lambda warp: Signal.EXIT)
    return steps
