"""mov, selp and addresses: cvta, mapa, getctarank."""

from __future__ import annotations

import numpy as np

from tests.emulator.isa import alu
from tests.emulator.isa.decoder import TYPES, Decoder, instruction
from tests.emulator.machine.registers import DTYPES, FULL, lanes_of
from tests.emulator.machine.shared_memory import OFFSET, RANK_SHIFT
from tests.emulator.machine.signals import Step
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Address, Register, Variable, Vector

SPACES = {"shared": 1 << 56, "param": 2 << 56, "local": 3 << 56}
"""Where a space's window starts among generic addresses: beyond any address of the host."""


@instruction("mov")
def _mov(decoder: Decoder) -> Step:
    type_ = decoder.type()
    decoder.count(2)
    bits = TYPES[type_]
    target, value = decoder.operands
    if bits == 1:
        return _copy_predicate(decoder)
    if bits not in DTYPES:
        raise decoder.refuse(f"type .{type_}")
    if isinstance(target, Vector):
        return _unpack(decoder, target, bits)
    if isinstance(value, Vector):
        return _pack(decoder, value, bits)
    if isinstance(value, Address):
        raise decoder.refuse("an address in brackets")
    destination, source = decoder.destination(0, bits), decoder.source(1, bits)

    def step(warp: Warp) -> None:
        warp.put(destination, warp.r[source], warp.d[source])

    return step


def _copy_predicate(decoder: Decoder) -> Step:
    slot, negated = decoder.predicate(1)
    destination = decoder.destination(0, 1)

    def step(warp: Warp) -> None:
        value = ~warp.r[slot] if negated else warp.r[slot]
        warp.put_predicate(destination, value, warp.d[slot])

    return step


def _pack(decoder: Decoder, value: Vector, bits: int) -> Step:
    """``mov.b32 d, {low, high}``."""
    part = bits // len(value.items)
    if part not in DTYPES or part * len(value.items) != bits:
        raise decoder.refuse(f"{len(value.items)} parts")
    slots = [decoder.source(item, part) for item in value.items]
    wide, narrow = DTYPES[bits], DTYPES[part]

    def join(*parts: np.ndarray) -> np.ndarray:
        return np.stack(parts, axis=1).astype(narrow).view(wide)[:, 0]

    return alu.compute(join, decoder.destination(0, bits), slots)


def _unpack(decoder: Decoder, target: Vector, bits: int) -> Step:
    """``mov.b32 {low, high}, a``."""
    part = bits // len(target.items)
    if part not in DTYPES or part * len(target.items) != bits:
        raise decoder.refuse(f"{len(target.items)} parts")
    slots = [decoder.destination(item, part) for item in target.items]
    source, narrow = decoder.source(1, bits), DTYPES[part]

    def step(warp: Warp) -> None:
        parts = np.ascontiguousarray(warp.r[source]).view(narrow).reshape(32, -1)
        for index, slot in enumerate(slots):
            warp.put(slot, parts[:, index].copy(), warp.d[source])

    return step


@instruction("selp")
def _selp(decoder: Decoder) -> Step:
    bits = TYPES[decoder.type()]
    decoder.count(4)
    destination = decoder.destination(0, bits)
    a, b = decoder.source(1, bits), decoder.source(2, bits)
    slot, negated = decoder.predicate(3)

    def step(warp: Warp) -> None:
        chosen = (~warp.r[slot] & FULL) if negated else warp.r[slot]
        if chosen == FULL:
            value = warp.r[a]
        elif not chosen:
            value = warp.r[b]
        else:
            value = np.where(lanes_of(chosen), warp.r[a], warp.r[b])
        # What is not chosen need not be defined.
        defined = (chosen & warp.d[a]) | (~chosen & warp.d[b])
        warp.put(destination, value, defined & warp.d[slot])

    return step


@instruction("cvta")
def _cvta(decoder: Decoder) -> Step:
    to = decoder.flag("to")
    space = decoder.choice(("global", "const", "shared::cluster", "shared::cta", "shared",
                            "param::entry", "param", "local"))  # fmt: skip
    type_ = decoder.type("u64", "u32", "b64")
    decoder.count(2)
    bits = TYPES[type_]
    base = SPACES.get(space.partition("::")[0], 0)
    value = decoder.operands[1]
    destination = decoder.destination(0, bits)
    if isinstance(value, Variable):
        slot = decoder.variable(value, bits)
        return alu.compute(lambda a: a if to else a + DTYPES[bits](base), destination, [slot])
    if not isinstance(value, Register):
        raise decoder.refuse(f"operand {value}")
    by = np.uint64(base)
    source = decoder.source(1, bits)
    if not base:
        return alu.compute(lambda a: a, destination, [source])
    if bits == 32:
        raise decoder.refuse("32-bit generic addresses")
    return alu.compute(lambda a: a - by if to else a + by, destination, [source])


@instruction("mapa")
def _mapa(decoder: Decoder) -> Step:
    """The address of the same place in another CTA of the cluster."""
    generic = not decoder.flag("shared::cluster")
    bits = TYPES[decoder.type("u32", "u64")]
    decoder.count(3)
    if generic and bits == 32:
        raise decoder.refuse("a 32-bit generic address")
    kind = DTYPES[bits]
    high = kind(SPACES["shared"] if generic else 0)

    def place(address: np.ndarray, rank: np.ndarray) -> np.ndarray:
        return (address & kind(OFFSET)) | (rank.astype(kind) << kind(RANK_SHIFT)) | high

    slots = [decoder.source(1, bits), decoder.source(2, 32)]
    return alu.compute(place, decoder.destination(0, bits), slots)


@instruction("getctarank")
def _getctarank(decoder: Decoder) -> Step:
    decoder.flag("shared::cluster")
    bits = TYPES[decoder.type("u32", "u64")]
    decoder.count(2)
    kind = DTYPES[bits]

    def rank(address: np.ndarray) -> np.ndarray:
        return (address >> kind(RANK_SHIFT) & kind(0xFF)).astype(np.uint32)

    return alu.compute(rank, decoder.destination(0, 32), [decoder.source(1, bits)])
