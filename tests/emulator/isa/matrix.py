"""Warp-level matrices: mma.sync, ldmatrix, stmatrix (PTX ISA 9.7.14)."""

from __future__ import annotations

import numpy as np

from tests.emulator import fragments
from tests.emulator.errors import Fault
from tests.emulator.isa.addresses import SHARED, evaluate
from tests.emulator.isa.decoder import TYPES, Decoder, instruction
from tests.emulator.machine.access import actor, read_shared, write_shared
from tests.emulator.machine.registers import FULL, bits_of
from tests.emulator.machine.shared_memory import OFFSET
from tests.emulator.machine.signals import Outcome, Signal, Step
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Immediate, Operand

_SHAPES = ("m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m16n8k64")
_VECTORS = {"scale_vec::1X": 1, "scale_vec::2X": 2, "scale_vec::4X": 4}
_ELEMENTS = ("f16", "bf16", "tf32", "e4m3", "e5m2", "e2m1", "e2m3", "e3m2", "s8", "u8", "s32",
             "f32", "ue4m3", "ue8m0")  # fmt: skip


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
    options = _scaled(decoder, kind, vector, types) if scaled else None
    scale_slots = [decoder.source(i, 32) for i in (4, 6)] if scaled else []

    def step(warp: Warp) -> Outcome:
        if warp.mask != warp.live:
            return Signal.PARK
        for slots, name in zip([*sources, scale_slots], ("A", "B", "C", "scales"), strict=True):
            for slot in slots:
                warp.require(slot, f"a register of {name}")
        a, b, c = (np.stack([warp.r[slot] for slot in slots]) for slots in sources)
        if options is None:
            result = fragments.mma(shape, a, b, c.view(dtype), types[1], types[2])
        else:
            scales = [warp.r[slot] for slot in scale_slots]
            result = fragments.mma_block_scale(a, b, c.view(dtype), *scales, options)
        for index, slot in enumerate(targets):
            warp.put(slot, np.ascontiguousarray(result[index]).view(np.uint32), FULL)
        return None

    return step


def _scaled(decoder: Decoder, kind: str, vector: int, types: list[str]) -> fragments.BlockScale:
    """Selectors ``{byte-id, thread-id}`` of the scales: immediates."""
    a_byte, a_thread = _selector(decoder, decoder.operands[5])
    b_byte, b_thread = _selector(decoder, decoder.operands[7])
    return fragments.BlockScale(
        kind, vector, types[1], types[2], types[4], a_byte, a_thread, b_byte, b_thread
    )


def _selector(decoder: Decoder, operand: Operand) -> tuple[int, int]:
    items = decoder.items(operand)
    values = [item.value for item in items if isinstance(item, Immediate)]
    if len(values) != 2:
        raise decoder.refuse("a scale selector that is not two numbers")
    return values[0], values[1]


def _move(decoder: Decoder) -> tuple[int, bool]:
    for name in ("sync", "aligned"):
        decoder.flag(name)
    if not decoder.flag("m8n8"):
        raise decoder.refuse("another shape than .m8n8")
    count = int(decoder.choice(("x1", "x2", "x4"), "x1")[1:])
    trans = decoder.flag("trans")
    decoder.choice(SHARED)
    if TYPES[decoder.type("b16")] != 16:
        raise decoder.refuse("another type than .b16")
    return count, trans


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
    count, trans = _move(decoder)
    decoder.count(2)
    targets = [decoder.destination(item, 32) for item in decoder.items(0)]
    addresses, line = evaluate(decoder, 1), decoder.line
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
    count, trans = _move(decoder)
    decoder.count(2)
    sources = [decoder.source(item, 32) for item in decoder.items(1)]
    addresses, line = evaluate(decoder, 0), decoder.line
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
