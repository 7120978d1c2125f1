"""cp.async, and which module serves a bulk copy (PTX ISA 9.7.9.25)."""

from __future__ import annotations

import numpy as np

from tests.emulator.errors import Fault
from tests.emulator.isa import bulk_copies, tensor_copies
from tests.emulator.isa.addresses import SHARED, check_aligned, evaluate, locate
from tests.emulator.isa.copy_groups import STORES, commit, groups_of, submit, wait_for
from tests.emulator.isa.decoder import Decoder, instruction
from tests.emulator.isa.memory import hints
from tests.emulator.machine.access import Actor, claim_shared, read_global, spans
from tests.emulator.machine.signals import Outcome, Step
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Immediate


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
    if size not in (4, 8, 16) or (size != 16 and "cg" in decoder.instruction.modifiers):
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


def _bulk(decoder: Decoder) -> Step:
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
    return bulk_copies.plain(decoder)
