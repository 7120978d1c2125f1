"""tcgen05 on tensor memory by warps: alloc, dealloc, ld, st.

Loads and stores take effect when issued: compiled kernels of NVIDIA's own read the registers of a
tcgen05.ld without a wait, which the assembler adds. When others may rely on them is another matter.
"""

from __future__ import annotations

import numpy as np

from tests.emulator import tensor_memory_layout as layout
from tests.emulator.errors import Fault
from tests.emulator.isa.addresses import SHARED, evaluate, one_shared
from tests.emulator.isa.decoder import Decoder
from tests.emulator.isa.tensor_loads import load_actor
from tests.emulator.isa.tensor_stream import cells, group_of, pair_of, same, touch, whole
from tests.emulator.machine.access import Actor, actor, complain, write_shared
from tests.emulator.machine.cluster import Cta
from tests.emulator.machine.registers import FULL, bits_of, lanes_of
from tests.emulator.machine.signals import Outcome, Signal, Step, Wait
from tests.emulator.machine.tensor_memory import COLUMNS, LANES
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Immediate

# Allocation --------------------------------------------------


def _columns(warp: Warp, slot: int) -> int:
    count = same(warp, slot, "the number of columns")
    if count not in (32, 64, 128, 256, 512):
        raise Fault("tensor memory", f"{count} columns: a power of two from 32 to 512")
    return count


def alloc(decoder: Decoder) -> Step:
    """alloc: blocks until there is room; both CTAs of a pair must ask."""
    group, line = group_of(decoder), decoder.line
    for name in ("sync", "aligned", "b32"):
        decoder.flag(name)
    decoder.choice(SHARED)
    decoder.count(2)
    target, count = evaluate(decoder, 0), decoder.source(1, 32)

    def step(warp: Warp) -> Outcome:
        if not whole(warp):
            return Signal.PARK
        columns = _columns(warp, count)
        ctas = pair_of(warp, group)
        if warp.cta.tensor.relinquished:
            where = warp.cta.cluster.program.line(warp.cta.tensor.relinquished)
            raise Fault("tensor memory", f"alloc after the permit was given up at {where}")
        # Both CTAs of a pair must ask; then both get the same columns.
        asked: dict[int, int] = warp.cta.cluster.requests.setdefault(ctas[0].rank, {})
        answers: dict[int, int] = warp.cta.cluster.answers
        if warp.cta.rank in asked or warp.cta.rank in answers:
            raise Fault("tensor memory", f"two warps of {warp.cta.name} allocate at once")
        asked[warp.cta.rank] = columns
        warp.cta.cluster.event()

        def ready() -> bool:
            if warp.cta.rank in answers:
                return True
            if len(asked) < len(ctas):
                return False
            if len(set(asked.values())) > 1:
                raise Fault("tensor memory", f"the pair asks for {sorted(asked.values())} columns")
            start = _room(ctas, columns)
            if start is None:
                return False
            for cta in ctas:
                cta.tensor.allocate(start, columns, line)
                answers[cta.rank] = start
            asked.clear()
            return True

        def then(_: bool) -> None:
            start = answers.pop(warp.cta.rank)
            memory, offset = one_shared(warp, target(warp), "tcgen05.alloc")
            data = np.frombuffer(start.to_bytes(4, "little"), np.uint8)
            write_shared(memory, np.arange(offset, offset + 4), data, True, actor(warp, line))

        return Wait(ready, lambda: f"waits for {columns} columns of tensor memory", then)

    return step


def _room(ctas: list[Cta], columns: int) -> int | None:
    for start in range(0, COLUMNS - columns + 1, columns):
        if not any(cta.tensor.owner[start : start + columns].any() for cta in ctas):
            return start
    return None


def dealloc(decoder: Decoder) -> Step:
    """dealloc: everything that used the columns must be known to be done."""
    group, line = group_of(decoder), decoder.line
    for name in ("sync", "aligned", "b32"):
        decoder.flag(name)
    decoder.count(2)
    address, count = decoder.source(0, 32), decoder.source(1, 32)

    def step(warp: Warp) -> Outcome:
        if not whole(warp):
            return Signal.PARK
        ctas = pair_of(warp, group)
        start, columns = same(warp, address, "the address"), _columns(warp, count)
        memory = warp.cta.tensor
        if start >> 16:
            raise Fault("tensor memory", f"dealloc at lane {start >> 16}")
        at = np.arange(LANES)[:, None] * COLUMNS + start + np.arange(columns)
        # Whatever still uses the columns must be known to be done.
        touch(memory, at, actor(warp, line), "dealloc", write=True)
        for cta in ctas:
            if cta is not warp.cta and warp.cta.cluster.settings.races:
                # A pair frees together: what the other CTA still reads must be known, too.
                conflict = cta.tensor.log.unfinished(at.reshape(-1), warp.vector[0])
                complain(conflict, actor(warp, line), cta.tensor.name)
        memory.free(start, columns)
        warp.cta.cluster.event()
        return None

    return step


def relinquish(decoder: Decoder) -> Step:
    """relinquish_alloc_permit: no alloc of this CTA after it."""
    group, line = group_of(decoder), decoder.line
    for name in ("sync", "aligned"):
        decoder.flag(name)
    decoder.count(0)

    def step(warp: Warp) -> Outcome:
        if not whole(warp):
            return Signal.PARK
        pair_of(warp, group)
        warp.cta.tensor.relinquished = line
        return None

    return step


# Loads and stores by warps --------------------------------------------------


def _access(decoder: Decoder, write: bool) -> tuple[layout.Registers, str]:
    """Take shape, count and packing: where each register of each lane is."""
    for name in ("sync", "aligned", "b32"):
        decoder.flag(name)
    shape = decoder.choice(tuple(layout.SHAPES))
    repeat = decoder.choice(tuple(f"x{1 << i}" for i in range(8)))
    if not shape or not repeat:
        raise decoder.refuse("this shape")
    pack = decoder.flag("unpack::16b" if write else "pack::16b")
    split = 0
    if shape == "16x32bx2":
        immediate = decoder.operands[1 if write else 2]
        if not isinstance(immediate, Immediate):
            raise decoder.refuse("a split that is no number")
        split = immediate.value
    return layout.registers(shape, int(repeat[1:]), pack=pack, split=split), shape


def _at(warp: Warp, address: int, places: layout.Registers) -> np.ndarray:
    """Cells of an access: a warp reaches the 32 lanes of its own quarter only."""
    lane, quarter = address >> 16, 32 * (warp.index % 4)
    first, last = lane + int(places.lane.min()), lane + int(places.lane.max())
    if first < quarter or last >= quarter + 32:
        raise Fault(
            "tensor memory",
            f"warp {warp.index} of the CTA reaches lanes {first} to {last}, may reach {quarter} "
            f"to {quarter + 31}",
        )
    return cells(address, places.lane, places.column, warp.cta.tensor)


def load(decoder: Decoder) -> Step:
    """tcgen05.ld."""
    places, _ = _access(decoder, write=False)
    targets = [decoder.destination(item, 32) for item in decoder.items(0)]
    if len(targets) != len(places.lane):
        raise decoder.refuse(f"{len(targets)} registers")
    address, line = evaluate(decoder, 1), decoder.line
    packed = places.lane.ndim == 3

    def step(warp: Warp) -> Outcome:
        if not whole(warp):
            return Signal.PARK
        memory = warp.cta.tensor
        at = _at(warp, _uniform(warp, address(warp)), places)
        touch(memory, at, load_actor(warp, line, targets), "tcgen05.ld", write=False)
        values, known = memory.words[at], memory.defined[at]
        if packed:
            low, high = values[..., 0] & 0xFFFF, values[..., 1] & 0xFFFF
            values, known = low | high << np.uint32(16), known.all(-1)
        for index, slot in enumerate(targets):
            warp.put(slot, values[index].copy(), bits_of(known[index]))
        return None

    return step


def store_actor(warp: Warp, line: int) -> Actor:
    """A warp's tcgen05.st: others, and its own loads, may rely on it after a wait::st."""
    cluster = warp.cta.cluster
    if "tensor stores" not in warp.streams:
        warp.streams["tensor stores"] = [cluster.agents.add(f"{warp.name}'s tcgen05.st"), 0]
    stream = warp.streams["tensor stores"]
    stream[1] += 1
    return Actor(
        cluster.program, warp.name, stream[0], stream[1], line, warp.vector, ordered=stream[0],
        races=cluster.settings.races,
    )  # fmt: skip


def wait_stores(warp: Warp) -> None:
    """tcgen05.wait::st: what this warp has stored is there."""
    if "tensor stores" in warp.streams:
        agent, serial = warp.streams["tensor stores"]
        warp.vector[:, agent] = serial


def _uniform(warp: Warp, addresses: np.ndarray) -> int:
    mine = addresses[warp.lanes]
    if (mine != mine[0]).any():
        raise Fault("tensor memory", "lanes name different addresses of tensor memory")
    return int(mine[0])


def store(decoder: Decoder) -> Step:
    """tcgen05.st."""
    places, _ = _access(decoder, write=True)
    sources = [decoder.source(item, 32) for item in decoder.items(len(decoder.operands) - 1)]
    if len(sources) != len(places.lane) or places.lane.ndim == 3:
        raise decoder.refuse(f"{len(sources)} registers")
    address, line = evaluate(decoder, 0), decoder.line

    def step(warp: Warp) -> Outcome:
        if not whole(warp):
            return Signal.PARK
        memory = warp.cta.tensor
        at = _at(warp, _uniform(warp, address(warp)), places)
        touch(memory, at, store_actor(warp, line), "tcgen05.st", write=True)
        for index, slot in enumerate(sources):
            memory.words[at[index]] = warp.r[slot]
            memory.defined[at[index]] = lanes_of(warp.d[slot] & FULL)
        return None

    return step
