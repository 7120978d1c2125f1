"""Operands of an instruction, from tokens."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from tests.emulator.errors import PtxError
from tests.emulator.ptx.syntax import (
    Address,
    Immediate,
    Label,
    Not,
    Operand,
    Pair,
    Register,
    Sink,
    Special,
    Variable,
    Vector,
)

if TYPE_CHECKING:
    from tests.emulator.ptx.parser import Stream
    from tests.emulator.ptx.scope import Scope
    from tests.emulator.ptx.tokens import Token


def number(token: Token) -> Immediate:
    """A literal: 0f and 0d give the bits of a float, 1.5 those of a double."""
    text = token.text
    if token.kind != "number":
        raise PtxError(f"line {token.line}: {text!r} is no number")
    if text[:2] in ("0f", "0F"):
        return Immediate(int(text[2:], 16), 32)
    if text[:2] in ("0d", "0D"):
        return Immediate(int(text[2:], 16), 64)
    if "." in text:
        (bits,) = struct.unpack("<Q", struct.pack("<d", float(text)))
        return Immediate(bits, 64)
    digits = text.rstrip("U")
    try:
        # A leading 0 makes an integer octal, as in C.
        return Immediate(int(digits, 8 if digits[0] == "0" and digits.isdigit() else 0))
    except ValueError:
        raise PtxError(f"line {token.line}: {text!r} is no octal number") from None


class Unresolved(Label):
    """A label that may be defined further down."""


def operand(stream: Stream, scope: Scope) -> Operand:
    """The next operand."""
    token = stream.next()
    if token.text == "{":
        return _vector(stream, scope)
    if token.text == "[":
        return _address(stream, scope)
    if token.text == "!":
        inner = operand(stream, scope)
        if not isinstance(inner, Register) or inner.bits != 1:
            raise PtxError(f"line {token.line}: only a predicate can be negated")
        return Not(inner)
    if token.text == "-":
        value = number(stream.next())
        if value.float_bits:
            return Immediate(value.value ^ 1 << value.float_bits - 1, value.float_bits)
        return Immediate(-value.value)
    if token.kind == "number":
        return number(token)
    if token.kind != "word":
        raise PtxError(f"line {token.line}: an operand cannot start with {token.text!r}")
    first = _named(token.text, scope)
    if stream.peek().text == "|":
        stream.next()
        return Pair(first, operand(stream, scope))
    if isinstance(first, Variable) and stream.peek().text == "+":
        stream.next()
        return Variable(first.name, first.space, first.address + number(stream.next()).value)
    return first


def _named(name: str, scope: Scope) -> Operand:
    if name == "_":
        return Sink()
    register = scope.register(name)
    if register is not None:
        return register
    variable = scope.variable(name)
    if variable is not None:
        return variable
    if name.startswith("%") or name.startswith("WARP_SZ"):
        return Special(name)
    return Unresolved(name, -1)


def _vector(stream: Stream, scope: Scope) -> Vector:
    items = []
    while not stream.accept("}"):
        items.append(operand(stream, scope))
        stream.accept(",")
    return Vector(tuple(items))


def _address(stream: Stream, scope: Scope) -> Address:
    line = stream.peek().line
    base = operand(stream, scope)
    offset, coordinates = 0, None
    if isinstance(base, Variable | Register | Immediate):
        while stream.peek().text in "+-":
            sign = -1 if stream.next().text == "-" else 1
            negative = stream.accept("-")
            value = number(stream.next()).value
            offset += sign * (-value if negative else value)
        if stream.accept(","):
            inner = operand(stream, scope)
            if not isinstance(inner, Vector):
                raise PtxError(f"line {line}: coordinates must be in braces")
            coordinates = inner
    else:
        raise PtxError(f"line {line}: {base} is no address")
    stream.expect("]")
    return Address(base, offset, coordinates)
