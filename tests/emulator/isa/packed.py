"""f16 and bf16 arithmetic, alone and in pairs (PTX ISA 9.7.4)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulator import arithmetic as numbers
from tests.emulator.isa import alu
from tests.emulator.isa.decoder import TYPES, Decoder
from tests.emulator.machine.signals import Step


def _operation(decoder: Decoder, pair: bool, op: str, kind: str) -> alu.Function:
    """The operation on raw bits: uint32 for pairs, else uint16."""
    flags: dict[str, Any] = {name: True for name in ("ftz", "sat", "relu") if decoder.flag(name)}
    if op in ("min", "max"):
        if decoder.flag("NaN"):
            flags["nan"] = True
        if decoder.flag("xorsign"):
            raise decoder.refuse(".xorsign.abs")
    else:
        decoder.flag("rn")
    if pair:
        return lambda *words: numbers.packed(op, kind, *words, **flags)
    if op in ("min", "max"):
        return lambda a, b: numbers.minmax_16(op, kind, a, b, **flags)
    return lambda *values: numbers.arithmetic_16(op, kind, values, **flags)


def arithmetic(decoder: Decoder) -> Step:
    """add, sub, mul, fma, min, max."""
    op = decoder.opcode
    if op == "mad":
        raise decoder.refuse("mad of f16")
    type_ = decoder.type("f16", "f16x2", "bf16", "bf16x2")
    kind, pair = type_.removesuffix("x2"), type_.endswith("x2")
    function = _operation(decoder, pair, op, kind)
    count = 3 if op == "fma" else 2
    decoder.count(count + 1)
    bits = TYPES[type_]
    slots = [decoder.source(1 + i, bits) for i in range(count)]
    return alu.compute(function, decoder.destination(0, bits), slots)


def sign(decoder: Decoder) -> Step:
    """neg and abs: the sign bits."""
    negate = decoder.opcode == "neg"
    if decoder.flag("ftz"):
        raise decoder.refuse(".ftz")
    bits = TYPES[decoder.type("f16", "f16x2", "bf16", "bf16x2")]
    decoder.count(2)
    signs = np.uint16(0x8000) if bits == 16 else np.uint32(0x80008000)

    def raw(a: np.ndarray) -> np.ndarray:
        return a ^ signs if negate else a & ~signs

    return alu.compute(raw, decoder.destination(0, bits), [decoder.source(1, bits)])
