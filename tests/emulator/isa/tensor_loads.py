"""When a tcgen05.ld is known to be done: after tcgen05.wait::ld, or once its registers were used.

The assembler waits before an instruction that uses a register of a load, so no value is ever
wrong. But nothing else waits: a warp that has used none of them may not yet let others write to the
tensor memory that it loads from (PTX ISA, tcgen05 pipelined and register dependencies).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.emulator.machine.access import Actor
from tests.emulator.machine.signals import Outcome, Step
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import (
    Address,
    Entry,
    Instruction,
    Not,
    Operand,
    Pair,
    Register,
    Vector,
)


@dataclass
class Loads:
    """Those of a warp: `missing` are the registers not used yet of each load under way."""

    agent: int
    serial: int = 0
    missing: dict[int, set[int]] = field(default_factory=dict)


def load_actor(warp: Warp, line: int, targets: list[int]) -> Actor:
    """The next load of a warp, to these registers."""
    cluster = warp.cta.cluster
    if "tensor loads" not in warp.streams:
        warp.streams["tensor loads"] = Loads(cluster.agents.add(f"{warp.name}'s tcgen05.ld"))
    loads: Loads = warp.streams["tensor loads"]
    loads.serial += 1
    loads.missing[loads.serial] = set(targets)
    return Actor(
        cluster.program, warp.name, loads.agent, loads.serial, line, warp.vector,
        ordered=loads.agent, races=cluster.settings.races,
    )  # fmt: skip


def wait_loads(warp: Warp) -> None:
    """tcgen05.wait::ld: what this warp has loaded is there."""
    loads = warp.streams.get("tensor loads")
    if loads is not None:
        loads.missing.clear()
        warp.vector[:, loads.agent] = loads.serial


def tracked(step: Step, each: Instruction, loaded: frozenset[int]) -> Step:
    """The step of an instruction; if it uses registers of loads, these loads are waited for."""
    used = loaded.intersection(_slots(each.operands))
    if not used or (each.opcode == "tcgen05" and "ld" in each.modifiers):
        return step

    def using(warp: Warp) -> Outcome:
        loads = warp.streams.get("tensor loads")
        if loads is not None and loads.missing:
            _use(warp, loads, used)
        return step(warp)

    return using


def _use(warp: Warp, loads: Loads, used: frozenset[int]) -> None:
    for serial in list(loads.missing):
        loads.missing[serial] -= used
        if not loads.missing[serial]:
            del loads.missing[serial]
    done = min(loads.missing) - 1 if loads.missing else loads.serial
    warp.vector[:, loads.agent] = done


def loaded_registers(entry: Entry) -> frozenset[int]:
    """Slots of the registers that tcgen05.ld instructions of a kernel write."""
    return frozenset(
        slot
        for each in entry.instructions
        if each.opcode == "tcgen05" and "ld" in each.modifiers
        for slot in _slots(each.operands[:1])
    )


def _slots(operands: tuple[Operand, ...]) -> Iterator[int]:
    for operand in operands:
        if isinstance(operand, Register):
            yield operand.slot
        elif isinstance(operand, Vector):
            yield from _slots(operand.items)
        elif isinstance(operand, Pair):
            yield from _slots((operand.first, operand.second))
        elif isinstance(operand, Not):
            yield operand.operand.slot
        elif isinstance(operand, Address):
            inner = (operand.base, *([operand.coordinates] if operand.coordinates else []))
            yield from _slots(inner)
