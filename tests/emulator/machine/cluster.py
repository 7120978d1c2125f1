"""A cluster of CTAs under way: memories, barriers, and the scheduler of its warps."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.emulator.errors import Deadlock, Fault
from tests.emulator.machine.barriers import ClusterBarrier, NamedBarrier
from tests.emulator.machine.clocks import Agents
from tests.emulator.machine.engine import Engine
from tests.emulator.machine.registers import FULL
from tests.emulator.machine.shared_memory import SharedMemory
from tests.emulator.machine.tensor_memory import TensorMemory
from tests.emulator.machine.warp import Group, Warp

if TYPE_CHECKING:
    from tests.emulator.machine.program import Program, Settings

QUANTUM = 4096
"""Instructions a warp executes before another has its turn, in round robin."""

POLLING = 4
"""Rounds without an event after which warps that still run are taken to be polling."""

PATIENCE = 64
"""Rounds in which nothing but polling happens before the kernel counts as deadlocked."""

Dim = tuple[int, int, int]


class Cta:
    """A thread block."""

    def __init__(self, cluster: Cluster, index: Dim, rank: int) -> None:
        program = cluster.program
        self.cluster = cluster
        self.index = index
        self.rank = rank
        self.name = f"CTA {index}" if cluster.size == 1 else f"CTA {index} (rank {rank})"
        self.shared = SharedMemory(self.name, program.shared_bytes, cluster.agents)
        self.tensor = TensorMemory(self.name, cluster.agents)
        self.named: dict[int, NamedBarrier] = {}
        self.warps: list[Warp] = []
        x, y, z = program.launch.block
        threads = x * y * z
        for number in range(-(-threads // 32)):
            mask = FULL if threads >= 32 * (number + 1) else (1 << threads - 32 * number) - 1
            agent = cluster.agents.add(f"{self.name} warp {number}")
            warp = Warp(self, number, mask, program.code, agent)
            program.fill(warp)
            self.warps.append(warp)

    @property
    def threads(self) -> int:
        """Threads that take part in bar.sync without a count: whole warps that have not exited."""
        return 32 * sum(not warp.done for warp in self.warps)

    def barrier(self, number: int) -> NamedBarrier:
        """The bar.sync barrier of this number."""
        if number not in self.named:
            vectors = self.cluster.agents.vector(), self.cluster.agents.vector()
            self.named[number] = NamedBarrier(*vectors)
        return self.named[number]


class Cluster:
    """CTAs that run together; `size` 1 for a kernel without clusters."""

    def __init__(self, program: Program, ctas: list[Dim], settings: Settings) -> None:
        self.program = program
        self.settings = settings
        self.size = len(ctas)
        x, y, z = program.launch.block
        warps = self.size * -(-x * y * z // 32)
        self.agents = Agents(4 * warps + 256 * self.size)
        self.generator = random.Random(f"{settings.seed} {ctas[0]}")
        self.engine = Engine(settings.mode, self.generator)
        self.barrier = ClusterBarrier(self.agents.vector(), self.agents.vector())
        program.memory.start_cluster(self.agents)
        self.ctas = [Cta(self, index, rank) for rank, index in enumerate(ctas)]
        self.warps = [warp for cta in self.ctas for warp in cta.warps]
        self.events = 0
        self.executed = 0
        self.requests: dict[int, dict[int, int]] = {}
        self.answers: dict[int, int] = {}
        """Tensor memory that pairs of CTAs asked for, and what they got."""
        self.published: dict[Any, np.ndarray] = {}
        """What strong writes made known, by place."""
        self.at_exit: list[Callable[[], None]] = []
        """Checks that instructions leave for the end of the kernel."""

    def event(self) -> None:
        """Something happened that a polling warp may be waiting for."""
        self.events += 1

    def lanes_left(self, warp: Warp) -> None:
        """Lanes of a warp have exited: barriers that count the living may complete."""
        self.event()
        if not warp.groups and all(w.done for w in warp.cta.warps):
            self.cta_left(warp.cta)
        if warp.done and warp.streams.get("cluster arrival") == self.barrier.generation:
            self.barrier.arrived -= 1  # only the living are counted
        for barrier in warp.cta.named.values():
            if barrier.everybody:
                barrier.complete_if(warp.cta.threads)
        self.check_barrier()

    def cta_left(self, cta: Cta) -> None:
        """A CTA is over: its shared memory is nobody's from here on."""
        if self.size > 1:
            cta.shared.exited = True

    def check_barrier(self) -> None:
        """Complete the cluster's barrier if every living warp has arrived."""
        living = [warp for warp in self.warps if not warp.done]
        if living and self.barrier.arrived and self.barrier.arrived >= len(living):
            self.barrier.complete()
            self.event()

    # Scheduling --------------------------------------------------------------------------------

    def run(self) -> None:
        """Execute until every warp has exited; raises what the kernel did wrong."""
        idle, seen = 0, self.events
        rounds, last = 0, self.events
        while not all(warp.done for warp in self.warps):
            ran = self._round()
            rounds, last = (0 if self.events != last else rounds + 1), self.events
            if self.executed > self.settings.max_instructions:
                raise Deadlock(
                    f"{self.executed} instructions and no end (max_instructions)\n{self.report()}"
                )
            completed = self.engine.advance(stuck=not ran or rounds > POLLING)
            if ran or completed:
                continue
            # Polling itself is no progress: a wait that timed out may just be tried again.
            idle = 0 if self.events != seen else idle + 1
            seen = self.events
            if idle > PATIENCE:
                raise Deadlock(self.report())
            if not any([warp.time_out() for warp in self.warps if not warp.done]):
                raise Deadlock(self.report())
        self._finish()

    def _finish(self) -> None:
        self.engine.finish()
        for check in self.at_exit:
            check()
        for cta in self.ctas:
            self._check_left(cta)

    def _check_left(self, cta: Cta) -> None:
        """What a CTA must not leave behind: tensor memory, bytes or arrivals under way."""
        line = int(cta.tensor.owner.max())
        if line:
            where = self.program.line(line)
            raise Fault("tensor memory", f"{cta.name} exits without freeing what it got at {where}")
        known = np.max([warp.vector[0] for warp in cta.warps], axis=0)
        for barrier in cta.shared.mbarriers.values():
            by = barrier.unseen(known)
            if by is not None and self.settings.races:
                raise Fault(
                    "cluster lifetime",
                    f"nothing orders the exit of {cta.name} after the signal of another CTA to "
                    f"{barrier.name} at {self.program.line(by)}",
                )
            if barrier.transactions:
                raise Fault("barrier", f"{cta.name} exits with bytes pending: {barrier.state()}")
            if barrier.pending not in (0, barrier.count):
                raise Fault(
                    "barrier", f"{cta.name} exits with a phase half done: {barrier.state()}"
                )

    def gives_up(self, warp: Warp) -> bool:
        """Whether an attempt to wait fails at once, as hardware may let it: the next one waits."""
        if self.settings.mode == "eager":
            return False
        failed = warp.streams.setdefault("failed attempts", set())
        if warp.pc in failed:
            failed.remove(warp.pc)
            return False
        if self.settings.mode == "random" and self.generator.random() < 0.5:
            return False
        failed.add(warp.pc)
        return True

    def _round(self) -> bool:
        """Give warps their turn; whether anything ran."""
        warps = [warp for warp in self.warps if not warp.done]
        quantum = QUANTUM
        if self.settings.schedule == "random":
            self.generator.shuffle(warps)
            quantum = self.generator.choice((1, 7, 40, 300))
        ran = False
        for warp in warps:
            group = self._choose(warp)
            if group is not None:
                ran = True
                self._execute(warp, group, quantum)
                if self.settings.mode == "random":
                    self.engine.advance(stuck=False)
        return ran

    def _choose(self, warp: Warp) -> Group | None:
        groups = warp.runnable()
        if not groups:
            return None
        if self.settings.schedule == "random":
            return self.generator.choice(groups)
        # A group that used up its turn may be polling for another of its warp.
        fresh = [group for group in groups if group is not warp.tired] or groups
        return min(fresh, key=lambda group: group.pc)

    def _execute(self, warp: Warp, group: Group, quantum: int) -> None:
        before = warp.executed
        try:
            warp.run(group, quantum)
        except Fault as fault:
            raise self.program.located(fault, warp) from None
        finally:
            self.executed += warp.executed - before

    def report(self) -> str:
        """What every warp waits for, for a deadlock."""
        lines = []
        for warp in self.warps:
            for group in warp.groups:
                where = self.program.where(group.pc)
                lanes = "" if group.mask == FULL else f" lanes {group.mask:#010x}"
                if group.parked:
                    reason = "needs all its lanes together"
                elif group.wait is not None:
                    reason = group.wait.reason()
                else:
                    reason = "can run"
                lines.append(f"  {warp.name}{lanes} at {where}: {reason}")
        lines += [f"  under way: {o.name} of line {o.line}" for o in self.engine.pending]
        return "\n".join(lines)
