"""Reads and writes of memory, by warps or on their behalf, with every check.

Offsets are int64 arrays of bytes; data is uint8 of the same shape, `defined` bool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tests.emulator.errors import Fault
from tests.emulator.machine.clocks import GENERIC, AccessLog, Conflict, describe
from tests.emulator.machine.global_memory import GlobalMemory, Range
from tests.emulator.machine.shared_memory import SharedMemory

if TYPE_CHECKING:
    from tests.emulator.machine.program import Program
    from tests.emulator.machine.warp import Warp


@dataclass(frozen=True)
class Actor:
    """Who touches memory: an agent at a step of its clock, and what may be relied on.

    `ordered` is an agent whose own work comes before this without anybody waiting for it.
    """

    program: Program
    name: str
    agent: int
    clock: int
    line: int
    vector: np.ndarray
    row: int = GENERIC
    ordered: int = -1
    races: bool = True


def actor(warp: Warp, line: int) -> Actor:
    """A warp's ordinary access."""
    cluster = warp.cta.cluster
    return Actor(
        cluster.program, warp.name, warp.agent, warp.clock, line, warp.vector,
        races=cluster.settings.races,
    )  # fmt: skip


def spans(offsets: np.ndarray, size: int) -> np.ndarray:
    """[n, size] int64: the bytes of n accesses of one size."""
    return offsets[:, None] + np.arange(size)


def complain(conflict: Conflict | None, who: Actor, place: str) -> None:
    """Raise a race."""
    if conflict is None:
        return
    check = "missing proxy fence" if conflict.fenced and who.row else "race"
    raise Fault(check, describe(conflict, lambda _: place, who.program.line))


def note(
    log: AccessLog, at: np.ndarray, who: Actor, *, write: bool, atomic: bool = False
) -> Conflict | None:
    """Tell the log of a memory."""
    if not who.races:
        return None
    function = log.write if write else log.read
    return function(
        at, who.agent, who.clock, who.line, who.vector, who.row,
        ordered=who.ordered, atomic=atomic,
    )  # fmt: skip


# Shared memory -----------------------------------------------------------------------------------


def read_shared(
    memory: SharedMemory, at: np.ndarray, who: Actor, what: str = "load", *, atomic: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and whether each is defined."""
    memory.check(int(at.min()), int(at.max()) + 1, what)
    memory.check_no_barrier(at, what)
    conflict = note(memory.log, at.reshape(-1), who, write=False, atomic=atomic)
    if conflict is not None:
        complain(conflict, who, memory.place(conflict.place))
    return memory.data[at], memory.defined[at]


def write_shared(
    memory: SharedMemory, at: np.ndarray, data: np.ndarray, defined: np.ndarray | bool, who: Actor,
    what: str = "store", *, atomic: bool = False,
) -> None:  # fmt: skip
    """Set bytes."""
    claim_shared(memory, at, who, what, atomic=atomic)
    memory.data[at] = data
    memory.defined[at] = defined


def claim_shared(
    memory: SharedMemory, at: np.ndarray, who: Actor, what: str, *, atomic: bool = False
) -> None:
    """Check a write that may take effect later."""
    memory.check(int(at.min()), int(at.max()) + 1, what)
    memory.check_no_barrier(at, what)
    conflict = note(memory.log, at.reshape(-1), who, write=True, atomic=atomic)
    if conflict is not None:
        complain(conflict, who, memory.place(conflict.place))


# Global memory -----------------------------------------------------------------------------------


def check_clusters(
    memory: GlobalMemory, found: Range, at: np.ndarray, who: Actor, *, write: bool,
    atomic: bool = False,
) -> None:  # fmt: skip
    """Clusters of one launch are in no order: what one wrote, another must not touch.

    Nor write what another read, but for atomic accesses of both.
    """
    if not who.races:
        return
    mine, owners, readers = memory.cluster, found.owner[at], found.reader[at]
    wrote = (owners != 0) & (owners != mine)
    read = (readers != 0) & (readers != mine) & write
    if atomic:
        wrote &= ~found.atomic[at]
    for bad, what in ((wrote, "wrote"), (read, "read")):
        if bad.any():
            byte = int(at.reshape(-1)[bad.reshape(-1).argmax()])
            verb = "writes" if write else "reads"
            raise Fault("race", f"{verb} byte {byte} of {found.name}, which another cluster {what}")
    if not write and not atomic:
        found.reader[at] = np.where((readers == 0) | (readers == mine), mine, -1)


def read_global(
    memory: GlobalMemory, addresses: np.ndarray, size: int, who: Actor, *, atomic: bool = False,
    what: str = "load",
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """[n, size] bytes at n addresses, and whether each is defined."""
    found, offsets = memory.find(addresses, size, what)
    at = spans(offsets, size)
    memory.check_owned(found, at, what)
    check_clusters(memory, found, at, who, write=False, atomic=atomic)
    assert found.log is not None
    conflict = note(found.log, at.reshape(-1), who, write=False, atomic=atomic)
    if conflict is not None:
        complain(conflict, who, f"byte {conflict.place} of {found.name}")
    return found.data[at], found.defined[at]


def write_global(
    memory: GlobalMemory, addresses: np.ndarray, data: np.ndarray, defined: np.ndarray | bool,
    who: Actor, *, atomic: bool = False, what: str = "store",
) -> None:  # fmt: skip
    """Set [n, size] bytes at n addresses."""
    found, at = claim_global(memory, addresses, data.shape[1], who, atomic=atomic, what=what)
    found.data[at] = data
    found.defined[at] = defined


def claim_global(
    memory: GlobalMemory, addresses: np.ndarray, size: int, who: Actor, *, atomic: bool = False,
    what: str = "store",
) -> tuple[Range, np.ndarray]:  # fmt: skip
    """Check a write that may take effect later: the range and the bytes."""
    found, offsets = memory.find(addresses, size, what)
    at = spans(offsets, size)
    memory.check_owned(found, at, what)
    assert found.log is not None
    conflict = note(found.log, at.reshape(-1), who, write=True, atomic=atomic)
    if conflict is not None:
        complain(conflict, who, f"byte {conflict.place} of {found.name}")
    check_clusters(memory, found, at, who, write=True, atomic=atomic)
    if not atomic:
        found.twice[at] |= found.owner[at] != 0
    found.owner[at] = memory.cluster
    found.atomic[at] = atomic
    return found, at
