"""tcgen05: the fifth-generation tensor core (PTX ISA 9.7.16).

Asynchronous instructions of a warp are one stream that executes in order (the pipelined pairs of
the ISA's memory model); what they did is known to whoever waits for a commit.
"""

from __future__ import annotations

import numpy as np

from tests.emulator import descriptors
from tests.emulator import tensor_memory_layout as layout
from tests.emulator.errors import Fault
from tests.emulator.isa.addresses import SHARED, evaluate, known_barrier, one_shared
from tests.emulator.isa.copy_groups import one_lane
from tests.emulator.isa.decoder import Decoder, instruction
from tests.emulator.isa.tensor_loads import wait_loads
from tests.emulator.isa.tensor_memory_ops import (
    alloc,
    dealloc,
    load,
    relinquish,
    store,
    wait_stores,
)
from tests.emulator.isa.tensor_mma import mma
from tests.emulator.isa.tensor_stream import (
    cells,
    group_of,
    issue,
    next_actor,
    pair_of,
    same,
    stream_of,
    touch,
    whole,
)
from tests.emulator.machine.access import read_shared
from tests.emulator.machine.signals import Outcome, Signal, Step
from tests.emulator.machine.warp import Warp


@instruction("tcgen05")
def _tcgen05(decoder: Decoder) -> Step:
    action = decoder.choice(
        ("alloc", "dealloc", "relinquish_alloc_permit", "mma", "cp", "commit", "ld", "st",
         "wait::ld", "wait::st", "fence::before_thread_sync", "fence::after_thread_sync", "shift")
    )  # fmt: skip
    builders = {
        "alloc": alloc, "dealloc": dealloc, "relinquish_alloc_permit": relinquish, "cp": _cp,
        "commit": _commit, "ld": load, "st": store, "mma": _mma,
    }  # fmt: skip
    if action in builders:
        return builders[action](decoder)
    if action.startswith("fence"):
        return lambda warp: None
    if action.startswith("wait"):
        return _wait(decoder, stores=action.endswith("st"))
    raise decoder.refuse("this action")


def _wait(decoder: Decoder, *, stores: bool) -> Step:
    decoder.flag("sync")
    decoder.flag("aligned")

    def step(warp: Warp) -> Outcome:
        if not whole(warp):
            return Signal.PARK
        if stores:
            wait_stores(warp)
        else:
            wait_loads(warp)
        return None

    return step


def _mma(decoder: Decoder) -> Step:
    group, line = group_of(decoder), decoder.line
    run = mma(decoder, group)

    def step(warp: Warp) -> None:
        one_lane(warp, "tcgen05.mma")
        ctas = pair_of(warp, group)
        who = next_actor(warp, line)
        effect = run(warp, ctas, who)
        issue(warp, "tcgen05.mma", line, effect)

    return step


# Copies from shared memory, and completion --------------------------------------------------


def _cp(decoder: Decoder) -> Step:
    group, line = group_of(decoder), decoder.line
    shape = decoder.choice(("128x256b", "4x256b", "128x128b", "64x128b", "32x128b"))
    multicast = decoder.choice(("warpx2::02_13", "warpx2::01_23", "warpx4"))
    plan = layout.copy_plan(f"{shape}.{multicast}" if multicast else shape)
    decoder.count(2)
    target, source = evaluate(decoder, 0), decoder.source(1, 64)
    columns = np.arange(plan.row_bytes // 4)

    def step(warp: Warp) -> None:
        one_lane(warp, "tcgen05.cp")
        descriptor = descriptors.decode_shared(same(warp, source, "the matrix descriptor"))
        address = int(target(warp)[warp.lanes][0])
        who = next_actor(warp, line)
        offsets = descriptors.operand_bytes(descriptor, plan.rows, plan.row_bytes)
        moves = []
        for cta in pair_of(warp, group):
            read_shared(cta.shared, offsets, who, "tcgen05.cp")
            at = cells(address, plan.lanes[:, :, None], columns[None, None, :], cta.tensor)
            touch(cta.tensor, at, who, "tcgen05.cp", write=True)
            moves.append((cta, at))

        def effect() -> None:
            for cta, at in moves:
                raw = np.ascontiguousarray(cta.shared.data[offsets]).view(np.uint32)
                known = cta.shared.defined[offsets].reshape(plan.rows, -1, 4).all(2)
                cta.tensor.words[at] = raw[None]
                cta.tensor.defined[at] = known[None]

        issue(warp, "tcgen05.cp", line, effect)

    return step


def _commit(decoder: Decoder) -> Step:
    group, line = group_of(decoder), decoder.line
    if not decoder.flag("mbarrier::arrive::one"):
        raise decoder.refuse("this completion")
    decoder.choice(SHARED)
    multicast = decoder.flag("multicast::cluster")
    decoder.flag("b64")
    decoder.count(1 + multicast)
    address = evaluate(decoder, 0)
    mask_slot = decoder.source(1, 16) if multicast else -1

    def step(warp: Warp) -> None:
        one_lane(warp, "tcgen05.commit")
        pair_of(warp, group)
        memory, offset = one_shared(warp, address(warp), "tcgen05.commit")
        ctas = warp.cta.cluster.ctas
        targets = [memory]
        if multicast:
            mask = same(warp, mask_slot, "the multicast mask")
            targets = [cta.shared for cta in ctas if mask >> cta.rank & 1]
            if not targets or mask >> len(ctas):
                raise Fault("multicast", f"mask {mask:#06x} in a cluster of {len(ctas)}")
        stream = stream_of(warp)
        known = warp.release()
        known[:, stream.agent] = stream.serial
        for each in targets:
            barrier = known_barrier(warp, each, offset, "tcgen05.commit")
            if each is not warp.cta.shared:
                barrier.awaited = barrier.phase + 1, line

        def effect() -> None:
            for each in targets:
                each.mbarrier(offset, "tcgen05.commit").arrive(1, known)

        issue(warp, "tcgen05.commit", line, effect)

    return step
