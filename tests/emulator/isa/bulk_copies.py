"""Bulk copies without a tensor map, by a size in bytes (PTX ISA 9.7.9.25.4)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulator.errors import Fault
from tests.emulator.isa.addresses import (
    SHARED,
    check_aligned,
    evaluate,
    known_barrier,
    one_shared,
)
from tests.emulator.isa.copy_groups import bulk_actor, bulk_writer, one_lane, start_store, submit
from tests.emulator.isa.decoder import Decoder
from tests.emulator.isa.memory import hints
from tests.emulator.machine.access import claim_global, claim_shared, read_global, read_shared
from tests.emulator.machine.signals import Step
from tests.emulator.machine.warp import Warp


def plain(decoder: Decoder) -> Step:
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
