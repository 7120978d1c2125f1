"""What executing an instruction may ask of the scheduler, beside going on to the next one.

A step returns None to go on, an int to jump there with all its lanes, or one of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any


class Signal(Enum):
    """What to do with the lanes.

    `PARK`: wait for the warp's other lanes, all of which must come, and try again; `GATHER`: for
    some of them, unless they exit; `EXIT`: these lanes are done.
    """

    PARK = auto()
    GATHER = auto()
    EXIT = auto()


@dataclass(frozen=True)
class Branch:
    """Some lanes jump."""

    taken: int
    target: int


@dataclass
class Wait:
    """The lanes stop until `ready`; then `then(True)` runs and they go on.

    With `patience`, hardware may give up: `then(False)` runs after nothing else could.
    """

    ready: Callable[[], bool]
    reason: Callable[[], str]
    then: Callable[[bool], None] | None = None
    patience: bool = False


Outcome = None | int | Signal | Branch | Wait
Step = Callable[[Any], Outcome]
"""An instruction, decoded: takes the warp."""
