"""Shared memory of a CTA, and addresses of a cluster's.

An address of the shared::cluster window is ``rank << 24 | offset``: a CTA's own addresses carry its
rank, so that masking bit 24 off gives the pair's leader, as two-CTA kernels do it (CUTLASS,
Sm100MmaPeerBitMask).
"""

from __future__ import annotations

import numpy as np

from tests.emulator.errors import Fault
from tests.emulator.machine.barriers import Mbarrier
from tests.emulator.machine.clocks import AccessLog, Agents
from tests.emulator.machine.global_memory import POISON
from tests.emulator.ptx.scope import DYNAMIC

RANK_SHIFT = 24
OFFSET = (1 << RANK_SHIFT) - 1


class SharedMemory:
    """Bytes, which of them are defined, who touched them, and the mbarriers in them."""

    def __init__(self, name: str, size: int, agents: Agents) -> None:
        self.name = name
        self.size = DYNAMIC + size
        self.data = np.full(self.size, POISON, np.uint8)
        self.defined = np.zeros(self.size, bool)
        self.log = AccessLog(self.size, agents)
        self.mbarriers: dict[int, Mbarrier] = {}
        self.former: dict[int, tuple[int, int]] = {}
        """Agent and next phase of mbarriers that were at an offset."""
        self.barrier_bytes = np.zeros(self.size, bool)
        self.exited = False

    def place(self, offset: int) -> str:
        """For messages."""
        return f"byte {offset - DYNAMIC} of {self.name}'s shared memory"

    def check(self, low: int, high: int, what: str) -> None:
        """Fault unless bytes low to high are the kernel's to use."""
        if low < DYNAMIC or high > self.size:
            raise Fault(
                "out of bounds",
                f"{what} of shared bytes {low - DYNAMIC} to {high - DYNAMIC} of {self.name}, "
                f"which has {self.size - DYNAMIC}",
            )
        if self.exited:
            raise Fault("cluster lifetime", f"{what} of shared memory of {self.name}, which exited")

    def check_no_barrier(self, at: np.ndarray, what: str) -> None:
        """Fault if ordinary accesses reach into an mbarrier object."""
        inside = self.barrier_bytes[at]
        if inside.any():
            first = int(at.reshape(-1)[inside.reshape(-1).argmax()])
            raise Fault("barrier", f"{what} touches the mbarrier at {self.place(first)}")

    def mbarrier(self, offset: int, what: str) -> Mbarrier:
        """The mbarrier object at an offset."""
        if self.exited:
            raise Fault("cluster lifetime", f"{what} of {self.place(offset)}: the CTA has exited")
        found = self.mbarriers.get(offset)
        if found is None:
            self.check(offset, offset + 8, what)
            raise Fault("barrier", f"{what} of {self.place(offset)}: no mbarrier was made there")
        return found
