"""Tensor memory of a CTA: 128 lanes x 512 columns of 32 bits, and its allocator."""

from __future__ import annotations

import numpy as np

from tests.emulator.errors import Fault
from tests.emulator.machine.clocks import AccessLog, Agents

LANES, COLUMNS = 128, 512


class TensorMemory:
    """Words by ``lane * 512 + column``; `owner` is the PTX line that allocated a column, or 0."""

    def __init__(self, name: str, agents: Agents) -> None:
        self.name = name
        self.words = np.full(LANES * COLUMNS, 0xFFFFFFFF, np.uint32)
        self.defined = np.zeros(LANES * COLUMNS, bool)
        self.log = AccessLog(LANES * COLUMNS, agents)
        self.owner = np.zeros(COLUMNS, np.int32)
        self.relinquished = 0
        self.group = 0
        """cta_group of the instructions so far: mixing them is not allowed."""

    def place(self, at: int) -> str:
        """For messages."""
        lane, column = divmod(at, COLUMNS)
        return f"lane {lane}, column {column} of {self.name}'s tensor memory"

    def allocate(self, start: int, columns: int, line: int) -> None:
        """Give columns to a kernel."""
        self.owner[start : start + columns] = line

    def free(self, start: int, columns: int) -> None:
        """Take columns back; only as they were allocated."""
        owners = self.owner[start : start + columns]
        if start + columns > COLUMNS or not owners.all() or len(set(owners.tolist())) != 1:
            raise Fault(
                "tensor memory",
                f"dealloc of columns {start} to {start + columns} of {self.name}: not one "
                "allocation",
            )
        self.owner[start : start + columns] = 0
        cells = self.words.reshape(LANES, COLUMNS)
        cells[:, start : start + columns] = 0xFFFFFFFF
        self.defined.reshape(LANES, COLUMNS)[:, start : start + columns] = False

    def check(self, at: np.ndarray, what: str) -> None:
        """Fault unless the columns of these cells are allocated."""
        missing = self.owner[at % COLUMNS] == 0
        if missing.any():
            first = int(at.reshape(-1)[missing.reshape(-1).argmax()])
            raise Fault("tensor memory", f"{what} of {self.place(first)}, which is not allocated")
