"""Run what ``cute.compile`` returned: real host code, real PTX, torch CPU tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tests.emulator.errors import Fault
from tests.emulator.host import Host, load
from tests.emulator.host.arguments import storage
from tests.emulator.launch import Launch
from tests.emulator.machine.global_memory import GlobalMemory, Range
from tests.emulator.machine.program import Program, Settings

DEFAULTS: ContextVar[Settings | None] = ContextVar("DEFAULTS", default=None)
"""Settings of calls that name none."""


@dataclass(frozen=True)
class Run:
    """What ran: its launches, and instructions executed, counted once a warp."""

    launches: list[Launch]
    executed: int


def emulate(
    compiled: Any,
    *arguments: Any,
    outputs: Sequence[Tensor] = (),
    memory: Sequence[Tensor] = (),
    settings: Settings | None = None,
    sm_count: int = 4,
    write_once: bool = True,
) -> Run:
    """Run a compiled CuTe-DSL function on CPU tensors, in place.

    Args:
        compiled: What ``cute.compile`` returned, with its PTX kept (``--keep-ptx``), or a
            :class:`~tests.emulator.host.Host` of it.
        arguments: Those of the host function without its stream. Tensors are on the CPU; their
            elements are all the global memory that the kernel may touch.
        outputs: Tensors that start undefined and of which every element must be written.
        memory: Tensors that the kernel reaches by address, where arguments are numbers.
        settings: How to run.
        sm_count: How many SMs the device claims to have.
        write_once: Whether to fault if an output's element is written again, in order or not.

    Raises:
        Fault: What the kernel did wrong, with its place.
        UnsupportedError: What the emulator does not implement.
        ArgumentsError: Arguments that do not fit.
    """
    settings = settings or DEFAULTS.get() or Settings()
    host = compiled if isinstance(compiled, Host) else load(compiled, sm_count)
    space = GlobalMemory()
    wanted = {t.data_ptr() for t in outputs}
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    for index, tensor in enumerate([*tensors, *memory, *outputs]):
        base, owned = storage(tensor)
        if len(owned):
            name = f"tensor {index} {tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")
            space.add(name, base, owned.numpy(), output=base in wanted)
    launches = host.launches(*arguments)
    executed = 0
    for launch in launches:
        space.start_launch()
        executed += Program(host.module, launch, space).run(settings)
    for each in space.ranges:
        _check_output(each, write_once)
    return Run(launches, executed)


def _check_output(found: Range, write_once: bool) -> None:
    """Every byte of an output is written, with something defined, and once."""
    if not found.output:
        return
    for name, bad in (
        ("never written", found.owned & (found.owner == 0)),
        ("written undefined", found.owned & ~found.defined),
        ("written twice", found.twice & write_once),
    ):
        if bad.any():
            first = int(np.flatnonzero(bad)[0])
            raise Fault(
                "output",
                f"{int(bad.sum())} bytes of {found.name} were {name}, the first at byte {first}",
            )
