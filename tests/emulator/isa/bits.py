"""Bit fields and bytes: prmt, lop3, shf, bfe, bfi, bfind, popc, clz, brev, bmsk, szext, dp4a."""

from __future__ import annotations

import numpy as np

from tests.emulator.isa import alu
from tests.emulator.isa.decoder import TYPES, Decoder, instruction
from tests.emulator.isa.integer import SIGNED
from tests.emulator.machine.registers import DTYPES
from tests.emulator.machine.signals import Step
from tests.emulator.ptx.syntax import Immediate

U32, U64 = np.uint32, np.uint64


@instruction("prmt")
def _prmt(decoder: Decoder) -> Step:
    decoder.type("b32")
    mode = decoder.choice(("f4e", "b4e", "rc8", "ecl", "ecr", "rc16"))
    if mode:
        raise decoder.refuse(f"mode .{mode}")
    decoder.count(4)

    def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        source = a.astype(U64) | b.astype(U64) << U64(32)
        result = np.zeros(32, U32)
        for index in range(4):
            nibble = (selector >> U32(4 * index)) & U32(0xF)
            byte = (source >> ((nibble & U32(7)).astype(U64) * U64(8)) & U64(0xFF)).astype(U32)
            sign = np.where(byte & U32(0x80), U32(0xFF), U32(0))
            result |= np.where(nibble & U32(8), sign, byte) << U32(8 * index)
        return result

    slots = [decoder.source(i, 32) for i in (1, 2, 3)]
    return alu.compute(permute, decoder.destination(0, 32), slots)


def _wraps(decoder: Decoder) -> bool:
    """Whether counts wrap or are clamped: PTX requires one of the two."""
    mode = decoder.choice(("wrap", "clamp"))
    if not mode:
        raise decoder.refuse("a form without .wrap or .clamp")
    return mode == "wrap"


@instruction("lop3")
def _lop3(decoder: Decoder) -> Step:
    decoder.type("b32")
    decoder.count(5)
    table = decoder.operands[4]
    if not isinstance(table, Immediate):
        raise decoder.refuse("a table that is no number")
    if not 0 <= table.value <= 0xFF:
        raise decoder.refuse(f"a table of {table.value:#x}")
    wanted = [bits for bits in range(8) if table.value >> bits & 1]

    def logic(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        result = np.zeros(32, U32)
        for bits in wanted:
            term = a if bits & 4 else ~a
            term = term & (b if bits & 2 else ~b)
            result |= term & (c if bits & 1 else ~c)
        return result

    slots = [decoder.source(i, 32) for i in (1, 2, 3)]
    return alu.compute(logic, decoder.destination(0, 32), slots)


@instruction("shf")
def _shf(decoder: Decoder) -> Step:
    direction = decoder.choice(("l", "r"))
    if not direction:
        raise decoder.refuse("a form without a direction")
    left, wrap = direction == "l", _wraps(decoder)
    decoder.type("b32")
    decoder.count(4)

    def funnel(low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
        n = (by & U32(31) if wrap else np.minimum(by, U32(32))).astype(U64)
        both = high.astype(U64) << U64(32) | low.astype(U64)
        if left:
            return ((both << n) >> U64(32)).astype(U32) if wrap else _left(both, n, low)
        return (both >> n).astype(U32)

    slots = [decoder.source(i, 32) for i in (1, 2, 3)]
    return alu.compute(funnel, decoder.destination(0, 32), slots)


def _left(both: np.ndarray, n: np.ndarray, low: np.ndarray) -> np.ndarray:
    return np.where(n == 32, low, ((both << n) >> U64(32)).astype(U32))


@instruction("bfe")
def _bfe(decoder: Decoder) -> Step:
    type_ = decoder.type("u32", "s32", "u64", "s64")
    bits = TYPES[type_]
    signed = type_.startswith("s")
    decoder.count(4)

    def extract(raw: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
        values = []
        for x, at, count in zip(raw.tolist(), start.tolist(), length.tolist(), strict=True):
            at, count = at & 0xFF, count & 0xFF
            sign = x >> min(at + count - 1, bits - 1) & 1 if signed and count else 0
            field = x >> at & (1 << count) - 1
            have = max(min(count, bits - at), 0)
            if sign:
                field |= (1 << bits) - 1 & ~((1 << have) - 1)
            values.append(field & (1 << bits) - 1)
        return np.array(values, DTYPES[bits])

    slots = [decoder.source(1, bits), decoder.source(2, 32), decoder.source(3, 32)]
    return alu.compute(extract, decoder.destination(0, bits), slots)


@instruction("bfi")
def _bfi(decoder: Decoder) -> Step:
    bits = TYPES[decoder.type("b32", "b64")]
    decoder.count(5)

    def insert(
        field: np.ndarray, base: np.ndarray, start: np.ndarray, length: np.ndarray
    ) -> np.ndarray:
        values = []
        for f, b, at, count in zip(
            *(v.tolist() for v in (field, base, start, length)), strict=True
        ):
            mask = (((1 << (count & 0xFF)) - 1) << (at & 0xFF)) & (1 << bits) - 1
            values.append(b & ~mask | (f << (at & 0xFF)) & mask)
        return np.array(values, DTYPES[bits])

    slots = [decoder.source(i, bits) for i in (1, 2)] + [decoder.source(i, 32) for i in (3, 4)]
    return alu.compute(insert, decoder.destination(0, bits), slots)


@instruction("bfind")
def _bfind(decoder: Decoder) -> Step:
    shift = decoder.flag("shiftamt")
    type_ = decoder.type("u32", "s32", "u64", "s64")
    bits = TYPES[type_]
    decoder.count(2)

    def find(raw: np.ndarray) -> np.ndarray:
        values = []
        for x in raw.tolist():
            y = ~x & (1 << bits) - 1 if type_.startswith("s") and x >> bits - 1 else x
            at = y.bit_length() - 1
            values.append(0xFFFFFFFF if at < 0 else bits - 1 - at if shift else at)
        return np.array(values, U32)

    return alu.compute(find, decoder.destination(0, 32), [decoder.source(1, bits)])


@instruction("popc", "clz")
def _count(decoder: Decoder) -> Step:
    bits = TYPES[decoder.type("b32", "b64")]
    decoder.count(2)
    population = decoder.opcode == "popc"

    def count(raw: np.ndarray) -> np.ndarray:
        if population:
            return np.bitwise_count(raw).astype(U32)
        return np.array([bits - x.bit_length() for x in raw.tolist()], U32)

    return alu.compute(count, decoder.destination(0, 32), [decoder.source(1, bits)])


@instruction("brev")
def _brev(decoder: Decoder) -> Step:
    bits = TYPES[decoder.type("b32", "b64")]
    decoder.count(2)

    def reverse(raw: np.ndarray) -> np.ndarray:
        return np.array([int(f"{x:0{bits}b}"[::-1], 2) for x in raw.tolist()], DTYPES[bits])

    return alu.compute(reverse, decoder.destination(0, bits), [decoder.source(1, bits)])


@instruction("bmsk")
def _bmsk(decoder: Decoder) -> Step:
    wrap = _wraps(decoder)
    decoder.type("b32")
    decoder.count(3)

    def mask(start: np.ndarray, width: np.ndarray) -> np.ndarray:
        values = []
        for at, count in zip(start.tolist(), width.tolist(), strict=True):
            at, count = (at & 31, count & 31) if wrap else (min(at, 32), min(count, 32))
            values.append(((1 << count) - 1) << at & 0xFFFFFFFF)
        return np.array(values, U32)

    slots = [decoder.source(i, 32) for i in (1, 2)]
    return alu.compute(mask, decoder.destination(0, 32), slots)


@instruction("szext")
def _szext(decoder: Decoder) -> Step:
    wrap = _wraps(decoder)
    signed = decoder.type("u32", "s32") == "s32"
    decoder.count(3)

    def extend(value: np.ndarray, width: np.ndarray) -> np.ndarray:
        values = []
        for x, n in zip(value.tolist(), width.tolist(), strict=True):
            n = n & 31 if wrap else min(n, 32)
            low = x & (1 << n) - 1
            if signed and n and low >> n - 1:
                low |= 0xFFFFFFFF & ~((1 << n) - 1)
            values.append(low)
        return np.array(values, U32)

    slots = [decoder.source(i, 32) for i in (1, 2)]
    return alu.compute(extend, decoder.destination(0, 32), slots)


@instruction("dp4a")
def _dp4a(decoder: Decoder) -> Step:
    types = decoder.types()
    if len(types) != 2 or not set(types) <= {"u32", "s32"}:
        raise decoder.refuse(f"types {types}")
    decoder.count(4)
    kinds = [SIGNED[8] if t == "s32" else DTYPES[8] for t in types]

    def dot(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        x, y = (
            np.ascontiguousarray(v).view(kind).reshape(32, 4).astype(np.int64)
            for v, kind in zip((a, b), kinds, strict=True)
        )
        return c + (x * y).sum(1).astype(np.uint64).astype(U32)

    slots = [decoder.source(i, 32) for i in (1, 2, 3)]
    return alu.compute(dot, decoder.destination(0, 32), slots)
