"""Mutants of NVIDIA's NVFP4 GEMMs: does the emulator fail when it should?

Each has one fault. It runs on a small problem under several orders of events until something is
found: a fault, a deadlock, a wrong result. ``python -m tests.emulator.mutants`` runs them all and
writes results/mutants.md; with words, it runs those that have them in their names and says more.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tests.emulator.emulate import emulate
from tests.emulator.errors import EmulatorError, Fault
from tests.emulator.host import Host
from tests.emulator.machine.program import Settings
from tests.emulator.mutations import copies, epilogue, operands, waits
from tests.emulator.mutations.catalogue import MUTANTS, SQUARE, Mutant
from tests.emulator.mutations.roles import Gemm
from tests.emulator.operators import Configuration, Problem, host, problem

assert copies and epilogue and operands and waits  # they fill MUTANTS

RESULTS = Path(__file__).parent / "results" / "mutants.md"
LIMIT = 400_000
"""Instructions: ten times what the kernels need, for mutants that never end."""

SETTINGS = {
    "eager": Settings(mode="eager", max_instructions=LIMIT),
    "late": Settings(mode="late", max_instructions=LIMIT),
    "random 1": Settings(mode="random", schedule="random", seed=1, max_instructions=LIMIT),
    "random 2": Settings(mode="random", schedule="random", seed=2, max_instructions=LIMIT),
}


@dataclass(frozen=True)
class Outcome:
    """What found a mutant: the name of a check and a message; no check: it survived."""

    check: str
    setting: str = ""
    message: str = ""


@cache
def small(configuration: Configuration) -> Problem:
    """Three tiles a CTA, so that accumulators wrap, and K tiles that wrap the ring of stages."""
    across = 3 * configuration.n * configuration.cluster[1]
    return problem(256, across, 768 if configuration != SQUARE else 640)


@cache
def original(configuration: Configuration) -> Host:
    """NVIDIA's kernel, on one cluster."""
    return host(configuration, clusters=1)


def run(kernel: Gemm, configuration: Configuration, settings: Settings) -> None:
    """Run a kernel; raises what is wrong with it."""
    case = small(configuration)
    data = case
    for edit in kernel.data_edits:
        data = edit(data)
    m, n, _, batch = case.sizes
    out = torch.empty(batch, m, n, dtype=torch.bfloat16)
    emulate(
        kernel.mutated(), data.a, data.b, data.sfa, data.sfb, out, case.sizes,
        outputs=[out], settings=settings,
    )  # fmt: skip
    worst = case.errors(out).nan_to_num(float("inf"))
    if worst.max() > 1:
        raise Fault("wrong result", f"error of {worst.max().item():.3g} budgets")


def hunt(mutant: Mutant, settings: tuple[str, ...] = tuple(SETTINGS)) -> Outcome:
    """Run a mutant under one setting after another until it is found."""
    kernel = Gemm(original(mutant.configuration))
    mutant.edit(kernel)
    for name in settings:
        try:
            run(kernel, mutant.configuration, SETTINGS[name])
        except Fault as fault:
            return Outcome(fault.check, name, str(fault))
        except EmulatorError as error:
            return Outcome("refused", name, str(error))
    return Outcome("")


# The record --------------------------------------------------

_HEAD = """# Mutants of NVIDIA's NVFP4 GEMMs

Kernels of `nvidia-cutlass-operators` for sm_100a with one fault each (tests/emulator/mutations/),
as run by `python -m tests.emulator.mutants`, which writes this file. Each runs on a problem of
three tiles a CTA until something is found, in this order: {settings}.
The unchanged kernels pass all of these. *Caught by* is the emulator's check: a fault by name, a
deadlock, or a result outside its error budget.

**{caught} of {all} caught ({rate:.1f}%).** {checks}
"""
_MARK = "**survives**"


def write(found: dict[Mutant, Outcome]) -> None:
    """Write results/mutants.md."""
    caught = [each.check for each in found.values() if each.check]
    counts = sorted(Counter(caught).items(), key=lambda item: (-item[1], item[0]))
    head = _HEAD.format(
        settings=", ".join(SETTINGS), caught=len(caught), all=len(found),
        rate=100 * len(caught) / len(found),
        checks="; ".join(f"{check} {count}" for check, count in counts) + ".",
    )  # fmt: skip
    lines = [head, "| Fault | Mutant | Kernel | Caught by | Under |", "| --- " * 5 + "|"]
    for mutant in sorted(found, key=lambda m: (m.fault, m.name, str(m.configuration))):
        outcome = found[mutant]
        cells = (
            mutant.fault, mutant.name, str(mutant.configuration), outcome.check or _MARK,
            outcome.setting,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "## Survivors", ""]
    lines += [
        f"- {mutant}: {mutant.survives or 'not explained'}"
        for mutant, outcome in found.items()
        if not outcome.check
    ]
    refused = [(m, o) for m, o in found.items() if o.check == "refused"]
    if refused:
        lines += ["", "## Refused", "", "Caught because the emulator names what it refuses:", ""]
        lines += [f"- {mutant}: {outcome.message.splitlines()[0]}" for mutant, outcome in refused]
    RESULTS.write_text("\n".join(lines) + "\n")


def recorded() -> dict[str, Outcome]:
    """The outcomes in results/mutants.md, by the name of the mutant."""
    found = {}
    for line in RESULTS.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] not in ("Fault", "---"):
            _, name, kernel, check, setting = cells
            found[f"{name} [{kernel}]"] = Outcome("" if check == _MARK else check, setting)
    return found


def main(words: list[str]) -> None:
    """Hunt all and write them down, or show those whose name has all these words."""
    found = {}
    for mutant in MUTANTS:
        if not all(word in str(mutant) for word in words):
            continue
        start = time.perf_counter()
        found[mutant] = hunt(mutant)
        seconds = time.perf_counter() - start
        print(f"{seconds:5.2f} s {mutant}: {found[mutant].check or 'survives'}", flush=True)
        if words:
            print(found[mutant].message)
    if not words:
        write(found)


if __name__ == "__main__":
    main(sys.argv[1:])
