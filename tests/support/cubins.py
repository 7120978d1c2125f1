"""What a cubin says about its kernels, read without a driver or a tool."""

from __future__ import annotations

import struct
from collections.abc import Iterator

REGISTERS, FRAME, STACK = 0x2F, 0x11, 0x12
"""Attributes of a cubin's .nv.info section: (symbol, value) pairs."""


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of the sections of a 64-bit ELF file."""
    (at,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    heads = [struct.unpack_from("<IIQQQQ", elf, at + i * size) for i in range(count)]
    strings = heads[names][4]
    for name, kind, _, _, offset, length in heads:
        end = elf.index(b"\0", strings + name)
        # Type 8 has no bytes in the file.
        yield (
            elf[strings + name : end].decode(),
            b"" if kind == 8 else elf[offset : offset + length],
        )


def attributes(cubin: bytes) -> dict[int, list[int]]:
    """Values by attribute, of every function."""
    (content,) = (content for name, content in _sections(cubin) if name == ".nv.info")
    found: dict[int, list[int]] = {}
    at = 0
    while at < len(content):
        form, attribute, size = struct.unpack_from("<BBH", content, at)
        at += 4
        if form == 4:  # `size` bytes follow; else `size` is the value itself
            if size == 8:
                found.setdefault(attribute, []).append(struct.unpack_from("<II", content, at)[1])
            at += size
    return found
