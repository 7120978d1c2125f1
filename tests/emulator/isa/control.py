"""Branches and the ends of threads; instructions without an effect here."""

from __future__ import annotations

from tests.emulator.errors import Fault
from tests.emulator.isa.decoder import Decoder, instruction
from tests.emulator.machine.signals import Outcome, Signal, Step
from tests.emulator.machine.warp import Warp


@instruction("bra")
def _bra(decoder: Decoder) -> Step:
    decoder.flag("uni")
    decoder.count(1)
    target = decoder.label(0)
    return lambda warp: target


@instruction("ret", "exit")
def _exit(decoder: Decoder) -> Step:
    decoder.flag("uni")
    decoder.count(0)
    return lambda warp: Signal.EXIT


@instruction("trap", "brkpt")
def _trap(decoder: Decoder) -> Step:
    decoder.count(0)

    def step(warp: Warp) -> Outcome:
        raise Fault("trap", "the kernel stopped itself")

    return step


@instruction("nanosleep", "prefetch", "prefetchu", "applypriority", "discard")
def _nothing(decoder: Decoder) -> Step:
    """Timing and hints: prefetches of tensor maps and of L2."""
    decoder.left.clear()
    return lambda warp: None


@instruction("griddepcontrol")
def _griddepcontrol(decoder: Decoder) -> Step:
    """Launches run one after the other here, so there is nothing to wait for."""
    if not decoder.choice(("wait", "launch_dependents")):
        raise decoder.refuse("an action")
    return lambda warp: None


@instruction("createpolicy")
def _createpolicy(decoder: Decoder) -> Step:
    """A cache hint: its bits are never looked at."""
    decoder.left.clear()
    destination, value = decoder.destination(0, 64), decoder.file.constant(0, 64)

    def step(warp: Warp) -> None:
        warp.put(destination, warp.r[value], -1)

    return step


@instruction("setmaxnreg")
def _setmaxnreg(decoder: Decoder) -> Step:
    action = decoder.choice(("inc", "dec"))
    if not (action and decoder.flag("sync") and decoder.flag("aligned")):
        raise decoder.refuse("this form")
    decoder.type("u32")
    decoder.count(1)
    count = decoder.operands[0]
    value = getattr(count, "value", -1)
    if value % 8 or not 24 <= value <= 256:
        raise decoder.refuse(f"{value} registers (a multiple of 8 from 24 to 256)")

    def step(warp: Warp) -> Outcome:
        return None if warp.mask == warp.live else Signal.PARK

    return step
