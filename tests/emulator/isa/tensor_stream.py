"""What tcgen05 instructions share: streams of asynchronous work, pairs of CTAs, cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.emulator.errors import Fault
from tests.emulator.isa.decoder import Decoder
from tests.emulator.machine.access import Actor, complain, note
from tests.emulator.machine.clocks import ASYNC
from tests.emulator.machine.cluster import Cta
from tests.emulator.machine.engine import Operation
from tests.emulator.machine.tensor_memory import COLUMNS, LANES, TensorMemory
from tests.emulator.machine.warp import Warp


@dataclass
class Stream:
    """Asynchronous tensor-core work of a warp."""

    agent: int
    serial: int = 0


def stream_of(warp: Warp) -> Stream:
    """A warp's stream."""
    if "tensor core" not in warp.streams:
        agent = warp.cta.cluster.agents.add(f"{warp.name}'s tensor-core work")
        warp.streams["tensor core"] = Stream(agent)
    return warp.streams["tensor core"]


def issue(warp: Warp, name: str, line: int, effect: Callable[[], None]) -> None:
    """Queue work behind what the warp's stream has."""
    cluster = warp.cta.cluster
    program, stream = cluster.program, stream_of(warp)

    def done() -> None:
        try:
            effect()
        except Fault as fault:
            text = str(fault).removeprefix(f"{fault.check}: ")
            raise Fault(fault.check, f"{text}\n  in {name} of {program.line(line)}") from None
        cluster.event()

    cluster.engine.issue(Operation(name, line, done, stream.agent))


def next_actor(warp: Warp, line: int) -> Actor:
    """The next step of a warp's stream."""
    stream = stream_of(warp)
    stream.serial += 1
    cluster = warp.cta.cluster
    return Actor(
        cluster.program, f"tensor-core work of {warp.name}", stream.agent, stream.serial, line,
        warp.vector.copy(), ASYNC, ordered=stream.agent, races=cluster.settings.races,
    )  # fmt: skip


def pair_of(warp: Warp, group: int) -> list[Cta]:
    """The CTAs that an instruction of this cta_group works on, the even one first."""
    ctas, rank = warp.cta.cluster.ctas, warp.cta.rank
    if group == 1:
        found = [warp.cta]
    else:
        if len(ctas) % 2:
            raise Fault("tensor memory", f"cta_group::2 in a cluster of {len(ctas)}")
        found = ctas[rank & ~1 : (rank & ~1) + 2]
    for cta in found:
        if cta.tensor.group not in (0, group):
            raise Fault("tensor memory", "a kernel mixes cta_group::1 and cta_group::2")
        cta.tensor.group = group
    return found


def group_of(decoder: Decoder) -> int:
    """Take the cta_group modifier."""
    name = decoder.choice(("cta_group::1", "cta_group::2"))
    if not name:
        raise decoder.refuse("no cta_group")
    return int(name[-1])


def touch(memory: TensorMemory, at: np.ndarray, who: Actor, what: str, *, write: bool) -> None:
    """Check an access to cells of tensor memory."""
    memory.check(at, what)
    conflict = note(memory.log, at.reshape(-1), who, write=write)
    complain(conflict, who, memory.place(conflict.place) if conflict else "")


def cells(address: int, lanes: np.ndarray, columns: np.ndarray, memory: TensorMemory) -> np.ndarray:
    """Numbers of cells, lane and column counted from an address."""
    lane, column = lanes + (address >> 16), columns + (address & 0xFFFF)
    if int(lane.max()) >= LANES or int(column.max()) >= COLUMNS:
        raise Fault(
            "out of bounds",
            f"lane {int(lane.max())}, column {int(column.max())} of {memory.name}'s tensor memory",
        )
    return lane * COLUMNS + column


def same(warp: Warp, slot: int, what: str) -> int:
    """A number that all active lanes agree on."""
    warp.require(slot, what)
    values = warp.r[slot][warp.lanes]
    if (values != values[0]).any():
        raise Fault("tensor memory", f"lanes disagree on {what}")
    return int(values[0])


def whole(warp: Warp) -> bool:
    """Whether the lanes of a warp are together, as .aligned instructions need them."""
    return warp.mask == warp.whole
