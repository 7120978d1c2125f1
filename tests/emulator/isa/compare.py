"""setp, set and slct (PTX ISA 9.7.6)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulator import formats
from tests.emulator.isa import alu
from tests.emulator.isa.decoder import TYPES, Decoder, instruction
from tests.emulator.isa.integer import dtype_of
from tests.emulator.machine.registers import DTYPES, bits_of
from tests.emulator.machine.signals import Step
from tests.emulator.machine.warp import Warp
from tests.emulator.ptx.syntax import Operand, Pair

_ORDERED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_UNORDERED = {f"{name}u": name for name in ("eq", "ne", "lt", "le", "gt", "ge")}
_FLOATS: dict[str, Any] = {"f32": np.float32, "f64": np.float64, "f16": np.float16}
_TYPES = frozenset(f"{kind}{bits}" for kind in "bus" for bits in (16, 32, 64))
_COMBINE = ("and", "or", "xor")


def _relation(decoder: Decoder, type_: str) -> alu.Function:
    """The comparison as a function of raw bits."""
    name = decoder.choice([*_ORDERED, *_UNSIGNED, *_UNORDERED, "num", "nan"])
    if not name:
        raise decoder.refuse("no comparison")
    if name in _UNSIGNED and not type_.startswith("u"):
        raise decoder.refuse(f"comparison {name} of {type_}")
    if type_ in _FLOATS or type_ == "bf16":
        return _of_floats(name, type_)
    if type_ not in _TYPES:
        raise decoder.refuse(f"type .{type_}")
    if name in _UNSIGNED:
        name = _UNSIGNED[name]
    if name not in _ORDERED:
        raise decoder.refuse(f"comparison {name} of {type_}")
    if type_.startswith("b") and name not in ("eq", "ne"):
        raise decoder.refuse(f"comparison {name} of {type_}")
    function, dtype = _ORDERED[name], dtype_of(type_)
    return lambda a, b: function(a.view(dtype), b.view(dtype))


def _of_floats(name: str, type_: str) -> alu.Function:
    unordered = name in _UNORDERED
    base = _UNORDERED.get(name, name)

    def number(raw: np.ndarray) -> np.ndarray:
        return formats.bf16_to_f32(raw) if type_ == "bf16" else raw.view(_FLOATS[type_])

    def relation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, y = number(a), number(b)
        nan = np.isnan(x) | np.isnan(y)
        if base in ("num", "nan"):
            return nan if base == "nan" else ~nan
        # numpy's != is true of NaN, PTX's `ne` is not.
        value = _ORDERED[base](x, y)
        return value | nan if unordered else value & ~nan

    return relation


def _flush(decoder: Decoder, relation: alu.Function, type_: str) -> alu.Function:
    if not decoder.flag("ftz"):
        return relation
    if type_ not in ("f32", "f16"):
        raise decoder.refuse(f".ftz of {type_}")

    def flushed(raw: np.ndarray) -> np.ndarray:
        if type_ == "f16":
            return np.where(raw & np.uint16(0x7C00), raw, raw & np.uint16(0x8000))
        return formats.flush(raw.view(np.float32)).view(np.uint32)

    return lambda a, b: relation(flushed(a), flushed(b))


@instruction("setp")
def _setp(decoder: Decoder) -> Step:
    combine = decoder.choice(_COMBINE)
    type_ = decoder.type()
    relation = _flush(decoder, _relation(decoder, type_), type_)
    bits = TYPES[type_]
    decoder.count(4 if combine else 3)
    target: Operand = decoder.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    destination = decoder.destination(first, 1)
    a, b = decoder.source(1, bits), decoder.source(2, bits)
    if not combine and second is None:
        return alu.compare(relation, destination, [a, b])
    other = None if second is None else decoder.destination(second, 1)
    slot, negated = decoder.predicate(3) if combine else (-1, False)

    def step(warp: Warp) -> None:
        value = bits_of(relation(warp.r[a], warp.r[b]))
        defined = warp.d[a] & warp.d[b]
        results = (value, ~value)
        if combine:
            c = ~warp.r[slot] if negated else warp.r[slot]
            defined &= warp.d[slot]
            results = tuple(_combined(combine, each, c) for each in results)  # type: ignore[assignment]
        warp.put_predicate(destination, results[0], defined)
        if other is not None:
            warp.put_predicate(other, results[1], defined)

    return step


def _combined(how: str, a: int, b: int) -> int:
    return a & b if how == "and" else a | b if how == "or" else a ^ b


@instruction("set")
def _set(decoder: Decoder) -> Step:
    """All ones or 1.0 where the relation holds."""
    types = decoder.types()
    if len(types) != 2 or types[0] not in ("u32", "s32", "f32"):
        raise decoder.refuse(f"types {types}")
    relation = _flush(decoder, _relation(decoder, types[1]), types[1])
    decoder.count(3)
    bits = TYPES[types[1]]
    true = np.uint32(0x3F800000 if types[0] == "f32" else 0xFFFFFFFF)

    def value(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(relation(a, b), true, np.uint32(0))

    slots = [decoder.source(1, bits), decoder.source(2, bits)]
    return alu.compute(value, decoder.destination(0, 32), slots)


@instruction("slct")
def _slct(decoder: Decoder) -> Step:
    """``c >= 0 ? a : b``."""
    types = decoder.types()
    if len(types) != 2 or types[1] not in ("s32", "f32"):
        raise decoder.refuse(f"types {types}")
    ftz = types[1] == "f32" and decoder.flag("ftz")
    bits = TYPES[types[0]]
    dtype = np.int32 if types[1] == "s32" else np.float32
    decoder.count(4)
    kind = DTYPES[bits]

    def value(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        number = c.view(dtype)
        number = formats.flush(number) if ftz else number
        return np.where(number >= 0, a, b).astype(kind)

    slots = [decoder.source(1, bits), decoder.source(2, bits), decoder.source(3, 32)]
    return alu.compute(value, decoder.destination(0, bits), slots)
