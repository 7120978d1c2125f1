"""Happens-before: vector clocks of agents, and the accesses that a memory remembers.

An *agent* is whatever can touch memory and be waited for: a warp, the stream of asynchronous
tensor-core work or bulk copies that a warp issues, or a barrier that bulk copies complete on. A
clock value ``vc[a]`` of a warp says up to which of its steps it knows agent a's work to be done.
Each warp keeps two rows of them: what its ordinary accesses may rely on, and what the asynchronous
proxy may rely on if this warp starts it, which lags until a proxy fence (PTX ISA, memory
consistency model, proxies). The scheme is that of FastTrack (Flanagan and Freund, PLDI 2009), at
the grain of a warp: two lanes of one warp never race.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

GENERIC, ASYNC = 0, 1
"""Rows of a vector clock."""


class Agents:
    """Names of agents, in the order of their numbers."""

    def __init__(self, capacity: int) -> None:
        self.names: list[str] = []
        self.capacity = capacity

    def add(self, name: str) -> int:
        """Number of a new agent."""
        if len(self.names) == self.capacity:
            raise OverflowError(f"more than {self.capacity} agents")
        self.names.append(name)
        return len(self.names) - 1

    def vector(self) -> np.ndarray:
        """[2, agents] int32: a clock that knows of nothing."""
        return np.zeros((2, self.capacity), np.int32)


@dataclass(frozen=True)
class Conflict:
    """Two accesses of which neither is known to come before the other."""

    place: int
    kind: str
    """``read after write``, ``write after write`` or ``write after read``."""
    other: str
    other_line: int
    fenced: bool
    """The order would be known, had there been a proxy fence."""


class AccessLog:
    """Last writer and last reads of each cell of a memory.

    Everything starts as zeros, which the system hands out untouched: a log costs what is accessed.
    """

    def __init__(self, cells: int, agents: Agents) -> None:
        self.agents = agents
        self.writer = np.zeros(cells, np.int32)  # agents, counted from 1
        self.written = np.zeros(cells, np.int32)
        self.line = np.zeros(cells, np.int32)
        self.atomic = np.zeros(cells, bool)
        self.reads: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.strong_reads: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """Those of atomic and strong accesses, which only plain writes may not meet."""
        self.cells = cells

    def read(
        self, at: np.ndarray, agent: int, clock: int, line: int, vector: np.ndarray,
        row: int = GENERIC, *, ordered: int = -1, atomic: bool = False,
    ) -> Conflict | None:  # fmt: skip
        """Note a read of cells `at`; `ordered` is an agent whose work is ordered by itself."""
        found = self._after_write(at, vector, row, ordered, atomic, "read after write")
        reads = self.strong_reads if atomic else self.reads
        if agent not in reads:
            zeros = np.zeros((2, self.cells), np.int32)
            reads[agent] = (zeros[0], zeros[1])
        clocks, lines = reads[agent]
        clocks[at] = clock
        lines[at] = line
        return found

    def write(
        self, at: np.ndarray, agent: int, clock: int, line: int, vector: np.ndarray,
        row: int = GENERIC, *, ordered: int = -1, atomic: bool = False,
    ) -> Conflict | None:  # fmt: skip
        """Note a write of cells `at`."""
        found = self._after_write(at, vector, row, ordered, atomic, "write after write")
        found = found or self.unfinished(at, vector[GENERIC], agent, ordered)
        if not atomic and self.strong_reads:
            met = _unfinished(self.strong_reads, self.agents, at, vector[GENERIC], agent)
            found = found or met
        self.writer[at] = agent + 1
        self.written[at] = clock
        self.line[at] = line
        self.atomic[at] = atomic
        return found

    def unfinished(self, at: np.ndarray, known: np.ndarray, *but: int) -> Conflict | None:
        """A read of cells `at` by agents other than these that is not known to be done."""
        return _unfinished(self.reads, self.agents, at, known, *but)

    def _after_write(
        self, at: np.ndarray, vector: np.ndarray, row: int, ordered: int, atomic: bool, kind: str
    ) -> Conflict | None:
        writer = self.writer[at] - 1
        bad = self.written[at] > vector[row][writer]
        bad &= writer >= 0
        if ordered >= 0:
            bad &= writer != ordered
        if atomic:
            bad &= ~self.atomic[at]
        if not bad.any():
            return None
        first = int(bad.argmax())
        place, who = int(at[first]), int(writer[first])
        fenced = bool(self.written[place] <= vector[GENERIC, who])
        return Conflict(place, kind, self.agents.names[who], int(self.line[place]), fenced)


def _unfinished(
    reads: dict[int, tuple[np.ndarray, np.ndarray]], agents: Agents, at: np.ndarray,
    known: np.ndarray, *but: int,
) -> Conflict | None:  # fmt: skip
    for reader, (clocks, lines) in reads.items():
        if reader in but:
            continue
        bad = clocks[at] > known[reader]
        if bad.any():
            place = int(at[bad.argmax()])
            name = agents.names[reader]
            return Conflict(place, "write after read", name, int(lines[place]), False)
    return None


def describe(conflict: Conflict, where: Callable[[int], str], line: Callable[[int], str]) -> str:
    """A sentence for a message; `where` names a place, `line` a line of the PTX."""
    advice = "no fence.proxy.async between them" if conflict.fenced else "nothing orders the two"
    return (
        f"{conflict.kind} at {where(conflict.place)}: "
        f"{conflict.other} at {line(conflict.other_line)}; {advice}"
    )
