"""cp.async, and bulk copies without a tensor map (PTX ISA 9.7.9.25)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.emulator.errors import Fault
from tests.emulator.isa.addresses import (
    SHARED,
    check_aligned,
    evaluate,
    known_barrier,
    locate,
    one_shared,
)
from tests.emulator.isa.decoder import Decoder, instruction
from tests.emulator.isa.memory import hints
from tests.emulator.machine.access import (
    Actor,
    claim_global,
    claim_shared,
    read_global,
    read_shared,
    spans,
)
from tests.emulator.machine.barriers import Mbarrier
from tests.emulator.machine.clocks import ASYNC
from tests.emulator.machine.engine import Operation
from tests.emulator.machine.signals import Outcome, Step, Wait
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Immediate

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


# cp.async --------------------------------------------------


@instruction("cp")
def _cp(decoder: Decoder) -> Step:
    if not decoder.flag("async"):
        if decoder.flag("reduce"):
            raise decoder.refuse("reducing copies")
        raise decoder.refuse("this form")
    if decoder.flag("bulk"):
        return _bulk(decoder)
    if decoder.flag("commit_group"):
        return lambda warp: commit(warp, "cp.async")
    if decoder.flag("wait_all"):
        return _wait_all
    if decoder.flag("wait_group"):
        left = _number(decoder, 0)
        return lambda warp: wait_for(warp, "cp.async", left)
    if decoder.flag("mbarrier"):
        raise decoder.refuse("cp.async.mbarrier.arrive")
    return _copy(decoder)


def _wait_all(warp: Warp) -> Outcome:
    commit(warp, "cp.async")
    return wait_for(warp, "cp.async", 0)


def _number(decoder: Decoder, index: int) -> int:
    operand = decoder.operands[index]
    if not isinstance(operand, Immediate):
        raise decoder.refuse("a count that is no number")
    return operand.value


def _copy(decoder: Decoder) -> Step:
    """cp.async.ca/.cg.shared.global [dst], [src], size{, src-size}: the rest is filled with 0."""
    policy = hints(decoder)
    decoder.choice(SHARED)
    decoder.flag("global")
    size = _number(decoder, 2)
    if size not in (4, 8, 16):
        raise decoder.refuse(f"{size} bytes")
    count = decoder.count(3 + policy, 4 + policy)
    given = decoder.source(3, 32) if count == 4 + policy else decoder.file.constant(size, 32)
    target, source, line = evaluate(decoder, 0), evaluate(decoder, 1), decoder.line

    def step(warp: Warp) -> None:
        warp.require(given, "the source size of cp.async")
        (place, lanes), *more = locate(warp, "shared::cta", target(warp))
        if more:
            raise Fault("address", "cp.async to several CTAs")
        groups = groups_of(warp, "cp.async")
        serial = groups.start(line)
        groups.lanes |= warp.mask
        writer = _writer(warp, groups.agent, serial, line)
        at = spans(place.addresses, size)
        check_aligned(place.addresses, size, "cp.async")
        claim_shared(place.memory, at, writer, "cp.async")
        fetched = _fetched(warp, source(warp), warp.r[given], lanes, size, writer)
        place.memory.defined[at] = False
        place.memory.data[at] = 0xFF

        def effect() -> None:
            place.memory.data[at], place.memory.defined[at] = fetched
            groups.finished.add(serial)

        submit(warp, "cp.async", line, effect)

    return step


def _writer(warp: Warp, agent: int, clock: int, line: int) -> Actor:
    cluster = warp.cta.cluster
    return Actor(
        cluster.program, warp.name, agent, clock, line, warp.vector.copy(),
        races=cluster.settings.races,
    )  # fmt: skip


def _fetched(
    warp: Warp, addresses: np.ndarray, given: np.ndarray, lanes: np.ndarray, size: int, who: Actor
) -> tuple[np.ndarray, np.ndarray]:
    """What the lanes copy: bytes beyond the source size are 0."""
    data = np.zeros((len(lanes), size), np.uint8)
    defined = np.ones((len(lanes), size), bool)
    memory = warp.cta.cluster.program.memory
    sizes = given[lanes]
    if (sizes > size).any():
        raise Fault("cp.async", f"source size {int(sizes.max())} of {size}")
    for length in np.unique(sizes[sizes > 0]).tolist():
        chosen = np.flatnonzero(sizes == length)
        mine = addresses[lanes[chosen]]
        check_aligned(mine, size, "cp.async")
        data[chosen, :length], defined[chosen, :length] = read_global(memory, mine, length, who)
    return data, defined


# Bulk copies --------------------------------------------------


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


def _bulk(decoder: Decoder) -> Step:
    from tests.emulator.isa import tensor_copies

    if decoder.flag("commit_group"):
        return lambda warp: commit(warp, STORES)
    if decoder.flag("wait_group"):
        read, left = decoder.flag("read"), _number(decoder, 0)
        return lambda warp: wait_for(warp, STORES, left, read=read)
    if decoder.flag("prefetch"):
        hints(decoder)
        for name in ("tensor", "1d", "2d", "3d", "4d", "5d", "tile", "L2", "global"):
            decoder.flag(name)
        return lambda warp: None
    if decoder.flag("tensor"):
        return tensor_copies.tensor(decoder)
    return _plain(decoder)


def _plain(decoder: Decoder) -> Step:
    """cp.async.bulk between global and shared memory, by a size in bytes."""
    policy = hints(decoder)
    names = decoder.instruction.modifiers
    spaces = [name for name in names if name in ("global", *SHARED)]
    if len(spaces) != 2 or "multicast::cluster" in names:
        raise decoder.refuse("this direction")
    for space in spaces:
        decoder.flag(space)
    loads = decoder.flag("mbarrier::complete_tx::bytes")
    if not loads and not decoder.flag("bulk_group"):
        raise decoder.refuse("this completion")
    decoder.count((4 if loads else 3) + policy)
    target, source, size = evaluate(decoder, 0), evaluate(decoder, 1), decoder.source(2, 32)
    line = decoder.line
    if loads and spaces[1] == "global":
        return _bulk_load(target, source, size, evaluate(decoder, 3), line)
    if not loads and spaces[0] == "global":
        return _bulk_store(target, source, size, line)
    raise decoder.refuse("copies between CTAs")


def _bulk_size(warp: Warp, slot: int) -> int:
    warp.require(slot, "the size of a bulk copy")
    size = int(warp.r[slot][warp.lanes][0])
    if size % 16 or not size:
        raise Fault("bulk copy", f"{size} bytes: must be a multiple of 16")
    return size


def _first(warp: Warp, values: np.ndarray) -> int:
    return int(values[warp.lanes][0])


def _bulk_load(target: Any, source: Any, size: int, barrier: Any, line: int) -> Step:
    def step(warp: Warp) -> None:
        one_lane(warp, "a bulk load")
        count = _bulk_size(warp, size)
        memory, offset = one_shared(warp, target(warp), "a bulk load")
        barrier_memory, at_barrier = one_shared(warp, barrier(warp), "a bulk load's mbarrier")
        if memory is not barrier_memory:
            raise Fault("address", "a bulk load signals another CTA than it writes to")
        done = known_barrier(warp, barrier_memory, at_barrier, "a bulk load")
        address = np.array([_first(warp, source(warp))], np.uint64)
        check_aligned(address, 16, "bulk load")
        check_aligned(np.array([offset]), 16, "bulk load")
        at = np.arange(offset, offset + count)
        writer = bulk_writer(warp, done, line)
        claim_shared(memory, at, writer, "bulk load")
        memory.data[at], memory.defined[at] = 0xFF, False
        globals_ = warp.cta.cluster.program.memory
        # Checked as it is issued: what happens in between is a race whenever it completes.
        read_global(globals_, address, count, writer, what="bulk load")
        found, offsets = globals_.find(address, count, "bulk load")
        source_at = np.arange(int(offsets[0]), int(offsets[0]) + count)

        def effect() -> None:
            memory.data[at], memory.defined[at] = found.data[source_at], found.defined[source_at]
            memory.mbarrier(at_barrier, "a bulk load").delivered(count)

        submit(warp, "bulk load", line, effect)

    return step


def _bulk_store(target: Any, source: Any, size: int, line: int) -> Step:
    def step(warp: Warp) -> None:
        one_lane(warp, "a bulk store")
        count = _bulk_size(warp, size)
        memory, offset = one_shared(warp, source(warp), "a bulk store")
        address = np.array([_first(warp, target(warp))], np.uint64)
        check_aligned(address, 16, "bulk store")
        check_aligned(np.array([offset]), 16, "bulk store")
        groups, serial = start_store(warp, line)
        reader = bulk_actor(warp, groups.agent, serial, line)
        writer = bulk_actor(warp, groups.writes, serial, line)
        at = np.arange(offset, offset + count)
        read_shared(memory, at, reader, "bulk store")
        globals_ = warp.cta.cluster.program.memory
        found, to = claim_global(globals_, address, count, writer, what="bulk store")

        def effect() -> None:
            found.data[to[0]], found.defined[to[0]] = memory.data[at], memory.defined[at]
            groups.finished.add(serial)

        submit(warp, "bulk store", line, effect)

    return step
