"""Global memory: the ranges that the caller's tensors own, and nothing else.

Addresses are those of the host, so that pointers in kernel parameters need no translation. A byte
that no tensor owns is a red zone, the gaps between rows of a strided tensor included.
"""

from __future__ import annotations

import bisect
import ctypes
from dataclasses import dataclass, field

import numpy as np

from tests.emulator.errors import ArgumentsError, Fault
from tests.emulator.machine.clocks import AccessLog, Agents

POISON = 0xFF
"""Bytes nobody wrote: NaN as e4m3, bf16, f16 and f32."""


@dataclass
class Range:
    """Memory of one tensor: `owned` is False in gaps; `defined` says what has been written."""

    name: str
    base: int
    data: np.ndarray
    owned: np.ndarray
    defined: np.ndarray
    output: bool = False
    log: AccessLog | None = None
    owner: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """Which cluster wrote a byte last, 0 for none."""
    twice: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    atomic: np.ndarray = field(default_factory=lambda: np.empty(0, bool))
    """Whether that was an atomic or strong access."""
    reader: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """Which cluster read a byte, 0 for none, -1 for several."""

    @property
    def end(self) -> int:
        """Address after the last byte."""
        return self.base + len(self.data)


def window(address: int, size: int) -> np.ndarray:
    """[size] uint8: the host's memory itself."""
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


class GlobalMemory:
    """Ranges by address."""

    def __init__(self) -> None:
        self.ranges: list[Range] = []
        self._bases: list[int] = []
        self.cluster = 0
        self._last: Range | None = None

    def add(self, name: str, base: int, owned: np.ndarray, *, output: bool = False) -> Range:
        """Register `owned` ([bytes] bool) at a host address; an output starts undefined."""
        data = window(base, len(owned))
        at = bisect.bisect_left(self._bases, base)
        for other in self.ranges[max(at - 1, 0) : at + 1]:
            if base < other.end and other.base < base + len(owned):
                return self._share(other, name, base, owned, output)
        defined = np.full(len(owned), not output)
        found = Range(name, base, data, owned.copy(), defined, output)
        found.owner = np.zeros(len(owned), np.int32)
        found.twice = np.zeros(len(owned), bool)
        found.atomic = np.zeros(len(owned), bool)
        found.reader = np.zeros(len(owned), np.int32)
        if output:
            data[owned] = POISON
        self.ranges.insert(at, found)
        self._bases.insert(at, base)
        return found

    @staticmethod
    def _share(other: Range, name: str, base: int, owned: np.ndarray, output: bool) -> Range:
        """Two arguments over the same bytes: one range, if it is the same whole."""
        if (other.base, len(other.data)) != (base, len(owned)) or output != other.output:
            raise ArgumentsError(
                f"{name} overlaps {other.name} without being the same bytes; pass copies"
            )
        other.owned |= owned
        return other

    def start_launch(self) -> None:
        """Writes of earlier launches are done and in order with what comes."""
        for each in self.ranges:
            each.owner[:] = 0
            each.reader[:] = 0
            each.twice[:] = False

    def start_cluster(self, agents: Agents) -> None:
        """Accesses from here on are those of another cluster."""
        self.cluster += 1
        for each in self.ranges:
            each.log = AccessLog(len(each.data), agents)

    def parts(self, addresses: np.ndarray) -> list[np.ndarray]:
        """Indices of addresses ([lanes] uint64), those near one range together.

        A kernel with two outputs may store to both at once, each lane to its own.
        """
        found = self._last
        if found is None or int(addresses.min()) < found.base or int(addresses.max()) >= found.end:
            nearest = np.searchsorted(np.array(self._bases, np.uint64), addresses, "right")
            if (nearest != nearest[0]).any():
                return [np.flatnonzero(nearest == each) for each in np.unique(nearest)]
        return [np.arange(len(addresses))]

    def find(self, addresses: np.ndarray, size: int, what: str) -> tuple[Range, np.ndarray]:
        """The range of these addresses ([lanes] uint64) and their offsets in it: all in one."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        found = self._last
        if found is None or low < found.base or high > found.end:
            at = bisect.bisect_right(self._bases, low) - 1
            found = self.ranges[at] if at >= 0 else None
            if found is None or low >= found.end or high > found.end:
                raise Fault("out of bounds", self._outside(low, high, what))
            self._last = found
        return found, (addresses - np.uint64(found.base)).astype(np.int64)

    def _outside(self, low: int, high: int, what: str) -> str:
        nearest = min(
            self.ranges,
            key=lambda r: min(abs(low - r.base), abs(high - r.end)),
            default=None,
        )
        if nearest is None:
            return f"{what} of {low:#x}: no tensor is registered"
        if nearest.base <= low < nearest.end or nearest.base < high <= nearest.end:
            side = f"bytes {low - nearest.base} to {high - nearest.base}"
        elif low >= nearest.end:
            side = f"{low - nearest.end} bytes past the end"
        else:
            side = f"{nearest.base - low} bytes before the start"
        return (
            f"{what} of {high - low} bytes at {side} of {nearest.name} ({len(nearest.data)} bytes)"
        )

    def check_owned(self, found: Range, at: np.ndarray, what: str) -> None:
        """Fault if a byte belongs to no tensor."""
        outside = ~found.owned[at]
        if outside.any():
            byte = int(at.reshape(-1)[outside.reshape(-1).argmax()])
            raise Fault("out of bounds", f"{what} of a gap of {found.name}: byte {byte}")
