"""What the emulator refuses, and what it finds wrong in a kernel.

Every message says where: the kernel, the PTX line and, where the DSL recorded it, the source line.
"""

from __future__ import annotations


class EmulatorError(ValueError):
    """Base of everything the emulator raises on purpose."""


class PtxError(EmulatorError):
    """The text is not PTX that the front end understands."""


class UnsupportedError(EmulatorError, NotImplementedError):
    """An opcode, modifier or field that the emulator does not implement: named, never skipped."""


class ArgumentsError(EmulatorError):
    """The caller's tensors or options do not fit the kernel."""


class Fault(EmulatorError):
    """The kernel did something that hardware forbids or leaves undefined.

    `check` is the name of the rule that found it: "out of bounds", "race", "uninitialised", ...
    """

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check


class Deadlock(Fault):
    """Nothing can run any more; the message says what each warp waits for."""

    def __init__(self, message: str) -> None:
        super().__init__("deadlock", message)
