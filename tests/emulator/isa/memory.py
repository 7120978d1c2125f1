"""ld and st, with the orders that strong accesses and fences make (PTX ISA 9.7.9, 9.7.13)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulator.isa.addresses import SHARED, Place, evaluate, load, locate, space_of, store
from tests.emulator.isa.decoder import TYPES, Decoder, instruction
from tests.emulator.machine.registers import DTYPES, FULL, bits_of
from tests.emulator.machine.signals import Step
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Operand, Register

_SPACES = ("global", *SHARED, "local", "const", "param::entry", "param")
SCOPES = ("cta", "cluster", "gpu", "sys")
_HINTS = (
    "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "unified", "weak", "mmio",
    "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last",
    "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B", "L2::evict_first", "L2::evict_last",
    "L2::evict_normal", "L2::cache_hint",
)  # fmt: skip
"""Where data is cached, which does not change it."""


def hints(decoder: Decoder) -> int:
    """Take cache hints; 1 if there is a policy operand."""
    policy = int("L2::cache_hint" in decoder.left)
    for name in _HINTS:
        decoder.flag(name)
    return policy


def order(decoder: Decoder) -> str:
    """Take the order and scope of a strong access: "", volatile, relaxed, acquire, release..."""
    kind = decoder.choice(("volatile", "relaxed", "acquire", "release", "acq_rel"))
    decoder.choice(SCOPES)
    return kind


def _keys(place: Place) -> list[tuple[str, int, int]]:
    """Where strong accesses meet: an address each."""
    memory = id(place.memory)
    return [(place.space, memory, address) for address in set(place.addresses.tolist())]


def published(warp: Warp, kind: str, place: Place) -> None:
    """A strong write: whoever reads it with acquire knows what a release, or a fence, covered."""
    known = warp.release() if kind in ("release", "acq_rel") else warp.streams.get("fenced")
    if known is None:
        return
    table = warp.cta.cluster.published
    for key in _keys(place):
        table[key] = np.maximum(known, table[key]) if key in table else known


def observed(warp: Warp, kind: str, place: Place) -> None:
    """A strong read: with acquire, or at the next fence, its writer's knowledge is shared."""
    table = warp.cta.cluster.published
    vectors = [table[key] for key in _keys(place) if key in table]
    if not vectors:
        return
    known = np.max(vectors, axis=0)
    if kind in ("acquire", "acq_rel"):
        warp.acquire(known)
    else:
        seen = warp.streams.get("seen")
        warp.streams["seen"] = known if seen is None else np.maximum(seen, known)


def _elements(decoder: Decoder) -> int:
    return int(decoder.choice(("v2", "v4", "v8"), "v1")[1:])


@instruction("ld", "ldu")
def _ld(decoder: Decoder) -> Step:
    kind = order(decoder)
    policy = hints(decoder)
    space = space_of(decoder, 1, decoder.choice(_SPACES)).removesuffix("::entry")
    count = _elements(decoder)
    type_ = decoder.type()
    decoder.count(2 + policy)
    bits = TYPES[type_]
    size = bits // 8 * count
    targets = [_target(decoder, item, bits, type_) for item in decoder.items(0)]
    if len(targets) != count:
        raise decoder.refuse(f"{len(targets)} registers")
    addresses, line = evaluate(decoder, 1), decoder.line
    part = DTYPES[bits]

    def step(warp: Warp) -> None:
        for place, lanes in locate(warp, space, addresses(warp)):
            data, defined = load(warp, place, size, line, atomic=bool(kind))
            if kind:
                observed(warp, kind, place)
            values = np.ascontiguousarray(data).view(part)
            known = defined.reshape(len(lanes), count, -1).all(2)
            _put(warp, targets, values, known, lanes, part)

    return step


def _target(decoder: Decoder, item: Operand, bits: int, type_: str) -> tuple[int, int, bool]:
    own = item.bits if isinstance(item, Register) else bits
    return decoder.destination(item, bits, wider=True), own, type_.startswith("s")


def _put(
    warp: Warp, targets: list[tuple[int, int, bool]], values: np.ndarray, known: np.ndarray,
    lanes: np.ndarray, part: Any,
) -> None:  # fmt: skip
    """Lanes' values to registers, wider ones extended."""
    mask = warp.mask
    whole = len(lanes) == 32
    if not whole:
        here = np.zeros(32, bool)
        here[lanes] = True
        warp.activate(bits_of(here))
    for index, (slot, own, signed) in enumerate(targets):
        value = values[:, index]
        if own != 8 * value.itemsize:
            value = value.view(f"i{value.itemsize}") if signed else value
            value = value.astype(DTYPES[own])
        if whole:
            full, defined = np.ascontiguousarray(value), bits_of(known[:, index])
        else:
            full = np.zeros(32, value.dtype)
            full[lanes] = value
            bits = np.zeros(32, bool)
            bits[lanes] = known[:, index]
            defined = bits_of(bits)
        warp.put(slot, full, defined)
    warp.activate(mask)


@instruction("st")
def _st(decoder: Decoder) -> Step:
    kind = order(decoder)
    policy = hints(decoder)
    space = space_of(decoder, 0, decoder.choice(_SPACES))
    count = _elements(decoder)
    bits = TYPES[decoder.type()]
    decoder.count(2 + policy)
    sources = [_source(decoder, item, bits) for item in decoder.items(1)]
    if len(sources) != count:
        raise decoder.refuse(f"{len(sources)} registers")
    addresses, line, part = evaluate(decoder, 0), decoder.line, DTYPES[bits]

    def step(warp: Warp) -> None:
        values = np.stack([warp.r[s].astype(part, copy=False) for s in sources], axis=1)
        bytes_ = values.view(np.uint8)
        known = FULL
        for slot in sources:
            known &= warp.d[slot]
        for place, lanes in locate(warp, space, addresses(warp)):
            data = bytes_[lanes]
            defined = _defined(warp, sources, known, lanes, data.shape[1])
            store(warp, place, data, defined, line, atomic=bool(kind))
            if kind:
                published(warp, kind, place)

    return step


def _source(decoder: Decoder, item: Operand, bits: int) -> int:
    """Slot of a stored value: a register may be wider than the type, a literal may not."""
    if isinstance(item, Register) and item.bits >= max(bits, 8):
        return item.slot
    return decoder.source(item, bits)


def _defined(
    warp: Warp, sources: list[int], known: int, lanes: np.ndarray, size: int
) -> np.ndarray:
    """[n, size] bool: which bytes of a store are defined."""
    if not warp.mask & ~known:
        return np.ones((len(lanes), size), bool)
    parts = [np.array([warp.d[s] >> lane & 1 for lane in lanes.tolist()], bool) for s in sources]
    return np.repeat(np.stack(parts, axis=1), size // len(sources), axis=1)


@instruction("membar", "fence")
def _fence(decoder: Decoder) -> Step:
    """fence.proxy.async lets asynchronous work see what this warp knows of; others order it."""
    proxy = decoder.choice(("proxy", "mbarrier_init"))
    if proxy == "proxy":
        kind = decoder.choice(("async", "async::generic", "alias", "tensormap::generic"))
        decoder.choice(("global", *SHARED))
        decoder.choice(("acquire", "release", "sync_restrict::shared::cta",
                        "sync_restrict::shared::cluster"))  # fmt: skip
        decoder.choice(SCOPES)
        if kind in ("async", "async::generic"):
            return lambda warp: warp.fence()
        if kind != "alias":
            raise decoder.refuse("this proxy")
        return lambda warp: None
    decoder.choice(("sc", "acq_rel", "acquire", "release"))
    decoder.choice((*SCOPES, "gl"))
    decoder.choice(("sync_restrict::shared::cta", "sync_restrict::shared::cluster"))

    def step(warp: Warp) -> None:
        seen = warp.streams.pop("seen", None)
        if seen is not None:
            warp.acquire(seen)
        warp.streams["fenced"] = warp.release()

    return step
