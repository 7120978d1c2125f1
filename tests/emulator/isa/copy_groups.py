"""Copies under way of a warp: groups to wait for, and the agents that races know them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.emulator.errors import Fault
from tests.emulator.machine.access import Actor
from tests.emulator.machine.barriers import Mbarrier
from tests.emulator.machine.clocks import ASYNC
from tests.emulator.machine.engine import Operation
from tests.emulator.machine.signals import Outcome, Wait
from tests.emulator.machine.warp import Warp

STORES = "bulk stores"


@dataclass
class Groups:
    """Copies of a warp that are waited for by groups: cp.async's, or bulk stores'."""

    agent: int
    """Of the reads, and of what cp.async writes."""
    writes: int
    """Of what stores write: `wait_group.read` says nothing about it."""
    serial: int = 0
    lanes: int = 0
    """Lanes that have started copies: groups belong to threads."""
    finished: set[int] = field(default_factory=set)
    open: list[int] = field(default_factory=list)
    committed: list[list[int]] = field(default_factory=list)
    lines: dict[int, int] = field(default_factory=dict)
    did: dict[str, int] = field(default_factory=dict)
    waited_for: int = 0
    """Number of the newest copy that is known to be done."""

    def start(self, line: int) -> int:
        """Number of a new copy, in the open group."""
        self.serial += 1
        self.open.append(self.serial)
        self.lines[self.serial] = line
        return self.serial

    def all_did(self, what: str, mask: int) -> bool:
        """Whether, with these lanes, all that started copies have done something.

        Groups belong to threads: what one lane started, another can neither commit nor wait for.
        """
        self.did[what] = self.did.get(what, 0) | mask
        if self.lanes & ~self.did[what]:
            return False
        self.did[what] = 0
        return True

    def commit(self) -> None:
        """Close the open group."""
        self.committed.append(self.open)
        self.open = []

    def waited(self, left: int) -> list[int]:
        """Copies that must be done when all but `left` groups are."""
        groups = self.committed[: max(len(self.committed) - left, 0)]
        return [number for group in groups for number in group]


def groups_of(warp: Warp, kind: str) -> Groups:
    """Those of a warp; `kind` names them for messages."""
    if kind not in warp.streams:
        add = warp.cta.cluster.agents.add
        agent = add(f"{warp.name}'s {kind}")
        writes = add(f"what {warp.name}'s {kind} write") if kind == STORES else agent
        warp.streams[kind] = Groups(agent, writes)
    return warp.streams[kind]


def commit(warp: Warp, kind: str) -> None:
    """Close the open groups of the lanes."""
    groups = groups_of(warp, kind)
    if groups.all_did("commit", warp.mask):
        groups.commit()


def wait_for(warp: Warp, kind: str, left: int, *, read: bool = False) -> Outcome:
    """Stop until all but `left` groups are done; then what they did may be relied on."""
    groups = groups_of(warp, kind)
    if not groups.all_did(f"wait {left}", warp.mask):
        return None
    numbers = groups.waited(left)

    def ready() -> bool:
        return groups.finished.issuperset(numbers)

    def then(_: bool) -> None:
        if numbers:
            groups.waited_for = max(groups.waited_for, *numbers)
            for agent in (groups.agent,) if read else (groups.agent, groups.writes):
                known = warp.vector[0, agent]
                warp.vector[0, agent] = max(known, groups.waited_for)

    if ready():
        then(True)
        return None
    missing = len(set(numbers) - groups.finished)
    return Wait(ready, lambda: f"waits for {missing} of its {kind}", then)


def submit(warp: Warp, name: str, line: int, effect: Callable[[], None]) -> None:
    """Hand work to the engine; polling warps may see what it does."""
    cluster = warp.cta.cluster

    def done() -> None:
        effect()
        cluster.event()

    cluster.engine.issue(Operation(name, line, done))


def bulk_writer(warp: Warp, barrier: Mbarrier, line: int) -> Actor:
    """A load's writes: known to whoever sees the barrier's current phase completed."""
    cluster = warp.cta.cluster
    return Actor(
        cluster.program, f"a bulk copy of {warp.name}", barrier.agent, barrier.phase + 1, line,
        warp.vector.copy(), ASYNC, races=cluster.settings.races,
    )  # fmt: skip


def bulk_actor(warp: Warp, agent: int, serial: int, line: int) -> Actor:
    """A store's reads or writes: the asynchronous proxy's, waited for by group."""
    cluster = warp.cta.cluster
    return Actor(
        cluster.program, f"a bulk copy of {warp.name}", agent, serial, line, warp.vector.copy(),
        ASYNC, races=cluster.settings.races,
    )  # fmt: skip


def start_store(warp: Warp, line: int) -> tuple[Groups, int]:
    """Groups and number of a new bulk store."""
    groups = groups_of(warp, STORES)
    groups.lanes |= warp.mask
    check_group_end(warp, groups)
    return groups, groups.start(line)


def check_group_end(warp: Warp, groups: Groups) -> None:
    """At exit every bulk store must have been committed, and its source read."""
    if warp.streams.get("checked bulk"):
        return
    warp.streams["checked bulk"] = True

    def check() -> None:
        if groups.open:
            line = warp.cta.cluster.program.line(groups.lines[groups.open[0]])
            raise Fault("bulk copy", f"{warp.name} exits with a store never committed: {line}")
        if groups.serial > groups.waited_for:
            line = warp.cta.cluster.program.line(groups.lines[groups.serial])
            raise Fault(
                "bulk copy", f"{warp.name} exits without waiting until a store has read: {line}"
            )

    warp.cta.cluster.at_exit.append(check)


def one_lane(warp: Warp, what: str) -> None:
    """Fault unless one lane executes: bulk copies are started by one thread each."""
    if warp.mask.bit_count() != 1:
        raise Fault("bulk copy", f"{warp.mask.bit_count()} lanes each start {what}")
