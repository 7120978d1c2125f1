"""The list that mutants register in, and the configurations they are planted in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.emulator.mutations.roles import Gemm
from tests.emulator.operators import Configuration

ONE = Configuration(128, 64, (2, 1))
WIDE = Configuration(128, 192, (2, 1))
PAIR = Configuration(256, 128, (2, 1))
WIDE_PAIR = Configuration(256, 192, (2, 1))
SQUARE = Configuration(256, 128, (2, 2))

Edit = Callable[[Gemm], None]


@dataclass(frozen=True)
class Mutant:
    """A kernel with one fault: `fault` is its class, `survives` why nothing can see it, if so."""

    name: str
    fault: str
    configuration: Configuration
    edit: Edit
    survives: str = ""

    def __str__(self) -> str:
        return f"{self.name} [{self.configuration}]"


MUTANTS: list[Mutant] = []


def mutant(
    fault: str, name: str, *configurations: Configuration, survives: str = ""
) -> Callable[[Edit], Edit]:
    """Register a fault in each of these configurations."""

    def register(edit: Edit) -> Edit:
        MUTANTS.extend(Mutant(name, fault, each, edit, survives) for each in configurations)
        return edit

    return register
