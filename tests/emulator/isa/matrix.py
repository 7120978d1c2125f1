"""Warp-level matrices: mma.sync, ldmatrix, stmatrix (PTX ISA 9.7.14)."""

from __future__ import annotations

import numpy as np

from tests.emulator import fragments
from tests.emulator.errors import Fault
from tests.emulator.isa.addresses import SHARED, Evaluate, evaluate, space_of
from tests.emulator.isa.decoder import TYPES, Decoder, instruction
from tests.emulator.isa.moves import SPACES
from tests.emulator.machine.access import actor, read_shared, write_shared
from tests.emulator.machine.registers import FULL, bits_of
from tests.emulator.machine.shared_memory import OFFSET
from tests.emulator.machine.signals import Outcome, Signal, Step
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Operand

_SHAPES = ("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m16n8k64")
_VECTORS = {"scale_vec::1X": 1, "scale_vec::2X": 2, "scale_vec::4X": 4}
_ELEMENTS = ("f16", "bf16", "tf32", "e4m3", "e5m2", "e2m1", "e2m3", "e3m2", "s8", "u8", "s32",
             "f32", "ue4m3", "ue8m0")  # fmt: skip
_ROLES = ("A", "B", "C", "the scales", "the scale selectors")


@instruction("mma")
def _mma(decoder: Decoder) -> Step:
    for name in ("sync", "aligned", "row", "col"):
        if not decoder.flag(name):
            raise decoder.refuse(f"a form without .{name}")
    shape = decoder.choice(_SHAPES)
    kinds = [name.removeprefix("kind::") for name in decoder.left if name.startswith("kind::")]
    kind = kinds[0] if kinds else ""
    decoder.flag(f"kind::{kind}")
    scaled = decoder.flag("block_scale")
    vector = _VECTORS[decoder.choice(_VECTORS, "scale_vec::1X")]
    types = [name for name in decoder.left if name in _ELEMENTS]
    decoder.left = [name for name in decoder.left if name not in _ELEMENTS]
    if len(types) != (5 if scaled else 4) or types[0] != types[3] or types[0] not in ("f32", "s32"):
        raise decoder.refuse(f"types {types}")
    decoder.count(10 if scaled and len(decoder.operands) == 10 else 8 if scaled else 4)
    targets = [decoder.destination(item, 32) for item in decoder.items(0)]
    sources = [[decoder.source(item, 32) for item in decoder.items(i)] for i in (1, 2, 3)]
    dtype = np.int32 if types[0] == "s32" else np.float32
    scale_slots = [decoder.source(_only(decoder, i), 32) for i in (4, 6)] if scaled else []
    selectors = (
        [decoder.source(item, 16) for i in (5, 7) for item in _pair(decoder, i)] if scaled else []
    )

    def step(warp: Warp) -> Outcome:
        if warp.mask != warp.live:
            return Signal.PARK
        for slots, name in zip([*sources, scale_slots, selectors], _ROLES, strict=True):
            for slot in slots:
                warp.require(slot, f"a register of {name}")
        a, b, c = (np.stack([warp.r[slot] for slot in slots]) for slots in sources)
        if scaled:
            scales = [warp.r[slot] for slot in scale_slots]
            chosen = (_uniform(warp, slot) for slot in selectors)
            options = fragments.BlockScale(kind, vector, types[1], types[2], types[4], *chosen)
            result = fragments.mma_block_scale(a, b, c.view(dtype), *scales, options)
        else:
            result = fragments.mma(shape, a, b, c.view(dtype), types[1], types[2])
        for index, slot in enumerate(targets):
            warp.put(slot, np.ascontiguousarray(result[index]).view(np.uint32), FULL)
        return None

    return step


def _only(decoder: Decoder, index: int) -> Operand:
    """A scale operand: one register, in braces or not."""
    items = decoder.items(index)
    if len(items) != 1:
        raise decoder.refuse(f"a scale of {len(items)} registers")
    return items[0]


def _pair(decoder: Decoder, index: int) -> tuple[Operand, ...]:
    """A scale selector ``{byte-id, thread-id}``: literals or 16-bit registers."""
    items = decoder.items(index)
    if len(items) != 2:
        raise decoder.refuse("a scale selector that is not two numbers")
    return items


def _uniform(warp: Warp, slot: int) -> int:
    values = warp.r[slot]
    if (values != values[0]).any():
        raise Fault("scale selector", "the lanes select different scales")
    return int(values[0])


def _move(decoder: Decoder, operand: int) -> tuple[int, bool, Evaluate]:
    """Matrices, whether transposed, and shared addresses of their rows, whose lanes come first."""
    for name in ("sync", "aligned"):
        if not decoder.flag(name):
            raise decoder.refuse(f"a form without .{name}")
    if not decoder.flag("m8n8"):
        raise decoder.refuse("another shape than .m8n8")
    number = decoder.choice(("x1", "x2", "x4"))
    if not number:
        raise decoder.refuse("a form without .x1, .x2 or .x4")
    count, trans = int(number[1:]), decoder.flag("trans")
    generic = not space_of(decoder, operand, decoder.choice(SHARED))
    if TYPES[decoder.type("b16")] != 16:
        raise decoder.refuse("another type than .b16")
    addresses, rows = evaluate(decoder, operand), (1 << 8 * count) - 1

    def shared(warp: Warp) -> np.ndarray:
        mask = warp.mask
        warp.activate(mask & rows)
        found = addresses(warp)
        if generic:
            if (found[warp.lanes] >> np.uint64(56) != SPACES["shared"] >> 56).any():
                raise Fault("address", f"{decoder.opcode}: a generic address not of shared memory")
            found = found & np.uint64((1 << 56) - 1)
        warp.activate(mask)
        return found

    return count, trans, shared


def _bytes(warp: Warp, addresses: np.ndarray, count: int, trans: bool) -> np.ndarray:
    """[count, 32, 2, 2] offsets: register, lane, half, byte."""
    lane, byte = fragments.matrix_move(count, trans=trans)
    rows = addresses[: 8 * count]
    if (rows % np.uint64(16)).any():
        raise Fault("misaligned", "a matrix row that is not at a multiple of 16 bytes")
    rank = rows >> np.uint64(24)
    if (rank != warp.cta.rank).any():
        raise Fault("address", "matrix rows in another CTA's shared memory")
    offsets = (addresses & np.uint64(OFFSET)).astype(np.int64)
    return (offsets[lane] + byte)[..., None] + np.arange(2)


@instruction("ldmatrix")
def _ldmatrix(decoder: Decoder) -> Step:
    decoder.count(2)
    count, trans, addresses = _move(decoder, 1)
    targets = [decoder.destination(item, 32) for item in decoder.items(0)]
    line = decoder.line
    if len(targets) != count:
        raise decoder.refuse(f"{len(targets)} registers")

    def step(warp: Warp) -> Outcome:
        if warp.mask != warp.live:
            return Signal.PARK
        at = _bytes(warp, addresses(warp), count, trans)
        data, defined = read_shared(warp.cta.shared, at, actor(warp, line), "ldmatrix")
        words = np.ascontiguousarray(data).reshape(count, 32, 4).view(np.uint32)[..., 0]
        known = defined.reshape(count, 32, 4).all(2)
        for index, slot in enumerate(targets):
            warp.put(slot, words[index].copy(), bits_of(known[index]))
        return None

    return step


@instruction("stmatrix")
def _stmatrix(decoder: Decoder) -> Step:
    decoder.count(2)
    count, trans, addresses = _move(decoder, 0)
    sources = [decoder.source(item, 32) for item in decoder.items(1)]
    line = decoder.line
    if len(sources) != count:
        raise decoder.refuse(f"{len(sources)} registers")

    def step(warp: Warp) -> Outcome:
        if warp.mask != warp.live:
            return Signal.PARK
        at = _bytes(warp, addresses(warp), count, trans)
        words = np.stack([warp.r[slot] for slot in sources])
        data = np.ascontiguousarray(words).view(np.uint8).reshape(count, 32, 2, 2)
        known = np.ones(data.shape, bool)
        for index, slot in enumerate(sources):
            missing = ~warp.d[slot] & FULL
            if missing:
                for lane in range(32):
                    known[index, lane] = not missing >> lane & 1
        write_shared(warp.cta.shared, at, data, known, actor(warp, line), "stmatrix")
        return None

    return step
