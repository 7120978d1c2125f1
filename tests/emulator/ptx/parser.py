"""PTX text to a :class:`Module`.

Written from the grammar of the PTX ISA, for what compilers and the DSL's inline assembly emit.
Directives that change what a kernel means and that are not handled raise.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from tests.emulator.errors import PtxError, UnsupportedError
from tests.emulator.ptx.operands import Unresolved, number, operand
from tests.emulator.ptx.scope import DYNAMIC, Scope, width
from tests.emulator.ptx.syntax import (
    Entry,
    Guard,
    Instruction,
    Label,
    Location,
    Module,
    Operand,
    Parameter,
    Register,
    Storage,
    Variable,
    Vector,
)
from tests.emulator.ptx.tokens import Token, tokens

_IGNORED = frozenset({".pragma", ".address_size", ".weak", ".visible", ".noreturn"})
_TUNING = frozenset({
    ".reqntid", ".maxntid", ".minnctapersm", ".maxnreg", ".reqnctapercluster",
    ".maxclusterrank", ".explicitcluster", ".blocksareclusters", ".maxnctapersm",
})  # fmt: skip
_END = Token("mark", "", 0)


class Stream:
    """Tokens with one of look-ahead."""

    def __init__(self, text: str) -> None:
        self._tokens = list(tokens(text))
        self.at = 0

    def peek(self, ahead: int = 0) -> Token:
        """A coming token, not taken."""
        at = self.at + ahead
        return self._tokens[at] if at < len(self._tokens) else _END

    def next(self) -> Token:
        """Take a token."""
        token = self.peek()
        if token is _END:
            raise PtxError("the text ends in the middle of a statement")
        self.at += 1
        return token

    def accept(self, text: str) -> bool:
        """Take the token if it is this one."""
        if self.peek().text != text:
            return False
        self.at += 1
        return True

    def expect(self, text: str) -> Token:
        """Take this token or complain."""
        token = self.next()
        if token.text != text:
            raise PtxError(f"line {token.line}: expected {text!r}, found {token.text!r}")
        return token

    def skip_statement(self) -> None:
        """Up to and with the next semicolon."""
        while self.next().text != ";":
            pass

    def skip_line(self) -> None:
        """To the first token of the next line: .loc and .file end without a semicolon."""
        line = self.next().line
        while self.peek() is not _END and self.peek().line == line:
            self.next()


def parse(text: str) -> Module:
    """A PTX file; raises PtxError with the line of what it cannot read."""
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str) -> None:
        self.stream = Stream(text)
        self.location: Location | None = None
        self.storage: list[Storage] = []
        self.result = Module("", "", {}, [], text.splitlines())

    def module(self) -> Module:
        while self.stream.peek() is not _END:
            self._top_level()
        if not self.result.target:
            raise PtxError("no .target directive: this is no PTX file")
        return self.result

    def _top_level(self) -> None:
        token = self.stream.next()
        word = token.text
        if word == ".version":
            self.result.version = self.stream.next().text
        elif word == ".target":
            self.result.target = self.stream.next().text
            while self.stream.accept(","):
                self.stream.next()
        elif word == ".file":
            self._file()
        elif word == ".section":
            while self.stream.next().text != "}":
                pass
        elif word in (".extern", ".shared", ".global", ".const", ".visible", ".weak"):
            self._declaration_or_entry(token)
        elif word == ".entry":
            self._entry()
        elif word in _IGNORED:
            self.stream.skip_line()
        elif word == ".func":
            raise UnsupportedError(f"line {token.line}: functions (.func) are not emulated")
        else:
            raise UnsupportedError(f"line {token.line}: directive {word} is not known")

    def _declaration_or_entry(self, token: Token) -> None:
        while token.text in (".extern", ".visible", ".weak"):
            token = self.stream.next()
        if token.text == ".entry":
            self._entry()
        elif token.text in (".shared", ".global", ".const"):
            self.storage += self._storage(token.text[1:])
        elif token.text == ".func":
            raise UnsupportedError(f"line {token.line}: functions (.func) are not emulated")
        else:
            raise PtxError(f"line {token.line}: {token.text} cannot be declared here")

    def _storage(self, space: str) -> list[Storage]:
        """``.shared .align 16 .b8 name[32], other[4];`` with an optional initial value."""
        align, kind = 0, ""
        while self.stream.peek().text.startswith("."):
            word = self.stream.next()
            if word.text == ".align":
                align = number(self.stream.next()).value
            elif word.text.startswith(".attribute"):
                raise UnsupportedError(f"line {word.line}: {word.text} is not emulated")
            else:
                kind = word.text
        bytes_ = width(kind, self.stream.peek().line) // 8
        found = []
        while True:
            name, count, content = self.stream.next().text, 1, b""
            while self.stream.accept("["):
                open_ended = self.stream.peek().text == "]"
                count *= 0 if open_ended else number(self.stream.next()).value
                self.stream.expect("]")
            if self.stream.accept("="):
                content = self._initial(bytes_)
            found.append(Storage(name, space, count * bytes_, align or bytes_, content))
            if self.stream.next().text == ";":
                return found

    def _initial(self, bytes_: int) -> bytes:
        value = operand(self.stream, Scope(Entry("", [])))
        items = value.items if isinstance(value, Vector) else (value,)
        mask = (1 << 8 * bytes_) - 1
        return b"".join((item.value & mask).to_bytes(bytes_, "little") for item in items)  # type: ignore[union-attr]

    def _file(self) -> None:
        index = number(self.stream.next()).value
        self.result.files[index] = self.stream.next().text.strip('"')
        while self.stream.accept(","):
            self.stream.next()

    def _entry(self) -> None:
        name = self.stream.next().text
        entry = Entry(name, self._parameters())
        scope = Scope(entry)
        for parameter in entry.parameters:
            scope.variables[parameter.name] = Variable(parameter.name, "param", parameter.offset)
        while self.stream.peek().text != "{":
            self._tuning(entry)
        self._place_globals(scope)
        self.location = None
        _Body(self, entry).block(scope)
        self.result.entries[name] = entry

    def _tuning(self, entry: Entry) -> None:
        token = self.stream.next()
        if token.text not in _TUNING:
            raise UnsupportedError(f"line {token.line}: directive {token.text} is not known")
        values = []
        while self.stream.peek().kind == "number":
            values.append(number(self.stream.next()).value)
            self.stream.accept(",")
        entry.directives[token.text[1:]] = tuple(values)

    def _parameters(self) -> list[Parameter]:
        found: list[Parameter] = []
        offset = 0
        if not self.stream.accept("("):
            return found
        while not self.stream.accept(")"):
            self.stream.expect(".param")
            align, bytes_ = 0, 0
            while self.stream.peek().text.startswith("."):
                word = self.stream.next()
                if word.text == ".align":
                    align = number(self.stream.next()).value
                elif re.fullmatch(r"\.[busf]\d+", word.text):
                    bytes_ = width(word.text, word.line) // 8
                elif word.text != ".ptr" and word.text not in (".global", ".shared", ".const"):
                    raise UnsupportedError(f"line {word.line}: {word.text} of a parameter")
            name, count = self.stream.next().text, 1
            if self.stream.accept("["):
                count = number(self.stream.next()).value
                self.stream.expect("]")
            align = max(align, bytes_)
            offset = -(-offset // align) * align
            found.append(Parameter(name, count * bytes_, offset))
            offset += count * bytes_
            self.stream.accept(",")
        return found

    def _place_globals(self, scope: Scope) -> None:
        """Module variables become names of the entry: shared ones get an offset of its window.

        Dynamic shared memory (size 0) comes after what is static, in the body as well.
        """
        shared = [storage for storage in self.storage if storage.space == "shared"]
        for storage in shared:
            if storage.size:
                place_shared(scope, storage)
        end = scope.entry.static_shared
        for storage in self._shared_in_body():
            end = shared_offset(end, storage) + storage.size
        for storage in shared:
            if not storage.size:
                start = shared_offset(end, storage)
                scope.variables[storage.name] = Variable(storage.name, "shared", DYNAMIC + start)
                scope.entry.dynamic_shared = start
        for storage in self.storage:
            if storage.space != "shared":
                address = sum(-(-s.size // 256) * 256 for s in self.result.globals)
                if storage not in self.result.globals:
                    self.result.globals.append(storage)
                scope.variables[storage.name] = Variable(storage.name, storage.space, address)

    def _shared_in_body(self) -> list[Storage]:
        """Shared variables that the body ahead declares, in its order."""
        found, depth, start = [], 0, self.stream.at
        while True:
            token = self.stream.next()
            depth += (token.text == "{") - (token.text == "}")
            if token.text == ".shared":
                found += self._storage("shared")
            if not depth:
                break
        self.stream.at = start
        return found


def shared_offset(end: int, storage: Storage) -> int:
    """Where a shared variable starts behind `end` bytes of others."""
    return -(-(DYNAMIC + end) // storage.align) * storage.align - DYNAMIC


def place_shared(scope: Scope, storage: Storage) -> None:
    """Give a static shared variable its offset."""
    entry = scope.entry
    start = shared_offset(entry.static_shared, storage)
    scope.variables[storage.name] = Variable(storage.name, "shared", DYNAMIC + start)
    entry.shared[storage.name] = DYNAMIC + start
    entry.static_shared = start + storage.size


class _Body:
    """The statements of one kernel."""

    def __init__(self, parser: _Parser, entry: Entry) -> None:
        self.parser = parser
        self.stream = parser.stream
        self.entry = entry

    def block(self, scope: Scope) -> None:
        """``{ ... }``: statements, with nested blocks; then its labels are known."""
        first = len(self.entry.instructions)
        self.stream.expect("{")
        while not self.stream.accept("}"):
            self._statement(scope)
        for index in range(first, len(self.entry.instructions)):
            instruction = self.entry.instructions[index]
            operands = tuple(self._resolved(each, scope) for each in instruction.operands)
            if operands != instruction.operands:
                self.entry.instructions[index] = replace(instruction, operands=operands)
        if scope.parent is None:
            self._all_resolved()

    def _resolved(self, operand_: Operand, scope: Scope) -> Operand:
        if isinstance(operand_, Unresolved):
            index = scope.labels.get(operand_.name)
            return operand_ if index is None else Label(operand_.name, index)
        if isinstance(operand_, Vector):
            return Vector(tuple(self._resolved(each, scope) for each in operand_.items))
        return operand_

    def _all_resolved(self) -> None:
        for instruction in self.entry.instructions:
            for each in instruction.operands:
                if isinstance(each, Unresolved):
                    raise PtxError(f"line {instruction.line}: {each.name} is not declared")

    def _statement(self, scope: Scope) -> None:
        token = self.stream.peek()
        if token.text == "{":
            self.block(Scope(self.entry, scope))
        elif self.stream.peek(1).text == ":" and token.kind == "word":
            self.stream.next()
            self.stream.next()
            if token.text in scope.labels:
                raise PtxError(f"line {token.line}: label {token.text} is defined twice")
            scope.labels[token.text] = len(self.entry.instructions)
        elif token.text.startswith("."):
            self._directive(scope)
        elif token.text == ";":
            self.stream.next()
        else:
            self.entry.instructions.append(self._instruction(scope))

    def _directive(self, scope: Scope) -> None:
        token = self.stream.next()
        if token.text == ".reg":
            self._registers(scope)
        elif token.text == ".shared":
            for storage in self.parser._storage("shared"):
                place_shared(scope, storage)
        elif token.text == ".local":
            for storage in self.parser._storage("local"):
                start = -(-self.entry.local_bytes // storage.align) * storage.align
                scope.variables[storage.name] = Variable(storage.name, "local", start)
                self.entry.local_bytes = start + storage.size
        elif token.text == ".loc":
            self._location()
        elif token.text == ".pragma":
            self.stream.skip_statement()
        else:
            raise UnsupportedError(f"line {token.line}: directive {token.text} is not known")

    def _location(self) -> None:
        file, line = (number(self.stream.next()).value for _ in range(2))
        self.parser.location = Location(file, line)
        here = self.stream.peek()  # the column
        while self.stream.peek().line == here.line and self.stream.peek() is not _END:
            self.stream.next()

    def _registers(self, scope: Scope) -> None:
        kind = self.stream.next()
        bits = width(kind.text, kind.line)
        if bits > 64:
            raise UnsupportedError(f"line {kind.line}: registers of {bits} bits are not emulated")
        while True:
            name = self.stream.next()
            if self.stream.accept("<"):
                scope.declare_range(name.text, number(self.stream.next()).value, bits)
                self.stream.expect(">")
            else:
                scope.declare(name.text, bits, name.line)
            if self.stream.next().text == ";":
                return

    def _instruction(self, scope: Scope) -> Instruction:
        guard = None
        if self.stream.accept("@"):
            negated = self.stream.accept("!")
            name = self.stream.next()
            predicate = scope.register(name.text)
            if not isinstance(predicate, Register) or predicate.bits != 1:
                raise PtxError(f"line {name.line}: {name.text} is no predicate")
            guard = Guard(predicate, negated)
        word = self.stream.next()
        if word.kind != "word":
            raise PtxError(f"line {word.line}: an instruction cannot start with {word.text!r}")
        opcode, *modifiers = word.text.split(".")
        operands: list[Any] = []
        while not self.stream.accept(";"):
            operands.append(operand(self.stream, scope))
            self.stream.accept(",")
        return Instruction(
            opcode, tuple(modifiers), tuple(operands), guard, word.line, self.parser.location
        )
