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


@instruction("nanosleep")
def _nanosleep(decoder: Decoder) -> Step:
    decoder.type("u32")
    decoder.count(1)
    decoder.source(0, 32)
    return lambda warp: None


_PREFETCHES = frozenset(
    [(*space, level) for space in ((), ("global",), ("local",)) for level in ("L1", "L2")]
    + [("global", "L2::evict_last"), ("global", "L2::evict_normal")]
    + [(*space, "tensormap") for space in ((), ("const",), ("param",))]
)
_HINTS = {
    "prefetch": _PREFETCHES,
    "prefetchu": frozenset([("L1",)]),
    "applypriority": frozenset([("global", "L2::evict_normal"), ("L2::evict_normal",)]),
}


@instruction(*_HINTS)
def _hint(decoder: Decoder) -> Step:
    """Hints to caches; a `discard` is none, for it destroys what memory holds."""
    form = tuple(decoder.left)
    if form not in _HINTS[decoder.opcode]:
        raise decoder.refuse("this form")
    decoder.left = []
    decoder.count(2 if decoder.opcode == "applypriority" else 1)
    decoder.address(0)
    return lambda warp: None


@instruction("griddepcontrol")
def _griddepcontrol(decoder: Decoder) -> Step:
    """Launches run one after the other here, so there is nothing to wait for."""
    if not decoder.choice(("wait", "launch_dependents")):
        raise decoder.refuse("an action")
    return lambda warp: None


_SECONDARY = ("L2::evict_first", "L2::evict_unchanged")
_PRIMARY = ("L2::evict_last", "L2::evict_normal", *_SECONDARY)


@instruction("createpolicy")
def _createpolicy(decoder: Decoder) -> Step:
    """A cache hint: its bits are never looked at."""
    form = decoder.choice(("fractional", "range", "cvt"))
    decoder.type("b64")
    if form == "cvt":
        decoder.count(2)
        known = decoder.flag("L2")
    else:
        decoder.count(*((1, 2) if form == "fractional" else (4,)))
        if form == "range":
            decoder.flag("global")
        primary, *secondary = decoder.left or [""]
        known = bool(form) and primary in _PRIMARY
        known &= not secondary or (len(secondary) == 1 and secondary[0] in _SECONDARY)
        decoder.left = []
    if not known:
        raise decoder.refuse("this form")
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
