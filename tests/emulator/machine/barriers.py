"""Barriers: mbarrier objects in shared memory, bar.sync, and the cluster's."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tests.emulator.errors import Fault

LIMIT = (1 << 20) - 1
"""Of counts and of the transaction count (PTX ISA, mbarrier)."""


@dataclass
class Mbarrier:
    """State of an mbarrier object (PTX ISA 9.7.13.15): phase number, arrivals, transactions."""

    name: str
    count: int
    agent: int
    vector: np.ndarray
    """What those who arrived in the current phase knew."""
    done: np.ndarray
    """What whoever sees a completed phase may rely on."""
    line: int
    maker: int
    made: int
    """Which agent made it, at which step of its clock."""
    phase: int = 0
    pending: int = 0
    transactions: int = 0
    seen: int = 0
    """Phases that somebody of its CTA has waited for."""
    outside: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Steps of other CTAs' warps that arrived here, with their lines."""
    awaited: tuple[int, int] = (0, 0)
    """The last phase that asynchronous work of another CTA signals, and the line of that."""

    def __post_init__(self) -> None:
        self.pending = self.count

    def unseen(self, known: np.ndarray) -> int | None:
        """Line of a signal from another CTA that a CTA that knows this has not waited for."""
        phase, line = self.awaited
        if self.seen < phase:
            return line
        late = [by for agent, (clock, by) in self.outside.items() if known[agent] < clock]
        return late[0] if late else None

    def arrive(self, count: int, vector: np.ndarray | None) -> None:
        """`count` arrivals, of a thread that knew `vector`."""
        if count > self.pending:
            raise Fault(
                "barrier",
                f"{count} arrivals at {self.name}, which expects {self.pending} more of "
                f"{self.count} in phase {self.phase}",
            )
        if vector is not None:
            np.maximum(self.vector, vector, out=self.vector)
        self.pending -= count
        self._complete()

    def expect(self, bytes_: int) -> None:
        """Raise the transaction count."""
        self._count(bytes_)

    def delivered(self, bytes_: int) -> None:
        """Lower the transaction count: bytes have arrived."""
        self._count(-bytes_)
        self._complete()

    def _count(self, by: int) -> None:
        self.transactions += by
        if abs(self.transactions) > LIMIT:
            raise Fault("barrier", f"{self.name} counts {self.transactions} bytes: out of range")

    def _complete(self) -> None:
        if self.pending or self.transactions:
            return
        self.phase += 1
        self.pending = self.count
        self.vector[:, self.agent] = self.phase
        np.maximum(self.done, self.vector, out=self.done)

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity, the current or the one before, has completed."""
        return self.phase & 1 != parity

    def state(self) -> str:
        """For messages."""
        return (
            f"{self.name}: phase {self.phase} (parity {self.phase & 1}), "
            f"{self.pending} of {self.count} arrivals and {self.transactions} bytes pending"
        )


@dataclass
class NamedBarrier:
    """A bar.sync barrier of a CTA: threads that came, and what they knew.

    `done` is what those of the last completed generation knew; `everybody` says that no count was
    given, so that threads that exit are not waited for.
    """

    vector: np.ndarray
    done: np.ndarray
    everybody: bool = False
    expected: int = 0
    arrived: int = 0
    generation: int = 0
    votes: list[np.ndarray] = field(default_factory=list)
    votes_wanted: bool = False
    """A bar.red, whose threads may not meet those of a bar.sync."""

    def arrive(self, threads: int, expected: int, vector: np.ndarray) -> None:
        """Count a warp's threads; all must expect the same number, or the living."""
        if self.arrived and expected != self.expected and not self.everybody:
            raise Fault(
                "barrier", f"bar expects {expected} threads here and {self.expected} elsewhere"
            )
        self.expected = expected
        self.arrived += threads
        np.maximum(self.vector, vector, out=self.vector)
        if self.arrived > expected:
            raise Fault("barrier", f"{self.arrived} threads at a bar of {expected}")
        self.complete_if(expected)

    def complete_if(self, expected: int) -> None:
        """Complete the generation if that many threads have come."""
        if self.arrived and self.arrived >= expected:
            self.arrived = 0
            self.generation += 1
            np.maximum(self.done, self.vector, out=self.done)


@dataclass
class ClusterBarrier:
    """barrier.cluster: arrive and wait of every thread that has not exited."""

    vector: np.ndarray
    done: np.ndarray
    arrived: int = 0
    generation: int = 0

    def complete(self) -> None:
        """Everybody has arrived."""
        np.maximum(self.done, self.vector, out=self.done)
        self.arrived = 0
        self.generation += 1
