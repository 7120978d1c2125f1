"""PTX text to tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.emulator.errors import PtxError

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r\n]+|//[^\n]*|/\*.*?\*/)
    |(?P<number>0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?
       |\d+\.\d*(?:[eE][+-]?\d+)?|\d+U?)
    |(?P<word>\.?[A-Za-z_$%][\w$]*(?:(?:\.|::)[\w$]+)*)
    |(?P<string>"[^"]*")
    |(?P<mark>[{}()\[\],;:@!|<>=+\-])""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Token:
    """`kind` is number, word, string or mark; `line` counts from 1."""

    kind: str
    text: str
    line: int


def tokens(text: str) -> Iterator[Token]:
    """Those of a PTX file, white space and comments left out."""
    at, line = 0, 1
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            shown = text[at : at + 20].splitlines()[0]
            raise PtxError(f"line {line}: {shown!r} is not PTX")
        if found.lastgroup != "space":
            assert found.lastgroup is not None
            yield Token(found.lastgroup, found.group(), line)
        line += found.group().count("\n")
        at = found.end()
