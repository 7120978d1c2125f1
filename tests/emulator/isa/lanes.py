"""Instructions between the lanes of a warp: shfl, vote, match, redux, elect, bar.warp, activemask.

Each waits until the lanes of its member mask are together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.emulator.arithmetic import minmax_f32
from tests.emulator.errors import Fault
from tests.emulator.formats import canonical_f32
from tests.emulator.isa.decoder import TYPES, Decoder, instruction
from tests.emulator.isa.integer import dtype_of
from tests.emulator.machine.registers import FULL, LANES, bits_of, lanes_of, uniform
from tests.emulator.machine.signals import Outcome, Signal, Step
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Operand, Pair


def together(body: Callable[[Warp, int], Outcome], mask_slot: int) -> Step:
    """The step once the live lanes of the member mask are here; the mask must name them."""

    def step(warp: Warp) -> Outcome:
        warp.require(mask_slot, "the member mask")
        masks = warp.r[mask_slot][warp.lanes]
        members = int(masks[0])
        if (masks != masks[0]).any():
            raise Fault("member mask", "lanes name different member masks")
        if warp.mask & ~members:
            raise Fault("member mask", f"an executing lane is not in mask {members:#010x}")
        if warp.live & members & ~warp.mask:
            return Signal.GATHER
        return body(warp, members)

    return step


def _results(decoder: Decoder, operand: Operand, bits: int) -> tuple[int, int | None]:
    """Slots of ``d`` or ``d|p``."""
    if isinstance(operand, Pair):
        return decoder.destination(operand.first, bits), decoder.destination(operand.second, 1)
    return decoder.destination(operand, bits), None


_NO_MASK = "forms without .sync, which no current architecture has"


def _mode(decoder: Decoder, names: Sequence[str]) -> str:
    """The modifier that says what to do, which PTX requires."""
    mode = decoder.choice(names)
    if not mode:
        raise decoder.refuse(f"a form without one of .{', .'.join(names)}")
    return mode


@instruction("shfl")
def _shfl(decoder: Decoder) -> Step:
    if not decoder.flag("sync"):
        raise decoder.refuse(_NO_MASK)
    mode = _mode(decoder, ("up", "down", "bfly", "idx"))
    decoder.type("b32", "u32", "f32", "s32")
    decoder.count(5)
    destination, predicate = _results(decoder, decoder.operands[0], 32)
    value, lane, clamp = (decoder.source(i, 32) for i in (1, 2, 3))

    def body(warp: Warp, members: int) -> Outcome:
        warp.require(lane, "the lane of a shuffle")
        warp.require(clamp, "the clamp operand of a shuffle")
        b = (warp.r[lane] & 31).astype(np.int64)
        c = warp.r[clamp]
        segment = (c >> 8 & 31).astype(np.int64)
        most = (LANES & segment) | (c & 31 & ~segment)
        least = LANES & segment
        here = LANES.astype(np.int64)
        if mode == "up":
            source, valid = here - b, here - b >= most
        elif mode == "down":
            source, valid = here + b, here + b <= most
        elif mode == "bfly":
            source, valid = here ^ b, (here ^ b) <= most
        else:
            source = least | (b & ~segment)
            valid = source <= most
        source = np.where(valid, source, here)
        inactive = warp.lanes & ~lanes_of(warp.mask)[source]
        if inactive.any():
            raise Fault("shuffle", f"lane {int(inactive.argmax())} reads a lane that is not here")
        defined = bits_of(lanes_of(warp.d[value] & FULL)[source])
        warp.put(destination, warp.r[value][source], defined)
        if predicate is not None:
            warp.put_predicate(predicate, bits_of(valid), FULL)
        return None

    return together(body, decoder.source(4, 32))


@instruction("vote")
def _vote(decoder: Decoder) -> Step:
    if not decoder.flag("sync"):
        raise decoder.refuse(_NO_MASK)
    mode = _mode(decoder, ("all", "any", "uni", "ballot"))
    type_ = decoder.type("b32" if mode == "ballot" else "pred")
    decoder.count(3)
    slot, negated = decoder.predicate(1)
    destination = decoder.destination(0, TYPES[type_])

    def body(warp: Warp, members: int) -> Outcome:
        warp.require(slot, "the predicate of a vote")
        value = (~warp.r[slot] if negated else warp.r[slot]) & warp.mask
        if mode == "ballot":
            warp.put(destination, uniform(value, 32), FULL)
            return None
        true = {"all": value == warp.mask, "any": value != 0, "uni": value in (0, warp.mask)}[mode]
        warp.put_predicate(destination, FULL if true else 0, FULL)
        return None

    return together(body, decoder.source(2, 32))


@instruction("activemask")
def _activemask(decoder: Decoder) -> Step:
    decoder.type("b32")
    destination = decoder.destination(0, 32)
    return lambda warp: warp.put(destination, uniform(warp.mask, 32), FULL)


@instruction("elect")
def _elect(decoder: Decoder) -> Step:
    """The lowest lane: which one is elected is the hardware's choice, but always the same."""
    if not decoder.flag("sync"):
        raise decoder.refuse("this form")
    decoder.count(2)
    target = decoder.operands[0]
    if not isinstance(target, Pair):
        raise decoder.refuse("a form without a predicate")
    destination = decoder.destination(target.first, 32)
    predicate = decoder.destination(target.second, 1)

    def body(warp: Warp, members: int) -> Outcome:
        leader = warp.mask & -warp.mask
        warp.put(destination, uniform(leader.bit_length() - 1, 32), FULL)
        warp.put_predicate(predicate, leader, FULL)
        return None

    return together(body, decoder.source(1, 32))


_REDUCE: dict[str, Any] = {
    "add": np.add.reduce, "min": np.minimum.reduce, "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce, "xor": np.bitwise_xor.reduce,
}  # fmt: skip


@instruction("redux")
def _redux(decoder: Decoder) -> Step:
    if not decoder.flag("sync"):
        raise decoder.refuse("this form")
    operation = decoder.choice(_REDUCE)
    absolute, nan = decoder.flag("abs"), decoder.flag("NaN")
    type_ = decoder.type("b32", "u32", "s32", "f32")
    kinds = {"add": "us", "min": "usf", "max": "usf"}.get(operation, "b")
    if not operation or type_[0] not in kinds:
        raise decoder.refuse(f"{operation or 'no operation'} of {type_}")
    if type_ != "f32" and (absolute or nan):
        raise decoder.refuse(f".abs or .NaN of {type_}")
    decoder.count(3)
    destination, source = decoder.destination(0, 32), decoder.source(1, 32)

    def body(warp: Warp, members: int) -> Outcome:
        values = warp.r[source][warp.lanes]
        if type_ == "f32":
            numbers = values.view(np.float32)
            numbers = np.abs(numbers) if absolute else numbers
            result = numbers[:1]
            for other in numbers[1:]:
                result = minmax_f32(operation, result, other[None], nan=nan)
            raw = int(canonical_f32(result).view(np.uint32)[0])
        else:
            raw = int(_REDUCE[operation](values.view(dtype_of(type_)))) & FULL
        known = FULL if not warp.mask & ~warp.d[source] else 0
        warp.put(destination, uniform(raw, 32), known)
        return None

    return together(body, decoder.source(2, 32))


@instruction("match")
def _match(decoder: Decoder) -> Step:
    if not decoder.flag("sync"):
        raise decoder.refuse("this form")
    mode = _mode(decoder, ("any", "all"))
    bits = TYPES[decoder.type("b32", "b64")]
    decoder.count(3)
    destination, predicate = _results(decoder, decoder.operands[0], 32)
    source = decoder.source(1, bits)

    def body(warp: Warp, members: int) -> Outcome:
        warp.require(source, "the operand of match")
        values, lanes = warp.r[source], warp.lanes
        if mode == "any":
            same = (values[:, None] == values[None, :]) & lanes[None, :]
            masks = (same.astype(np.uint64) << LANES.astype(np.uint64)).sum(1)
            warp.put(destination, masks.astype(np.uint32), FULL)
            return None
        equal = bool((values[lanes] == values[lanes][0]).all())
        warp.put(destination, uniform(warp.mask if equal else 0, 32), FULL)
        if predicate is not None:
            warp.put_predicate(predicate, FULL if equal else 0, FULL)
        return None

    return together(body, decoder.source(2, 32))
