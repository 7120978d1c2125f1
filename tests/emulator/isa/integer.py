"""Integer arithmetic (PTX ISA 9.7.1) and logic (9.7.8)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulator.isa import alu
from tests.emulator.isa.decoder import TYPES, Decoder, instruction
from tests.emulator.machine.registers import DTYPES
from tests.emulator.machine.signals import Step
from tests.emulator.machine.warp import Warp

SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
FLOATS = frozenset({"f16", "f16x2", "bf16", "bf16x2", "f32", "f64", "f32x2"})


def is_float(decoder: Decoder) -> bool:
    """Whether the instruction has a floating-point type."""
    return bool(FLOATS.intersection(decoder.left))


def dtype_of(type_: str) -> Any:
    """The numpy type of an integer type of PTX."""
    bits = TYPES[type_]
    return SIGNED[bits] if type_.startswith("s") else DTYPES[bits]


def simple(decoder: Decoder, function: alu.Function, type_: str, sources: int) -> Step:
    """An operation on numbers of one type."""
    decoder.count(sources + 1)
    bits = TYPES[type_]
    raw = alu.viewed(function, dtype_of(type_), DTYPES[bits])
    slots = [decoder.source(1 + i, bits) for i in range(sources)]
    return alu.compute(raw, decoder.destination(0, bits), slots)


def halves(function: alu.Function, dtype: Any) -> alu.Function:
    """An operation on pairs of 16-bit numbers in 32 bits."""

    def raw(*values: np.ndarray) -> np.ndarray:
        return function(*(value.view(dtype) for value in values)).view(np.uint32)

    return raw


def add_or_sub(decoder: Decoder) -> Step:
    """add, sub: modulo 2^n; .sat clamps, of .s32 only."""
    function = np.add if decoder.opcode == "add" else np.subtract
    type_ = decoder.type(*INTEGERS, "u16x2", "s16x2")
    if decoder.flag("sat"):
        if type_ != "s32":
            raise decoder.refuse(".sat")
        return simple(decoder, _saturating(function), type_, 2)
    if type_ in ("u16x2", "s16x2"):
        decoder.count(3)
        slots = [decoder.source(i, 32) for i in (1, 2)]
        return alu.compute(halves(function, np.uint16), decoder.destination(0, 32), slots)
    return simple(decoder, function, type_, 2)


def _saturating(function: Any) -> alu.Function:
    def clamped(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        exact = function(a.astype(np.int64), b.astype(np.int64))
        return np.clip(exact, -(2**31), 2**31 - 1).astype(np.int32)

    return clamped


def min_or_max(decoder: Decoder) -> Step:
    """min, max of integers."""
    function = np.minimum if decoder.opcode == "min" else np.maximum
    type_ = decoder.type(*INTEGERS, "u16x2", "s16x2")
    if type_ in ("u16x2", "s16x2"):
        decoder.count(3)
        dtype = np.uint16 if type_ == "u16x2" else np.int16
        slots = [decoder.source(i, 32) for i in (1, 2)]
        return alu.compute(halves(function, dtype), decoder.destination(0, 32), slots)
    return simple(decoder, function, type_, 2)


def neg(decoder: Decoder) -> Step:
    """-a."""
    return simple(decoder, np.negative, decoder.type("s16", "s32", "s64"), 1)


def absolute(decoder: Decoder) -> Step:
    """|a|; the most negative number stays itself."""
    return simple(decoder, np.abs, decoder.type("s16", "s32", "s64"), 1)


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Upper half of a product."""
    bits = a.dtype.itemsize * 8
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    exact = [int(x) * int(y) >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return np.array([value & (2**64 - 1) for value in exact], np.uint64).view(a.dtype)


def _low24(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    shift = a.dtype.type(8)
    low = ((a << shift) >> shift).astype(np.int64) * ((b << shift) >> shift).astype(np.int64)
    return low.astype(a.dtype)


_PRODUCTS: dict[str, alu.Function] = {"lo": np.multiply, "hi": _high}


def mul(decoder: Decoder) -> Step:
    """mul.lo, .hi, .wide and mad.lo, .hi, .wide; mul24.lo, mad24.lo."""
    add = decoder.opcode.startswith("mad")
    if decoder.opcode.endswith("24"):
        if not decoder.flag("lo"):
            raise decoder.refuse(".hi")
        type_ = decoder.type("u32", "s32")
        product: alu.Function = _low24
    elif decoder.flag("wide"):
        return _wide(decoder, add)
    else:
        part = decoder.choice(("lo", "hi"))
        if not part:
            raise decoder.refuse("neither .lo nor .hi")
        type_, product = decoder.type(*INTEGERS), _PRODUCTS[part]
    if not add:
        return simple(decoder, product, type_, 2)
    return simple(decoder, lambda a, b, c: product(a, b) + c, type_, 3)


def _wide(decoder: Decoder, add: bool) -> Step:
    type_ = decoder.type("u16", "s16", "u32", "s32")
    bits = TYPES[type_]
    narrow = dtype_of(type_)
    wide = SIGNED[2 * bits] if type_.startswith("s") else DTYPES[2 * bits]
    result = DTYPES[2 * bits]

    def product(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        value = (a.view(narrow).astype(wide) * b.view(narrow).astype(wide)).view(result)
        return value + c[0] if c else value

    decoder.count(4 if add else 3)
    slots = [decoder.source(i, bits) for i in (1, 2)]
    if add:
        slots.append(decoder.source(3, 2 * bits))
    return alu.compute(product, decoder.destination(0, 2 * bits), slots)


instruction("mul24", "mad24")(mul)


def _truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Division toward zero; by zero gives all ones, as devices do (PTX: unspecified)."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        return np.where(zero, ~a.dtype.type(0), a // safe)
    quotient = a // safe
    remainder = a - quotient * safe
    quotient = quotient + ((remainder != 0) & ((a < 0) != (safe < 0)))
    return np.where(zero, a.dtype.type(-1), quotient.astype(a.dtype))


def div(decoder: Decoder) -> Step:
    """Integer division toward zero."""
    return simple(decoder, _truncated, decoder.type(*INTEGERS), 2)


@instruction("rem")
def _rem(decoder: Decoder) -> Step:
    return simple(decoder, lambda a, b: a - _truncated(a, b) * b, decoder.type(*INTEGERS), 2)


@instruction("sad")
def _sad(decoder: Decoder) -> Step:
    def distance(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        return c + np.where(a < b, b - a, a - b)

    return simple(decoder, distance, decoder.type(*INTEGERS), 3)


# Logic --------------------------------------------------

_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


@instruction("and", "or", "xor")
def _logic(decoder: Decoder) -> Step:
    type_ = decoder.type("b16", "b32", "b64", "pred")
    decoder.count(3)
    if type_ == "pred":
        return _logic_of_predicates(decoder)
    bits = TYPES[type_]
    slots = [decoder.source(i, bits) for i in (1, 2)]
    return alu.compute(_LOGIC[decoder.opcode], decoder.destination(0, bits), slots)


def _logic_of_predicates(decoder: Decoder) -> Step:
    (a, not_a), (b, not_b) = decoder.predicate(1), decoder.predicate(2)
    destination, opcode = decoder.destination(0, 1), decoder.opcode

    def step(warp: Warp) -> None:
        x = ~warp.r[a] if not_a else warp.r[a]
        y = ~warp.r[b] if not_b else warp.r[b]
        value = x & y if opcode == "and" else x | y if opcode == "or" else x ^ y
        dx, dy = warp.d[a], warp.d[b]
        defined = dx & dy
        if opcode == "and":  # a known False decides
            defined |= dx & ~x | dy & ~y
        elif opcode == "or":  # and a known True
            defined |= dx & x | dy & y
        warp.put_predicate(destination, value, defined)

    return step


@instruction("not", "cnot")
def _not(decoder: Decoder) -> Step:
    type_ = decoder.type("b16", "b32", "b64", "pred")
    decoder.count(2)
    if type_ == "pred":
        slot, negated = decoder.predicate(1)
        destination = decoder.destination(0, 1)

        def flip(warp: Warp) -> None:
            value = warp.r[slot] if negated else ~warp.r[slot]
            warp.put_predicate(destination, value, warp.d[slot])

        return flip
    bits = TYPES[type_]

    def is_zero(a: np.ndarray) -> np.ndarray:
        return (a == 0).astype(a.dtype)

    function = np.invert if decoder.opcode == "not" else is_zero
    return alu.compute(function, decoder.destination(0, bits), [decoder.source(1, bits)])


@instruction("shl", "shr")
def _shift(decoder: Decoder) -> Step:
    """Shifts clamp: by the width or more they leave 0, or the sign."""
    left = decoder.opcode == "shl"
    signed = ("s16", "s32", "s64")
    type_ = decoder.type("b16", "b32", "b64", *(() if left else ("u16", "u32", "u64", *signed)))
    bits = TYPES[type_]
    dtype = dtype_of(type_)

    def shift(a: np.ndarray, by: np.ndarray) -> np.ndarray:
        x = a.view(dtype)
        most = bits - 1
        n = np.minimum(by, np.uint32(most)).astype(dtype)
        value = x << n if left else x >> n
        if left or dtype in DTYPES.values():
            value = np.where(by > most, dtype(0), value)
        return value.view(DTYPES[bits])

    decoder.count(3)
    slots = [decoder.source(1, bits), decoder.source(2, 32)]
    return alu.compute(shift, decoder.destination(0, bits), slots)
