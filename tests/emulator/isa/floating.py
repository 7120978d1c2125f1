"""f32 and f64 arithmetic (PTX ISA 9.7.3, 9.7.4), and the opcodes that integers share with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.emulator import arithmetic, formats
from tests.emulator.isa import alu, integer, packed
from tests.emulator.isa.decoder import Decoder, instruction
from tests.emulator.machine.signals import Step

_ROUNDINGS = ("rn", "rz", "rm", "rp")
Numbers = Callable[..., np.ndarray]


def _f32(decoder: Decoder, function: Numbers, sources: int) -> Step:
    """A step from a function of float32 arrays."""
    decoder.count(sources + 1)
    slots = [decoder.source(1 + i, 32) for i in range(sources)]
    raw = alu.viewed(function, np.float32, np.uint32)
    return alu.compute(raw, decoder.destination(0, 32), slots)


def _f64(decoder: Decoder, function: Numbers, sources: int) -> Step:
    """A step from a function of float64 arrays: rounding to nearest only."""
    if decoder.choice(_ROUNDINGS, "rn") != "rn":
        raise decoder.refuse("f64 in another rounding than .rn")
    decoder.count(sources + 1)
    slots = [decoder.source(1 + i, 64) for i in range(sources)]
    raw = alu.viewed(function, np.float64, np.uint64)
    return alu.compute(raw, decoder.destination(0, 64), slots)


def _is_plain(decoder: Decoder) -> bool:
    """Rounds to nearest without flushing or clamping: numpy's own operators do that."""
    return not {"ftz", "sat", "rz", "rm", "rp"}.intersection(decoder.left)


def _options(decoder: Decoder) -> tuple[str, bool]:
    return decoder.choice(_ROUNDINGS, "rn"), decoder.flag("ftz")


def _canonical(function: Numbers) -> Numbers:
    return lambda *values: formats.canonical_f32(function(*values))


def _linear(decoder: Decoder, plain: Numbers, exact: Numbers, wide: Numbers, count: int) -> Step:
    """add, sub, mul and fma of one format."""
    if {"f16", "f16x2", "bf16", "bf16x2"}.intersection(decoder.left):
        return packed.arithmetic(decoder)
    is_plain = _is_plain(decoder)
    if decoder.flag("f64"):
        return _f64(decoder, wide, count)
    if decoder.flag("f32x2"):
        return _pairs(decoder, exact, count)
    mode, ftz = _options(decoder)
    sat = decoder.flag("sat")
    decoder.type("f32")
    if is_plain:
        return _f32(decoder, _canonical(plain), count)
    return _f32(decoder, lambda *v: exact(*v, mode, ftz=ftz, sat=sat), count)


def _pairs(decoder: Decoder, exact: Numbers, count: int) -> Step:
    """Two f32 in 64 bits (sm_100); PTX has no .sat of them."""
    mode, ftz = _options(decoder)
    decoder.count(count + 1)
    slots = [decoder.source(1 + i, 64) for i in range(count)]

    def raw(*values: np.ndarray) -> np.ndarray:
        numbers = [np.ascontiguousarray(v).view(np.float32) for v in values]
        return np.ascontiguousarray(exact(*numbers, mode, ftz=ftz)).view(np.uint64)

    return alu.compute(raw, decoder.destination(0, 64), slots)


def _subtract(a: np.ndarray, b: np.ndarray, mode: str = "rn", **more: bool) -> np.ndarray:
    return arithmetic.add_f32(a, -b, mode, **more)


def _fma_f64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Exact for what kernels here need: raises where one rounding and two could differ."""
    product = a * b
    wide = a.astype(np.longdouble) * b.astype(np.longdouble)
    if (product != wide).any():
        raise formats.UnsupportedError("fma.f64 of a product that needs more than 53 bits")
    return product + c


@instruction("add")
def _add(decoder: Decoder) -> Step:
    if not integer.is_float(decoder):
        return integer.add_or_sub(decoder)
    return _linear(decoder, np.add, arithmetic.add_f32, np.add, 2)


@instruction("sub")
def _sub(decoder: Decoder) -> Step:
    if not integer.is_float(decoder):
        return integer.add_or_sub(decoder)
    return _linear(decoder, np.subtract, _subtract, np.subtract, 2)


@instruction("mul")
def _mul(decoder: Decoder) -> Step:
    if not integer.is_float(decoder):
        return integer.mul(decoder)
    return _linear(decoder, np.multiply, arithmetic.mul_f32, np.multiply, 2)


@instruction("fma", "mad")
def _fma(decoder: Decoder) -> Step:
    if decoder.opcode == "mad" and not integer.is_float(decoder):
        return integer.mul(decoder)
    return _linear(decoder, arithmetic.fma_f32, arithmetic.fma_f32, _fma_f64, 3)


@instruction("div")
def _div(decoder: Decoder) -> Step:
    if not integer.is_float(decoder):
        return integer.div(decoder)
    if decoder.flag("f64"):
        return _f64(decoder, np.divide, 2)
    if decoder.choice(("approx", "full")):
        ftz = decoder.flag("ftz")
        decoder.type("f32")
        return _f32(decoder, lambda a, b: arithmetic.div_f32(a, b, ftz=ftz), 2)
    mode, ftz = _options(decoder)
    decoder.type("f32")
    return _f32(decoder, lambda a, b: arithmetic.div_f32(a, b, mode, ftz=ftz), 2)


@instruction("min", "max")
def _min_max(decoder: Decoder) -> Step:
    if not integer.is_float(decoder):
        return integer.min_or_max(decoder)
    if {"f16", "f16x2", "bf16", "bf16x2"}.intersection(decoder.left):
        return packed.arithmetic(decoder)
    ftz, nan = decoder.flag("ftz"), decoder.flag("NaN")
    absolute = decoder.flag("xorsign", "abs")
    if absolute:
        raise decoder.refuse(".xorsign.abs")
    decoder.type("f32")
    opcode = decoder.opcode
    if len(decoder.operands) == 4:  # three inputs, sm_100

        def three(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
            first = arithmetic.minmax_f32(opcode, a, b, nan=nan, ftz=ftz)
            return arithmetic.minmax_f32(opcode, first, c, nan=nan, ftz=ftz)

        return _f32(decoder, three, 3)
    return _f32(decoder, lambda a, b: arithmetic.minmax_f32(opcode, a, b, nan=nan, ftz=ftz), 2)


@instruction("neg", "abs")
def _sign(decoder: Decoder) -> Step:
    if not integer.is_float(decoder):
        return (integer.neg if decoder.opcode == "neg" else integer.absolute)(decoder)
    if {"f16", "f16x2", "bf16", "bf16x2"}.intersection(decoder.left):
        return packed.sign(decoder)
    negate = decoder.opcode == "neg"
    if decoder.flag("f64"):
        return _f64(decoder, np.negative if negate else np.abs, 1)
    ftz = decoder.flag("ftz")
    decoder.type("f32")
    sign = np.uint32(0x80000000)

    def raw(a: np.ndarray) -> np.ndarray:
        a = formats.flush(a.view(np.float32)).view(np.uint32) if ftz else a
        return a ^ sign if negate else a & ~sign

    decoder.count(2)
    return alu.compute(raw, decoder.destination(0, 32), [decoder.source(1, 32)])


@instruction("copysign")
def _copysign(decoder: Decoder) -> Step:
    decoder.type("f32")
    return _f32(decoder, lambda a, b: np.copysign(b, a), 2)


@instruction("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh")
def _function(decoder: Decoder) -> Step:
    """Reciprocals, roots and the approximate functions of the special function unit."""
    opcode = decoder.opcode
    approximate = decoder.flag("approx")
    mode, ftz = _options(decoder)
    decoder.type("f32")
    if opcode == "rcp" and not approximate:
        return _f32(decoder, lambda a: arithmetic.rcp_f32(a, mode, ftz=ftz), 1)
    if opcode == "sqrt" and not approximate:
        return _f32(decoder, lambda a: arithmetic.sqrt_f32(a, mode, ftz=ftz), 1)
    if opcode == "tanh":
        return _f32(decoder, lambda a: formats.canonical_f32(np.tanh(a)), 1)
    if opcode in ("sin", "cos"):
        function = np.sin if opcode == "sin" else np.cos
        return _f32(decoder, lambda a: formats.canonical_f32(function(a)), 1)
    return _f32(decoder, lambda a: arithmetic.approximate(opcode, a, ftz=ftz), 1)


@instruction("testp")
def _testp(decoder: Decoder) -> Step:
    kind = decoder.choice(("finite", "infinite", "number", "notanumber", "normal", "subnormal"))
    if not kind:
        raise decoder.refuse("a form without a property")
    decoder.type("f32")
    decoder.count(2)
    tiny = np.finfo(np.float32).tiny

    def test(raw: np.ndarray) -> np.ndarray:
        x = raw.view(np.float32)
        return {
            "finite": np.isfinite(x),
            "infinite": np.isinf(x),
            "number": ~np.isnan(x),
            "notanumber": np.isnan(x),
            "normal": np.isfinite(x) & (np.abs(x) >= tiny),
            "subnormal": (x != 0) & (np.abs(x) < tiny),
        }[kind]

    return alu.compare(test, decoder.destination(0, 1), [decoder.source(1, 32)])
