"""Operands in brackets: which memory an access of a warp goes to, and where in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.emulator.errors import Fault
from tests.emulator.isa.decoder import Decoder
from tests.emulator.isa.moves import SPACES
from tests.emulator.machine.access import (
    actor,
    read_global,
    read_shared,
    spans,
    write_global,
    write_shared,
)
from tests.emulator.machine.barriers import Mbarrier
from tests.emulator.machine.shared_memory import OFFSET, RANK_SHIFT, SharedMemory
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Immediate, Operand, Variable

SHARED = ("shared::cta", "shared::cluster", "shared")
_WINDOWS = {base >> 56: space for space, base in SPACES.items()}
Evaluate = Callable[[Warp], np.ndarray]


def evaluate(decoder: Decoder, operand: Operand | int) -> Evaluate:
    """A function that gives [32] uint64 addresses, and faults on undefined ones."""
    address = decoder.address(operand)
    if isinstance(address.base, Variable):
        base = decoder.variable(address.base, 64)
        by = np.uint64(address.offset & (2**64 - 1))
        return lambda warp: warp.r[base] + by
    if isinstance(address.base, Immediate):
        constant = np.full(32, address.base.value + address.offset, np.uint64)
        return lambda warp: constant
    slot = address.base.slot
    bits = address.base.bits
    offset = np.uint64(address.offset & (2**64 - 1))
    mask = np.uint64(0xFFFFFFFF if bits == 32 else 2**64 - 1)

    def addresses(warp: Warp) -> np.ndarray:
        warp.require(slot, "an address")
        return (warp.r[slot].astype(np.uint64) + offset) & mask

    return addresses


def space_of(decoder: Decoder, operand: Operand | int, named: str) -> str:
    """The space of an access: as named, or that of a variable, or "" for generic."""
    if named:
        return named
    base = decoder.address(operand).base
    return base.space if isinstance(base, Variable) else ""


@dataclass(frozen=True)
class Place:
    """Where active lanes access: `addresses` in global memory, else offsets in a space."""

    space: str
    addresses: np.ndarray
    memory: Any = None


def locate(warp: Warp, space: str, addresses: np.ndarray) -> list[tuple[Place, np.ndarray]]:
    """The memory behind active lanes' addresses: several if lanes go to several CTAs or tensors."""
    lanes = np.flatnonzero(warp.lanes)
    mine = addresses[lanes]
    if not space:
        tops = mine >> np.uint64(56)
        if (tops != tops[0]).any():
            raise Fault("address", "lanes of one access use different state spaces")
        space = _WINDOWS.get(int(tops[0]), "global")
        space = "shared::cluster" if space == "shared" else space
        mine = mine & np.uint64((1 << 56) - 1)
    if space == "global" and len(mine):
        parts = warp.cta.cluster.program.memory.parts(mine)
        return [(Place(space, mine[part]), lanes[part]) for part in parts]
    if space not in SHARED:
        return [(Place(space, mine), lanes)]
    ranks = mine >> np.uint64(RANK_SHIFT)
    offsets = (mine & np.uint64(OFFSET)).astype(np.int64)
    found = []
    for rank in np.unique(ranks).tolist():
        chosen = ranks == rank
        memory = shared_of(warp, rank)
        if space != "shared::cluster" and memory is not warp.cta.shared:
            raise Fault("address", f"a .{space} access to {memory.name}: only .shared::cluster may")
        found.append((Place("shared", offsets[chosen], memory), lanes[chosen]))
    return found


def shared_of(warp: Warp, rank: int) -> SharedMemory:
    """Shared memory of a CTA of the cluster."""
    ctas = warp.cta.cluster.ctas
    if rank >= len(ctas):
        raise Fault(
            "out of bounds", f"shared address of CTA rank {rank} in a cluster of {len(ctas)}"
        )
    return ctas[rank].shared


def one_shared(warp: Warp, addresses: np.ndarray, what: str) -> tuple[SharedMemory, int]:
    """Memory and offset of an address that all active lanes agree on."""
    mine = addresses[warp.lanes]
    if (mine != mine[0]).any():
        raise Fault("address", f"{what}: lanes name different shared addresses")
    address = int(mine[0])
    if address >> 56:
        if _WINDOWS.get(address >> 56) != "shared":
            raise Fault("address", f"{what}: {address:#x} is no shared address")
        address &= (1 << 56) - 1
    if address >> 32:
        raise Fault("address", f"{what}: {address:#x} is no shared address")
    return shared_of(warp, address >> RANK_SHIFT), address & OFFSET


def known_barrier(warp: Warp, memory: SharedMemory, offset: int, what: str) -> Mbarrier:
    """The mbarrier there; a warp may only use one whose making it knows of."""
    found = memory.mbarrier(offset, what)
    if warp.cta.cluster.settings.races and warp.vector[0, found.maker] < found.made:
        raise Fault("race", f"{what} of {found.name}: nothing orders this after its mbarrier.init")
    return found


def check_aligned(addresses: np.ndarray, size: int, what: str) -> None:
    """Fault if an address is no multiple of the access's size."""
    bad = addresses % np.asarray(size, addresses.dtype) != 0
    if bad.any():
        raise Fault("misaligned", f"{what} of {size} bytes at {int(addresses[bad][0]):#x}")


def load(warp: Warp, place: Place, size: int, line: int, *, atomic: bool = False) -> Any:
    """[n, size] bytes and whether they are defined."""
    who = actor(warp, line)
    check_aligned(place.addresses, size, "load")
    if place.space == "shared":
        return read_shared(place.memory, spans(place.addresses, size), who, atomic=atomic)
    if place.space in ("global", "const"):
        memory = warp.cta.cluster.program.memory
        return read_global(memory, place.addresses, size, who, atomic=atomic)
    if place.space == "param":
        return _parameters(warp, place.addresses.astype(np.int64), size)
    if place.space == "local":
        data, defined = _local(warp)
        at = _local_bytes(data, place.addresses, size)
        lanes = np.flatnonzero(warp.lanes)[:, None]
        return data[lanes, at], defined[lanes, at]
    raise Fault("address", f"no loads from .{place.space}")


def store(
    warp: Warp, place: Place, data: np.ndarray, defined: np.ndarray, line: int, *,
    atomic: bool = False,
) -> None:  # fmt: skip
    """Write [n, size] bytes."""
    who = actor(warp, line)
    size = data.shape[1]
    check_aligned(place.addresses, size, "store")
    if len(place.addresses) > 1 and not atomic and place.space != "local":
        _check_lanes(place.addresses, data)
    if place.space == "shared":
        at = spans(place.addresses, size)
        write_shared(place.memory, at, data, defined, who, atomic=atomic)
    elif place.space == "global":
        memory = warp.cta.cluster.program.memory
        write_global(memory, place.addresses, data, defined, who, atomic=atomic)
    elif place.space == "local":
        bytes_, known = _local(warp)
        at = _local_bytes(bytes_, place.addresses, size)
        lanes = np.flatnonzero(warp.lanes)[:, None]
        bytes_[lanes, at] = data
        known[lanes, at] = defined
    else:
        raise Fault("address", f"no stores to .{place.space}")


def _check_lanes(addresses: np.ndarray, data: np.ndarray) -> None:
    """Lanes that write one place must write one value: which lane wins is not defined."""
    first: dict[int, int] = {}
    listed = addresses.tolist()
    if len(set(listed)) == len(listed):
        return
    for lane, address in enumerate(listed):
        other = first.setdefault(address, lane)
        if (data[lane] != data[other]).any():
            raise Fault("race", f"two lanes of one store write different values to {address:#x}")


def _local_bytes(data: np.ndarray, addresses: np.ndarray, size: int) -> np.ndarray:
    at = spans(addresses.astype(np.int64), size)
    if at.min() < 0 or at.max() >= data.shape[1]:
        raise Fault("out of bounds", f"local byte {int(at.max())} of {data.shape[1]}")
    return at


def _parameters(warp: Warp, offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    block = warp.cta.cluster.program.parameters
    if int(offsets.max()) + size > len(block):
        raise Fault("out of bounds", f"parameter bytes {int(offsets.max())} and on")
    data = block[spans(offsets, size)]
    return data, np.ones(data.shape, bool)


def _local(warp: Warp) -> tuple[np.ndarray, np.ndarray]:
    if "local" not in warp.streams:
        size = warp.cta.cluster.program.entry.local_bytes
        warp.streams["local"] = np.full((32, size), 0xFF, np.uint8), np.zeros((32, size), bool)
    return warp.streams["local"]
