"""Bulk copies by tensor map, the TMA (PTX ISA 9.7.9.27), and what prepares the maps."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulator.errors import Fault
from tests.emulator.isa.addresses import SHARED, evaluate, known_barrier, one_shared, shared_of
from tests.emulator.isa.copy_groups import (
    bulk_actor,
    bulk_writer,
    one_lane,
    start_store,
    submit,
)
from tests.emulator.isa.decoder import Decoder
from tests.emulator.isa.memory import hints
from tests.emulator.isa.moves import SPACES
from tests.emulator.machine.access import (
    Actor,
    check_clusters,
    claim_shared,
    complain,
    note,
    read_shared,
)
from tests.emulator.machine.global_memory import Range
from tests.emulator.machine.signals import Step
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Operand
from tests.emulator.tensor_map import LoadPlan, TensorMap, decode


def tensor(decoder: Decoder) -> Step:
    """cp.async.bulk.tensor: loads complete on an mbarrier, stores in a bulk group."""
    rank = int(decoder.choice(("1d", "2d", "3d", "4d", "5d"), "0d")[0])
    if not rank:
        raise decoder.refuse("no dimension")
    decoder.flag("tile")
    loads = decoder.flag("mbarrier::complete_tx::bytes")
    multicast = decoder.flag("multicast::cluster")
    pair = decoder.flag("cta_group::2")
    decoder.flag("cta_group::1")
    if not loads and not decoder.flag("bulk_group"):
        raise decoder.refuse("this completion")
    policy = hints(decoder)
    decoder.flag("global")
    decoder.choice(SHARED)
    if loads:
        decoder.count(3 + multicast + policy)
        return _load(decoder, rank, multicast=multicast, pair=pair)
    decoder.count(2 + policy)
    return _store(decoder, rank)


def _coordinates(decoder: Decoder, operand: Operand, rank: int) -> list[int]:
    address = decoder.address(operand)
    if address.coordinates is None or len(address.coordinates.items) != rank:
        raise decoder.refuse("coordinates that do not fit the dimension")
    return [decoder.source(item, 32) for item in address.coordinates.items]


def _map_at(warp: Warp, addresses: np.ndarray) -> TensorMap:
    """The tensor map behind a generic address: a kernel parameter, or global memory."""
    address = int(addresses[warp.lanes][0])
    program = warp.cta.cluster.program
    base = SPACES["param"]
    if address >> 56 == base >> 56:
        offset = address - base
        raw = program.parameters[offset : offset + 128].tobytes()
    else:
        found, at = program.memory.find(np.array([address], np.uint64), 128, "a tensor map")
        raw = found.data[int(at[0]) : int(at[0]) + 128].tobytes()
    if address % 64:
        raise Fault("misaligned", f"a tensor map at {address:#x}: needs 64 bytes")
    return decode(raw)


def _numbers(warp: Warp, slots: list[int]) -> list[int]:
    lane = (warp.mask & -warp.mask).bit_length() - 1
    for slot in slots:
        warp.require(slot, "a coordinate")
    return [int(warp.r[slot][lane].astype(np.int32)) for slot in slots]


def _region(warp: Warp, map_: TensorMap) -> Range:
    """The tensor of the caller's that a map points into."""
    memory = warp.cta.cluster.program.memory
    found, _ = memory.find(np.array([map_.address], np.uint64), 1, "a tensor map's base")
    return found


def _bytes(found: Range, map_: TensorMap, plan: LoadPlan, what: str) -> tuple[np.ndarray, Any]:
    """Offsets in the range of the valid bytes of a box, and which those are."""
    at = plan.offset[plan.valid] + (map_.address - found.base)
    if len(at) and (at.min() < 0 or at.max() >= len(found.data)):
        raise Fault("out of bounds", f"{what}: the map reaches outside {found.name}")
    if not found.owned[at].all():
        raise Fault("out of bounds", f"{what}: the map covers gaps of {found.name}")
    return at, plan.valid


# Loads --------------------------------------------------


def _load(decoder: Decoder, rank: int, *, multicast: bool, pair: bool) -> Step:
    target, map_, barrier = (evaluate(decoder, i) for i in (0, 1, 2))
    slots = _coordinates(decoder, decoder.operands[1], rank)
    mask_slot = decoder.source(3, 16) if multicast else -1
    line = decoder.line

    def step(warp: Warp) -> None:
        one_lane(warp, "a tensor load")
        box = _map_at(warp, map_(warp))
        plan = box.load_plan(_numbers(warp, slots))
        memory, offset = one_shared(warp, target(warp), "a tensor load")
        signal, at_barrier = one_shared(warp, barrier(warp), "a tensor load's mbarrier")
        ctas = warp.cta.cluster.ctas
        ranks = [next(cta.rank for cta in ctas if cta.shared is memory)]
        leader = next(cta.rank for cta in ctas if cta.shared is signal)
        if multicast:
            warp.require(mask_slot, "the multicast mask")
            mask = int(warp.r[mask_slot][warp.lanes][0])
            ranks = [cta.rank for cta in ctas if mask >> cta.rank & 1]
            if mask >> len(ctas) or not ranks:
                raise Fault("multicast", f"mask {mask:#06x} in a cluster of {len(ctas)}")
        elif not pair and ranks[0] != leader:
            raise Fault("address", "a tensor load signals another CTA's mbarrier")
        for rank_ in ranks:
            # With cta_group::2 the barrier is that of the pair's CTA with the operand's parity.
            owner = (rank_ & ~1 | leader & 1) if pair else rank_ if multicast else leader
            _load_into(warp, box, plan, (rank_, offset), (owner, at_barrier), line)

    return step


def _load_into(
    warp: Warp, box: TensorMap, plan: LoadPlan, target: tuple[int, int], barrier: tuple[int, int],
    line: int,
) -> None:  # fmt: skip
    """Bring a box to one CTA; its barrier counts every byte, those outside the tensor too."""
    memory = shared_of(warp, target[0])
    signalled = shared_of(warp, barrier[0])
    done = known_barrier(warp, signalled, barrier[1], "a tensor load")
    if signalled is not warp.cta.shared:
        done.awaited = done.phase + 1, line
    if target[1] % 128:
        raise Fault("misaligned", f"a tensor load to shared offset {target[1]:#x}: needs 128 bytes")
    to = box.shared_addresses(target[1])
    writer = bulk_writer(warp, done, line)
    claim_shared(memory, to, writer, "tensor load")
    memory.data[to], memory.defined[to] = 0xFF, False
    found = _region(warp, box)
    at, valid = _bytes(found, box, plan, "tensor load")
    _note_global(warp, found, at, writer, write=False)

    def effect() -> None:
        data = np.zeros(len(to), np.uint8)
        defined = np.ones(len(to), bool)
        data[valid], defined[valid] = found.data[at], found.defined[at]
        memory.data[to], memory.defined[to] = data, defined
        signalled.mbarrier(barrier[1], "a tensor load")
        done.delivered(box.box_bytes)

    submit(warp, "tensor load", line, effect)


def _note_global(warp: Warp, found: Range, at: np.ndarray, who: Actor, *, write: bool) -> None:
    memory = warp.cta.cluster.program.memory
    assert found.log is not None
    conflict = note(found.log, at, who, write=write)
    complain(conflict, who, f"byte {conflict.place} of {found.name}" if conflict else "")
    check_clusters(memory, found, at, who, write=write)
    if write:
        found.twice[at] |= found.owner[at] != 0
        found.owner[at] = memory.cluster


# Stores --------------------------------------------------


def _once(warp: Warp, slots: list[int]) -> None:
    """Lanes that store the same box store it once: the assembler makes it a warp's instruction."""
    for slot in slots:
        values = warp.r[slot][warp.lanes]
        if (values != values[0]).any():
            raise Fault("bulk copy", "lanes of one tensor store name different coordinates")


def _store(decoder: Decoder, rank: int) -> Step:
    map_, source = evaluate(decoder, 0), evaluate(decoder, 1)
    slots = _coordinates(decoder, decoder.operands[0], rank)
    line = decoder.line

    def step(warp: Warp) -> None:
        _once(warp, slots)
        box = _map_at(warp, map_(warp))
        coordinates = _numbers(warp, slots)
        if min(coordinates) < 0:
            raise Fault("bulk copy", f"a tensor store at {coordinates}: none may be negative")
        plan = box.load_plan(coordinates)
        memory, offset = one_shared(warp, source(warp), "a tensor store")
        if offset % 128:
            raise Fault("misaligned", f"a tensor store from shared offset {offset:#x}")
        groups, serial = start_store(warp, line)
        reader = bulk_actor(warp, groups.agent, serial, line)
        writer = bulk_actor(warp, groups.writes, serial, line)
        found = _region(warp, box)
        at, valid = _bytes(found, box, plan, "tensor store")
        inner = box.shared_addresses(offset)[valid]
        if len(inner):
            read_shared(memory, inner, reader, "tensor store")
        _note_global(warp, found, at, writer, write=True)

        def effect() -> None:
            found.data[at], found.defined[at] = memory.data[inner], memory.defined[inner]
            groups.finished.add(serial)

        submit(warp, "tensor store", line, effect)

    return step
