"""What an architecture does in hardware, while a kernel for it is traced.

Kernels are one source for all architectures; where Blackwell has an instruction for what others
compute, they ask here. What older devices lack is computed by `emulated` behind the functions of
`ptx`. `build.compiled` says for which architecture it traces, so nothing of it appears in
signatures; outside of that a Hopper is assumed.
"""

import contextlib
import contextvars
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any

_BLACKWELL = ("sm_100a", "sm_103a", "sm_120a", "sm_121a")
"""With `cvt.rn.satfinite.e2m1x2.f32` and `add.f32x2` (PTX ISA: cvt, add)."""
STOCHASTIC = ("sm_100a", "sm_103a")
"""With `cvt.rs.satfinite.e2m1x4.f32` (PTX ISA: cvt)."""
_arch = contextvars.ContextVar("arch", default="sm_90a")


@contextlib.contextmanager
def target(arch: str) -> Iterator[None]:
    """Trace for an architecture: ``sm_100a``."""
    token = _arch.set(arch)
    try:
        yield
    finally:
        _arch.reset(token)


def has_f32x2() -> bool:
    """Whether an instruction computes with two float32."""
    return _arch.get() in _BLACKWELL


def has_e2m1() -> bool:
    """Whether float32 is rounded to E2M1 by an instruction."""
    return _arch.get() in _BLACKWELL


def has_fp8() -> bool:
    """Whether E4M3 and E5M2 are converted by instructions."""
    return _number() >= 89


def has_sm_90() -> bool:
    """Whether there are integers and sums in pairs of 16 bits, and `stmatrix`."""
    return _number() >= 90


def emulated_unless(
    has: Callable[[], bool],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate an instruction that `has` knows of: `emulated` has a function of the same name."""

    def either(instruction: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(instruction)
        def chosen(*operands: Any) -> Any:
            if has():
                return instruction(*operands)
            emulated = importlib.import_module("fos_compile.kernels.cute.emulated")
            return getattr(emulated, instruction.__name__)(*operands)

        return chosen

    return either


def _number() -> int:
    """Of the architecture: 90."""
    found = re.match(r"sm_(\d+)", _arch.get())
    if found is None:
        raise ValueError(f"an architecture looks like sm_90a, got {_arch.get()!r}")
    return int(found[1])
