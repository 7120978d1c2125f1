"""bar, barrier.cluster and mbarrier (PTX ISA 9.7.13)."""

from __future__ import annotations

import numpy as np

from tests.emulator.errors import Fault
from tests.emulator.isa.addresses import SHARED, evaluate, known_barrier, one_shared
from tests.emulator.isa.decoder import TYPES, Decoder, instruction
from tests.emulator.isa.lanes import together
from tests.emulator.isa.memory import SCOPES
from tests.emulator.machine.access import actor, claim_shared
from tests.emulator.machine.barriers import LIMIT, Mbarrier
from tests.emulator.machine.registers import FULL, bits_of, uniform
from tests.emulator.machine.signals import Outcome, Signal, Step, Wait
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Operand, Sink

# bar --------------------------------------------------


@instruction("bar", "barrier")
def _bar(decoder: Decoder) -> Step:
    if decoder.flag("cluster"):
        return _cluster(decoder)
    if decoder.flag("warp"):
        decoder.flag("sync")
        decoder.count(1)
        return together(lambda warp, members: None, decoder.source(0, 32))
    decoder.flag("cta")
    action = decoder.choice(("sync", "arrive", "red"))
    aligned = decoder.flag("aligned") or decoder.opcode == "bar"
    if action == "red":
        return _reduction(decoder)
    if not action:
        raise decoder.refuse("this form")
    decoder.count(*((2,) if action == "arrive" else (1, 2)))
    number = decoder.source(0, 32)
    count = decoder.source(1, 32) if len(decoder.operands) == 2 else -1

    def step(warp: Warp) -> Outcome:
        if warp.mask != warp.live:
            if aligned:
                return Signal.PARK
            raise Fault("divergence", "barrier.sync by some lanes of a warp is not emulated")
        return _arrive_at(warp, number, count, wait=action == "sync")

    return step


def _one(warp: Warp, slot: int, what: str) -> int:
    warp.require(slot, what)
    values = warp.r[slot][warp.lanes]
    if (values != values[0]).any():
        raise Fault("barrier", f"lanes disagree on {what}")
    return int(values[0])


def _arrive_at(
    warp: Warp, number_slot: int, count_slot: int, *, wait: bool, votes: bool = False
) -> Outcome:
    number = _one(warp, number_slot, "the barrier's number")
    if number > 15:
        raise Fault("barrier", f"barrier {number}: there are 16")
    barrier = warp.cta.barrier(number)
    threads = warp.cta.threads
    if count_slot >= 0:
        threads = _one(warp, count_slot, "the barrier's thread count")
        if threads % 32 or not threads:
            raise Fault("barrier", f"{threads} threads: must be a multiple of 32")
    if barrier.arrived and barrier.votes_wanted != votes:
        raise Fault("barrier", f"bar.red and bar.sync meet at barrier {number}")
    barrier.votes_wanted, barrier.everybody = votes, count_slot < 0
    generation = barrier.generation
    barrier.arrive(32, threads, warp.release())
    warp.cta.cluster.event()
    if not wait:
        return None

    def ready() -> bool:
        return barrier.generation != generation

    def then(_: bool) -> None:
        warp.acquire(barrier.done)

    def reason() -> str:
        return f"bar {number}: {barrier.arrived} of {barrier.expected} threads came"

    return Wait(ready, reason, then)


def _reduction(decoder: Decoder) -> Step:
    """bar.red: popc, and, or of a predicate over the CTA."""
    operation = decoder.choice(("popc", "and", "or"))
    type_ = decoder.type("u32", "pred")
    decoder.count(3, 4)
    destination = decoder.destination(0, TYPES[type_])
    number = decoder.source(1, 32)
    count = decoder.source(2, 32) if len(decoder.operands) == 4 else -1
    slot, negated = decoder.predicate(len(decoder.operands) - 1)

    def step(warp: Warp) -> Outcome:
        if warp.mask != warp.live:
            return Signal.PARK
        warp.require(slot, "the predicate of a reduction")
        value = ~warp.r[slot] if negated else warp.r[slot]
        barrier = warp.cta.barrier(_one(warp, number, "the barrier's number"))
        if not barrier.arrived:
            barrier.votes = []
        votes = barrier.votes
        votes.append(np.array([(value & warp.mask).bit_count(), warp.mask.bit_count()]))
        waiting = _arrive_at(warp, number, count, wait=True, votes=True)
        assert isinstance(waiting, Wait)
        acquire = waiting.then

        def then(ready: bool) -> None:
            if acquire is not None:
                acquire(ready)
            true, all_ = (int(n) for n in np.sum(votes, axis=0))
            if type_ == "u32":
                warp.put(destination, uniform(true, 32), FULL)
            else:
                holds = true == all_ if operation == "and" else true > 0
                warp.put_predicate(destination, FULL if holds else 0, FULL)

        return Wait(waiting.ready, waiting.reason, then)

    return step


def _cluster(decoder: Decoder) -> Step:
    action = decoder.choice(("arrive", "wait"))
    kind = decoder.choice(("relaxed", "release", "acquire"))
    decoder.flag("aligned")
    decoder.count(0)

    def arrive(warp: Warp) -> Outcome:
        if warp.mask != warp.live:
            return Signal.PARK
        barrier = warp.cta.cluster.barrier
        if warp.streams.get("cluster arrival") is not None:
            raise Fault("barrier", "barrier.cluster.arrive twice without a wait between")
        warp.streams["cluster arrival"] = barrier.generation
        known = warp.streams.get("fenced") if kind == "relaxed" else warp.release()
        if known is not None:
            np.maximum(barrier.vector, known, out=barrier.vector)
        barrier.arrived += 1
        warp.cta.cluster.event()
        warp.cta.cluster.check_barrier()
        return None

    def wait(warp: Warp) -> Outcome:
        if warp.mask != warp.live:
            return Signal.PARK
        barrier = warp.cta.cluster.barrier
        generation = warp.streams.pop("cluster arrival", None)
        if generation is None:
            raise Fault("barrier", "barrier.cluster.wait without an arrive")
        return Wait(
            lambda: barrier.generation != generation,
            lambda: f"barrier.cluster: {barrier.arrived} warps came",
            lambda _: warp.acquire(barrier.done),
        )

    if action not in ("arrive", "wait"):
        raise decoder.refuse("this action")
    return arrive if action == "arrive" else wait


# mbarrier --------------------------------------------------


def _mbarrier_at(warp: Warp, addresses: np.ndarray, what: str) -> Mbarrier:
    memory, offset = one_shared(warp, addresses, what)
    if offset % 8:
        raise Fault("misaligned", f"{what} at shared offset {offset:#x}")
    memory.check(offset, offset + 8, what)
    return known_barrier(warp, memory, offset, what)


def _groups(warp: Warp, addresses: np.ndarray) -> list[tuple[int, int]]:
    """(mask, lanes) for each address that active lanes name."""
    mine = addresses[warp.lanes]
    if (mine == mine[0]).all():
        return [(warp.mask, warp.mask.bit_count())]
    found = []
    for address in np.unique(mine).tolist():
        mask = bits_of(warp.lanes & (addresses == address))
        found.append((mask, mask.bit_count()))
    return found


@instruction("mbarrier")
def _mbarrier(decoder: Decoder) -> Step:
    action = decoder.choice(
        ("init", "inval", "arrive_drop", "arrive", "expect_tx", "complete_tx", "test_wait",
         "try_wait", "pending_count")
    )  # fmt: skip
    if action in ("test_wait", "try_wait"):
        return _wait(decoder, action)
    if action == "arrive" or (action == "arrive_drop"):
        return _arrive(decoder, action)
    if action in ("expect_tx", "complete_tx"):
        return _transactions(decoder, action)
    if action == "init":
        return _init(decoder)
    if action == "inval":
        return _invalidate(decoder)
    raise decoder.refuse("this action")


def _init(decoder: Decoder) -> Step:
    decoder.choice(SHARED)
    decoder.type("b64")
    decoder.count(2)
    addresses, count, line = evaluate(decoder, 0), decoder.source(1, 32), decoder.line

    def step(warp: Warp) -> None:
        memory, offset = one_shared(warp, addresses(warp), "mbarrier.init")
        if offset % 8:
            raise Fault("misaligned", f"mbarrier.init at shared offset {offset:#x}")
        memory.check(offset, offset + 8, "mbarrier.init")
        number = _one(warp, count, "the count of mbarrier.init")
        if not 1 <= number <= LIMIT:
            raise Fault("barrier", f"count {number} of mbarrier.init: 1 to {LIMIT}")
        if offset in memory.mbarriers:
            raise Fault("barrier", f"mbarrier.init of the live one at {memory.place(offset)}")
        agents = warp.cta.cluster.agents
        name = f"the mbarrier at {memory.place(offset)} (made at line {line})"
        if offset not in memory.former:
            memory.former[offset] = agents.add(name), 0
        agent, phase = memory.former[offset]
        made = Mbarrier(
            name, number, agent, agents.vector(), agents.vector(), line, warp.agent,
            warp.clock, phase,
        )  # fmt: skip
        claim_shared(memory, np.arange(offset, offset + 8), actor(warp, line), "mbarrier.init")
        memory.mbarriers[offset] = made
        memory.barrier_bytes[offset : offset + 8] = True

    return step


def _invalidate(decoder: Decoder) -> Step:
    decoder.choice(SHARED)
    decoder.type("b64")
    decoder.count(1)
    addresses = evaluate(decoder, 0)

    def step(warp: Warp) -> None:
        memory, offset = one_shared(warp, addresses(warp), "mbarrier.inval")
        gone = memory.mbarrier(offset, "mbarrier.inval")
        # Another one there goes on counting phases, from an even one.
        memory.former[offset] = gone.agent, (gone.phase + 2) & ~1
        del memory.mbarriers[offset]
        memory.barrier_bytes[offset : offset + 8] = False
        memory.defined[offset : offset + 8] = False

    return step


def _arrive(decoder: Decoder, action: str) -> Step:
    expect = decoder.flag("expect_tx")
    if decoder.flag("noComplete"):
        raise decoder.refuse(".noComplete")
    kind = decoder.choice(("release", "relaxed"), "release")
    decoder.choice(SCOPES)
    decoder.choice(SHARED)
    decoder.type("b64")
    has_state = not _is_address(decoder.operands[0])
    target: Operand = decoder.operands[0] if has_state else Sink()
    first = 1 if has_state else 0
    decoder.count(*((first + 2,) if expect else (first + 1, first + 2)))
    state = decoder.destination(target, 64)
    addresses = evaluate(decoder, first)
    number = decoder.source(first + 1, 32) if len(decoder.operands) == first + 2 else -1
    drop = action == "arrive_drop"

    def step(warp: Warp) -> None:
        where = addresses(warp)
        for mask, lanes in _groups(warp, where):
            before = warp.mask
            warp.activate(mask)
            _arrive_once(
                warp, where, lanes, number, expect=expect, drop=drop, kind=kind, slot=state
            )
            warp.activate(before)
        warp.cta.cluster.event()

    return step


def _is_address(operand: Operand) -> bool:
    return type(operand).__name__ == "Address"


def _arrive_once(
    warp: Warp, where: np.ndarray, lanes: int, number: int, *, expect: bool, drop: bool, kind: str,
    slot: int,
) -> None:  # fmt: skip
    barrier = _mbarrier_at(warp, where, "mbarrier.arrive")
    if one_shared(warp, where, "mbarrier.arrive")[0] is not warp.cta.shared:
        barrier.outside[warp.agent] = warp.clock, warp.line
    warp.put(slot, uniform(barrier.phase, 64), FULL)
    value = _one(warp, number, "the operand of mbarrier.arrive") if number >= 0 else 1
    known = warp.release() if kind == "release" else warp.streams.get("fenced")
    if drop:
        barrier.count -= lanes if expect else value * lanes
    if expect:
        barrier.expect(value * lanes)
        barrier.arrive(lanes, known)
    else:
        if not 1 <= value <= LIMIT:
            raise Fault("barrier", f"mbarrier.arrive with count {value}")
        barrier.arrive(value * lanes, known)


def _transactions(decoder: Decoder, action: str) -> Step:
    decoder.flag("relaxed")
    decoder.choice(SCOPES)
    decoder.choice(SHARED)
    decoder.type("b64")
    decoder.count(2)
    addresses, number = evaluate(decoder, 0), decoder.source(1, 32)

    def step(warp: Warp) -> None:
        barrier = _mbarrier_at(warp, addresses(warp), f"mbarrier.{action}")
        lanes = warp.mask.bit_count()
        by = _one(warp, number, f"the operand of mbarrier.{action}") * lanes
        if action == "expect_tx":
            barrier.expect(by)
        else:
            barrier.delivered(by)
        warp.cta.cluster.event()

    return step


def _wait(decoder: Decoder, action: str) -> Step:
    """A wait that hardware may give up on, so that it can also be used to look ahead."""
    parity = decoder.flag("parity")
    kind = decoder.choice(("acquire", "relaxed"), "acquire")
    decoder.choice(SCOPES)
    decoder.choice(SHARED)
    decoder.type("b64")
    decoder.count(3, 4)
    destination = decoder.destination(0, 1)
    addresses = evaluate(decoder, 1)
    wanted = decoder.source(2, 32 if parity else 64)

    def step(warp: Warp) -> Outcome:
        where = addresses(warp)
        memory, _ = one_shared(warp, where, f"mbarrier.{action}")
        if memory is not warp.cta.shared:
            raise Fault("barrier", f"mbarrier.{action} of {memory.name}: only of the own CTA")
        barrier = _mbarrier_at(warp, where, f"mbarrier.{action}")
        value = _one(warp, wanted, "the phase to wait for")
        if parity and value > 1:
            raise Fault("barrier", f"parity {value}: 0 or 1")

        def ready() -> bool:
            return barrier.passed(value) if parity else barrier.phase != value

        def then(done: bool) -> None:
            warp.put_predicate(destination, FULL if done else 0, FULL)
            if done:
                barrier.seen = max(barrier.seen, barrier.phase)
            if done and kind == "acquire":
                warp.acquire(barrier.done)
            elif done:
                seen = warp.streams.get("seen", barrier.done)
                warp.streams["seen"] = np.maximum(seen, barrier.done)

        if ready():
            then(True)
            return None
        if warp.cta.cluster.gives_up(warp):
            then(False)
            return None
        what = f"parity {value}" if parity else f"phase {value}"
        return Wait(ready, lambda: f"waits for {what} of {barrier.state()}", then, patience=True)

    return step
