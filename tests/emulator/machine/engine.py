"""Asynchronous work: bulk copies and tensor-core operations, and when they happen.

An operation takes effect when the engine completes it. *eager* completes it as it is issued;
*late* only when no warp can go on, newest first where the order is free; *random* at any moment
(seeded). Operations of one queue complete in order, as tcgen05 instructions of a thread do;
copies have no order among themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Mode = Literal["eager", "late", "random"]
MODES: tuple[Mode, ...] = ("eager", "late", "random")


@dataclass
class Operation:
    """Something under way; `queue` None: in no order with others."""

    name: str
    line: int
    effect: Callable[[], None]
    queue: int | None = None


class Engine:
    """Operations under way of one cluster."""

    def __init__(self, mode: Mode, generator: random.Random) -> None:
        self.mode = mode
        self.generator = generator
        self.pending: list[Operation] = []
        self.completed = 0

    def issue(self, operation: Operation) -> None:
        """Start an operation."""
        if self.mode == "eager":
            self.completed += 1
            operation.effect()
        else:
            self.pending.append(operation)

    def _free(self) -> list[int]:
        """Indices of operations that no earlier one of their queue holds back."""
        seen: set[int] = set()
        found = []
        for index, operation in enumerate(self.pending):
            if operation.queue is None or operation.queue not in seen:
                found.append(index)
            if operation.queue is not None:
                seen.add(operation.queue)
        return found

    def advance(self, stuck: bool) -> bool:
        """Complete one operation if the mode wants it; `stuck`: no warp can go on."""
        if not self.pending:
            return False
        if self.mode == "late":
            if not stuck:
                return False
            index = self._free()[-1]
        else:
            if not stuck and self.generator.random() < 0.5:
                return False
            index = self.generator.choice(self._free())
        operation = self.pending.pop(index)
        self.completed += 1
        operation.effect()
        return True

    def finish(self) -> None:
        """Complete everything: the kernel is over."""
        while self.advance(stuck=True):
            pass
