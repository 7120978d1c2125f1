"""atom and red on global and shared memory (PTX ISA 9.7.13.6, 9.7.13.7)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator import formats
from tests.emulator.isa.addresses import SHARED, evaluate, load, locate, space_of, store
from tests.emulator.isa.decoder import TYPES, Decoder, instruction
from tests.emulator.isa.memory import SCOPES, hints, observed, published
from tests.emulator.machine.registers import DTYPES, FULL
from tests.emulator.machine.signals import Step
from tests.emulator.machine.warp import Warp

_OPERATIONS = ("and", "or", "xor", "exch", "cas", "add", "inc", "dec", "min", "max")
Update = Callable[..., int]


def _integers(operation: str, type_: str) -> Update:
    bits = TYPES[type_]
    mask = (1 << bits) - 1
    signed = type_.startswith("s")

    def number(raw: int) -> int:
        return raw - (1 << bits) if signed and raw >> bits - 1 else raw

    table: dict[str, Update] = {
        "and": lambda old, b: old & b,
        "or": lambda old, b: old | b,
        "xor": lambda old, b: old ^ b,
        "exch": lambda old, b: b,
        "cas": lambda old, b, c: c if old == b else old,
        "add": lambda old, b: (old + b) & mask,
        "inc": lambda old, b: 0 if old >= b else old + 1,
        "dec": lambda old, b: b if old == 0 or old > b else old - 1,
        "min": lambda old, b: old if number(old) <= number(b) else b,
        "max": lambda old, b: old if number(old) >= number(b) else b,
    }
    return table[operation]


def _floats(decoder: Decoder, operation: str, type_: str) -> Update:
    """add of floats, of f32 and f64 alone: which order lanes add in is the hardware's choice."""
    if operation != "add" or type_ not in ("f32", "f64"):
        raise decoder.refuse(f"{operation} of {type_}")
    dtype: Any = np.float32 if type_ == "f32" else np.float64
    raw: Any = np.uint32 if type_ == "f32" else np.uint64

    def add(old: int, b: int) -> int:
        total = raw(old).view(dtype) + raw(b).view(dtype)
        if type_ == "f32":
            total = formats.canonical_f32(np.array([total], np.float32))[0]
        return int(total.view(raw))

    return add


@instruction("atom", "red")
def _atom(decoder: Decoder) -> Step:
    kind = decoder.choice(("relaxed", "acquire", "release", "acq_rel"), "relaxed")
    decoder.choice(SCOPES)
    policy = hints(decoder)
    returns = decoder.opcode == "atom"
    space = space_of(decoder, 1 if returns else 0, decoder.choice(("global", *SHARED)))
    operation = decoder.choice(_OPERATIONS)
    if not operation:
        raise decoder.refuse("this operation")
    decoder.flag("noftz")
    type_ = decoder.type()
    bits = TYPES[type_]
    if type_.startswith("b") and operation not in ("and", "or", "xor", "exch", "cas"):
        raise decoder.refuse(f"{operation} of {type_}, which has no arithmetic,")
    wanted = (2 if operation == "cas" else 1) + returns + 1
    decoder.count(wanted + policy)
    update = (
        _floats(decoder, operation, type_)
        if type_ in ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64")
        else _integers(operation, type_)
    )
    destination = decoder.destination(0, bits) if returns else None
    first = 2 if returns else 1
    slots = [decoder.source(i, bits) for i in range(first, wanted)]
    addresses, line = evaluate(decoder, first - 1), decoder.line
    part = DTYPES[bits]

    def step(warp: Warp) -> None:
        for slot in slots:
            warp.require(slot, "an operand of an atomic")
        old = np.zeros(32, part)
        for place, lanes in locate(warp, space, addresses(warp)):
            old[lanes] = _serially(warp, place, lanes, slots, update, part, line)
            if returns:
                observed(warp, kind, place)
            published(warp, kind, place)
        if destination is not None:
            warp.put(destination, old, FULL)
        warp.cta.cluster.event()

    return step


def _serially(
    warp: Warp,
    place: Any,
    lanes: np.ndarray,
    slots: list[int],
    update: Update,
    part: Any,
    line: int,
) -> np.ndarray:
    """Lane after lane, so that lanes may name the same place; the values they found."""
    size = np.dtype(part).itemsize
    data, defined = load(warp, place, size, line, atomic=True)
    if not defined.all():
        warp.require_memory("an atomic operation on memory")
    current: dict[int, int] = {}
    values = np.ascontiguousarray(data).view(part)[:, 0].tolist()
    found, after = [], []
    for index, (address, lane) in enumerate(
        zip(place.addresses.tolist(), lanes.tolist(), strict=True)
    ):
        old = current.get(address, values[index])
        found.append(old)
        current[address] = update(old, *(int(warp.r[slot][lane]) for slot in slots))
    after = [current[address] for address in place.addresses.tolist()]
    raw = np.array(after, part).view(np.uint8).reshape(len(lanes), size)
    store(warp, place, raw, np.ones(raw.shape, bool), line, atomic=True)
    return np.array(found, part)
