"""cvt (PTX ISA 9.7.9.21): between integers, floats and the narrow formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator import formats
from tests.emulator.isa import alu
from tests.emulator.isa.decoder import TYPES, Decoder, instruction
from tests.emulator.isa.integer import dtype_of
from tests.emulator.machine.registers import DTYPES
from tests.emulator.machine.signals import Step
from tests.emulator.machine.warp import Warp

_INTEGER_MODES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil,
}  # fmt: skip
_FLOAT_MODES = ("rn", "rz", "rm", "rp", "rna")
_REAL = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_WIDENING = (("f16", "f32"), ("bf16", "f32"), ("f16", "f64"), ("bf16", "f64"), ("f32", "f64"))
_NARROW = ("e2m1", "e4m3", "e5m2", "e2m3", "e3m2", "ue8m0")


def _number(raw: np.ndarray, type_: str) -> np.ndarray:
    """Raw bits of a floating type as numbers."""
    if type_ in ("f16", "bf16"):
        return formats.to_f32(alu.narrow(raw, np.uint16), type_)
    return raw.view(np.float64 if type_ == "f64" else np.float32)


@instruction("cvt")
def _cvt(decoder: Decoder) -> Step:
    types = decoder.types()
    if len(types) != 2:
        raise decoder.refuse(f"types {types}")
    target, source = types
    kinds = {name.partition("x")[0] for name in types}
    if kinds & set(_NARROW) or target in ("f16x2", "bf16x2"):
        return _narrow_formats(decoder, target, source)
    if "tf32" in types:
        mode = decoder.choice(_FLOAT_MODES, "rna")
        decoder.count(2)
        raw = alu.viewed(lambda x: formats.f32_to_tf32(x, mode), np.float32, np.uint32)
        return alu.compute(raw, decoder.destination(0, 32), [decoder.source(1, 32)])
    convert = _scalar(decoder, target, source)
    decoder.count(2)
    slot, own = decoder.wide(1)
    bits, result = TYPES[source], TYPES[target]
    if own < bits:
        raise decoder.refuse(f"a source of {own} bits as .{source}")
    destination = decoder.destination(0, result, wider=True)
    wide = DTYPES[decoder.operands[0].bits] if hasattr(decoder.operands[0], "bits") else None
    narrow = DTYPES[bits]

    def step(warp: Warp) -> None:
        value = convert(alu.narrow(warp.r[slot], narrow))
        if wide is not None and value.dtype != wide:
            signed = target.startswith("s")
            value = value.view(dtype_of(target)).astype(wide) if signed else value.astype(wide)
        warp.put(destination, value, warp.d[slot])

    return step


def _scalar(decoder: Decoder, target: str, source: str) -> alu.Function:
    """Between single numbers, as a function of raw bits of the source's own width."""
    sat, ftz = decoder.flag("sat"), decoder.flag("ftz")
    relu, satfinite = decoder.flag("relu"), decoder.flag("satfinite")
    if target in _REAL and source in _REAL:
        return _between_floats(decoder, target, source, ftz=ftz, sat=sat, relu=relu,
                               satfinite=satfinite)  # fmt: skip
    if relu or satfinite:
        raise decoder.refuse(".relu or .satfinite")
    if target in _REAL:
        mode = decoder.choice(_FLOAT_MODES)
        if not mode:
            raise decoder.refuse("an integer to a float without a rounding, which PTX requires,")
        convert = _from_integer(decoder, target, source, mode)
        return _clamped(convert, dtype_of(source)) if sat else convert
    if source in _REAL:
        return _to_integer(decoder, target, source, ftz)
    return _between_integers(target, source, sat)


def _clamped(convert: alu.Function, from_: Any) -> alu.Function:
    """The conversion of an integer clamped to 0 and 1, both exact in every format."""
    one = from_(1)
    return lambda raw: convert(np.clip(raw.view(from_), from_(0), one).view(raw.dtype))


def _between_integers(target: str, source: str, sat: bool) -> alu.Function:
    from_, to = dtype_of(source), dtype_of(target)
    result = DTYPES[TYPES[target]]
    if not sat:
        return lambda raw: raw.view(from_).astype(to).view(result)
    low, high = int(np.iinfo(to).min), int(np.iinfo(to).max)

    def clamp(raw: np.ndarray) -> np.ndarray:
        values = [min(max(int(x), low), high) for x in raw.view(from_).tolist()]
        return np.array(values, to).view(result)

    return clamp


def _from_integer(decoder: Decoder, target: str, source: str, mode: str) -> alu.Function:
    from_ = dtype_of(source)
    if target == "f64" or mode != "rn" or TYPES[source] == 64:
        if target == "f64" and TYPES[source] <= 32:
            return lambda raw: raw.view(from_).astype(np.float64).view(np.uint64)
        if target == "f32" and mode == "rn":
            # numpy converts 64-bit integers to float32 in one rounding.
            return lambda raw: raw.view(from_).astype(np.float32).view(np.uint32)
        raise decoder.refuse(f"{source} to {target} in .{mode}")

    def convert(raw: np.ndarray) -> np.ndarray:
        # Through float64, exact for 32 bits, so that there is one rounding.
        exact = raw.view(from_).astype(np.float64)
        if target == "f32":
            return exact.astype(np.float32).view(np.uint32)
        if target == "f16":
            return exact.astype(np.float16).view(np.uint16)
        if TYPES[source] > 16:
            raise decoder.refuse(f"{source} to bf16")
        return formats.f32_to_bf16(exact.astype(np.float32))

    return convert


def _to_integer(decoder: Decoder, target: str, source: str, ftz: bool) -> alu.Function:
    """Clamped to the target's range."""
    mode = decoder.choice(_INTEGER_MODES)
    if not mode:
        raise decoder.refuse("no integer rounding")
    bits, signed = TYPES[target], target.startswith("s")
    return lambda raw: formats.float_to_int(
        _number(raw, source), mode, bits, signed=signed, ftz=ftz
    )


def _between_floats(
    decoder: Decoder, target: str, source: str, *, ftz: bool, sat: bool, relu: bool,
    satfinite: bool,
) -> alu.Function:  # fmt: skip
    whole = decoder.choice(_INTEGER_MODES)
    mode = decoder.choice(_FLOAT_MODES)
    exact = target == source or (source, target) in _WIDENING
    if not (exact or mode):
        raise decoder.refuse("a loss of precision without a rounding, which PTX requires,")
    mode = mode or "rn"
    if target == "f64" and source == "f64" and not whole:
        raise decoder.refuse("this form")

    def convert(raw: np.ndarray) -> np.ndarray:
        x = _number(raw, source)
        x = formats.flush(x) if ftz and x.dtype == np.float32 else x
        if whole:
            x = _INTEGER_MODES[whole](x)
        if target == "f64":
            return x.astype(np.float64).view(np.uint64)
        if source == "f64":
            if mode != "rn" or target != "f32":
                raise decoder.refuse(f"f64 to {target} in .{mode}")
            x = x.astype(np.float32)
        if sat:
            x = np.where(x > 0, np.minimum(x, np.float32(1)), np.float32(0))
        if target == "f32":
            x = formats.canonical_f32(x)
            return (formats.flush(x) if ftz else x).view(np.uint32)
        function = formats.f32_to_bf16 if target == "bf16" else formats.f32_to_f16
        return function(x, mode, satfinite=satfinite, relu=relu)

    return convert


# Narrow formats --------------------------------------------------


def _narrow_formats(decoder: Decoder, target: str, source: str) -> Step:
    """Pairs: ``cvt.rn.satfinite.e2m1x2.f32 d, a, b`` puts a in the upper half."""
    satfinite, relu = decoder.flag("satfinite"), decoder.flag("relu")
    mode = decoder.choice(("rn", "rz", "rp", "rs"))
    if mode == "rs":
        return _stochastic(decoder, target, source, satfinite=satfinite, relu=relu)
    kind = target.partition("x")[0]
    if source == "f32":
        if not target.endswith("x2"):
            raise decoder.refuse(f".{target}")
        return _pair_from_f32(decoder, kind, mode, relu=relu, satfinite=satfinite)
    if target in ("f16x2", "bf16x2") and source.endswith("x2"):
        return _pair_to_16(decoder, target, source.removesuffix("x2"), relu)
    raise decoder.refuse(f".{target}.{source}")


def _stochastic(decoder: Decoder, target: str, source: str, *, satfinite: bool, relu: bool) -> Step:
    """``cvt.rs...x4.f32 d, {a, b, e, f}, rbits``, a in the upper bits, and bf16x2 of a, b."""
    kind = target.partition("x")[0]
    if source != "f32" or relu or kind not in ("e2m1", "e4m3", "e5m2", "bf16"):
        raise decoder.refuse(f".rs.{target}.{source}")
    if kind == "bf16":
        decoder.count(4)

        def pair(a: np.ndarray, b: np.ndarray, rbits: np.ndarray) -> np.ndarray:
            high, low = (
                formats.stochastic_bf16(x.view(np.float32), random, satfinite=satfinite)
                for x, random in ((a, rbits >> np.uint32(16)), (b, rbits))
            )
            return high.astype(np.uint32) << np.uint32(16) | low

        slots = [decoder.source(i, 32) for i in (1, 2, 3)]
        return alu.compute(pair, decoder.destination(0, 32), slots)
    if not (satfinite and target.endswith("x4")):
        raise decoder.refuse(f".rs.{target}.{source}")
    decoder.count(3)
    bits = 4 if kind == "e2m1" else 8
    dtype = DTYPES[4 * bits]

    def four(*raw: np.ndarray) -> np.ndarray:
        values = [x.view(np.float32) for x in raw[:4]]
        result = np.zeros(32, np.uint32)
        for code in formats.stochastic_x4(values, raw[4], kind):
            result = result << np.uint32(bits) | code
        return result.astype(dtype)

    slots = [decoder.source(item, 32) for item in decoder.items(1)]
    return alu.compute(four, decoder.destination(0, 4 * bits), [*slots, decoder.source(2, 32)])


def _pair_from_f32(decoder: Decoder, kind: str, mode: str, *, relu: bool, satfinite: bool) -> Step:
    decoder.count(3)
    high, low = decoder.source(1, 32), decoder.source(2, 32)
    bits = 8 if kind == "e2m1" else 32 if kind in ("f16", "bf16") else 16
    half = np.uint32(bits // 2)

    def encode(raw: np.ndarray) -> np.ndarray:
        x = raw.view(np.float32)
        if kind == "f16":
            return formats.f32_to_f16(x, mode, satfinite=satfinite, relu=relu)
        if kind == "bf16":
            return formats.f32_to_bf16(x, mode, satfinite=satfinite, relu=relu)
        if kind == "ue8m0":
            return formats.f32_to_ue8m0(x, mode, satfinite=satfinite)
        return formats.from_f32(x, kind, relu=relu)

    if kind not in ("f16", "bf16", "ue8m0") and not (satfinite and mode == "rn"):
        raise decoder.refuse("another form than .rn.satfinite")
    dtype = DTYPES[bits]

    def join(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        both = (encode(a).astype(np.uint32) << half) | encode(b).astype(np.uint32)
        return both.astype(dtype)

    return alu.compute(join, decoder.destination(0, bits), [high, low])


def _pair_to_16(decoder: Decoder, target: str, kind: str, relu: bool) -> Step:
    """Exact: every value of the narrow formats is one of f16 and bf16, but ue8m0's range."""
    if (target == "f16x2") == (kind == "ue8m0"):
        raise decoder.refuse(f".{target} of {kind}")
    decoder.count(2)
    bits = 8 if kind == "e2m1" else 16
    half, mask = np.uint32(bits // 2), np.uint32((1 << bits // 2) - 1)
    back = formats.f32_to_f16 if target == "f16x2" else formats.f32_to_bf16

    def split(raw: np.ndarray) -> np.ndarray:
        both = raw.astype(np.uint32)
        parts = [
            back(formats.to_f32(part.astype(np.uint8), kind), relu=relu).astype(np.uint32)
            for part in (both & mask, both >> half)
        ]
        return parts[0] | parts[1] << np.uint32(16)

    return alu.compute(split, decoder.destination(0, 32), [decoder.source(1, bits)])
