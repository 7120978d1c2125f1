"""A warp: 32 lanes in groups that share a program counter.

Groups of a warp are scheduled on their own, as threads are since Volta, lowest program counter
first, and merge where they meet. An instruction that needs its lanes together parks its group
until the others have come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.emulator.errors import Fault
from tests.emulator.machine.registers import FULL, lanes_of
from tests.emulator.machine.signals import Branch, Signal, Step, Wait

if TYPE_CHECKING:
    from tests.emulator.machine.cluster import Cta


@dataclass
class Group:
    """Lanes at one program counter."""

    pc: int
    mask: int
    wait: Wait | None = None
    parked: bool = False
    aligned: bool = False
    """Parked at an instruction that all lanes of the warp must execute together."""


class Warp:
    """Registers and control of 32 lanes; `live` are those that have not exited."""

    def __init__(self, cta: Cta, index: int, mask: int, code: list[Step], agent: int) -> None:
        self.cta = cta
        self.index = index
        self.agent = agent
        self.code = code
        self.r: list[Any] = []
        self.d: list[int] = []
        self.live = self.mask = mask
        self.lanes = lanes_of(mask)
        self.groups = [Group(0, mask)]
        self.pc = 0
        self.executed = 0
        self.whole = mask
        self.tired: Group | None = None
        self.vector = cta.cluster.agents.vector()
        self.vector[0, agent] = 1
        self.streams: dict[str, Any] = {}
        self.trace: Callable[[Warp, int], None] | None = None

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.cta.name} warp {self.index}"

    # Registers ---------------------------------------------------------------------------------

    def put(self, slot: int, value: np.ndarray, defined: int) -> None:
        """Set a register in the active lanes."""
        mask = self.mask
        if mask == FULL:
            self.r[slot] = value
            self.d[slot] = defined
        else:
            self.r[slot] = np.where(self.lanes, value, self.r[slot])
            self.d[slot] = (self.d[slot] & ~mask) | (defined & mask)

    def put_predicate(self, slot: int, value: int, defined: int) -> None:
        """Set a predicate in the active lanes."""
        mask = self.mask
        self.r[slot] = (self.r[slot] & ~mask) | (value & mask)
        self.d[slot] = (self.d[slot] & ~mask) | (defined & mask)

    def require(self, slot: int, what: str) -> None:
        """Fault if a register that decides something is undefined in an active lane."""
        missing = self.mask & ~self.d[slot]
        if missing:
            lane = (missing & -missing).bit_length() - 1
            raise Fault("uninitialised", f"{what} is undefined in lane {lane}")

    @staticmethod
    def require_memory(what: str) -> None:
        """Fault: memory that must be defined is not."""
        raise Fault("uninitialised", f"{what} that nobody wrote")

    def activate(self, mask: int) -> None:
        """Execute the next steps for these lanes."""
        self.mask = mask
        self.lanes = lanes_of(mask)

    # Order -------------------------------------------------------------------------------------

    @property
    def clock(self) -> int:
        """This warp's own step in its vector clock."""
        return int(self.vector[0, self.agent])

    def release(self) -> np.ndarray:
        """What others may rely on if they see this moment; later accesses are not in it."""
        known = self.vector.copy()
        self.vector[0, self.agent] += 1
        return known

    def acquire(self, known: np.ndarray) -> None:
        """Rely on what someone released."""
        np.maximum(self.vector, known, out=self.vector)

    def fence(self) -> None:
        """Make what this warp wrote, its cp.async too, visible to the asynchronous proxy.

        Each writer must fence, before it meets those who start asynchronous work.
        """
        copies = self.streams.get("cp.async")
        for agent in (self.agent, *([copies.agent] if copies is not None else [])):
            self.vector[1, agent] = self.vector[0, agent]
        self.vector[0, self.agent] += 1

    # Control -----------------------------------------------------------------------------------

    @property
    def line(self) -> int:
        """PTX line of the instruction under way."""
        return self.cta.cluster.program.entry.instructions[self.pc].line

    @property
    def done(self) -> bool:
        """Every lane has exited."""
        return not self.groups

    def runnable(self) -> list[Group]:
        """Groups that can go on."""
        found = []
        for group in self.groups:
            if group.parked:
                continue
            if group.wait is None or group.wait.ready():
                found.append(group)
        return found

    def run(self, group: Group, budget: int) -> None:
        """Execute up to `budget` instructions of a group, until it stops or meets another."""
        self.activate(group.mask)
        self.tired = None
        if group.wait is not None:
            self._resume(group, ready=True)
        limit = min(
            (other.pc for other in self.groups if other is not group and other.pc > group.pc),
            default=len(self.code) + 1,
        )
        code, trace = self.code, self.trace
        pc = group.pc
        self._merge(group)
        if group not in self.groups:
            return
        self.activate(group.mask)
        for _ in range(budget):
            self.pc = pc
            if trace is not None:
                trace(self, pc)
            outcome = code[pc](self)
            self.executed += 1
            if outcome is None:
                pc += 1
            elif type(outcome) is int:
                pc = outcome
            else:
                group.pc = pc
                self._handle(group, outcome)
                return
            if pc >= limit:
                break
        else:
            self.tired = group
        group.pc = pc
        self._merge(group)

    def _resume(self, group: Group, *, ready: bool) -> None:
        wait, group.wait = group.wait, None
        assert wait is not None
        self.pc = group.pc
        if wait.then is not None:
            wait.then(ready)
        group.pc += 1

    def time_out(self) -> bool:
        """Let waits that hardware may end early end early; whether there was one."""
        found = [g for g in self.groups if g.wait is not None and g.wait.patience]
        for group in found:
            self.activate(group.mask)
            self._resume(group, ready=False)
            self._merge(group)
        return bool(found)

    def _handle(self, group: Group, outcome: Any) -> None:
        if isinstance(outcome, Branch):
            self.groups.remove(group)
            self.groups.append(Group(group.pc + 1, group.mask & ~outcome.taken))
            self.groups.append(Group(outcome.target, outcome.taken))
            self._merge(self.groups[-1])
            if len(self.groups) > 1:
                self._merge(self.groups[-2])
        elif isinstance(outcome, Wait):
            group.wait = outcome
        elif outcome is Signal.EXIT:
            self.live &= ~self.mask
            group.mask &= ~self.mask
            group.pc += 1
            if not group.mask:
                self.groups.remove(group)
            for other in self.groups:
                if other.parked and other.aligned:
                    self._left_alone(other)
                other.parked = False
            self.cta.cluster.lanes_left(self)
        else:
            group.parked, group.aligned = True, outcome is Signal.PARK
            self._merge(group)

    def _left_alone(self, group: Group) -> None:
        where = self.cta.cluster.program.where(group.pc)
        raise Fault(
            "divergence",
            f"these lanes exit while lanes {group.mask:#010x} wait for them at {where}",
        )

    def _merge(self, group: Group) -> None:
        """Join a group with those at its program counter that are not waiting."""
        if len(self.groups) == 1 or group.wait is not None:
            return
        for other in [g for g in self.groups if g is not group]:
            if other.pc == group.pc and other.wait is None:
                group.mask |= other.mask
                group.parked = False
                self.groups.remove(other)
