"""What an architecture does in hardware, while a kernel for it is traced.

Kernels are one source for all architectures; where Blackwell has an instruction for what others
compute, they ask here. `build.compiled` says for which architecture it traces, so nothing of it
appears in signatures; outside of that nothing is assumed.
"""

import contextlib
import contextvars
from collections.abc import Iterator

_BLACKWELL = ("sm_100a", "sm_103a", "sm_120a", "sm_121a")
"""With `cvt.rn.satfinite.e2m1x2.f32` and `add.f32x2` (PTX ISA: cvt, add)."""
_arch = contextvars.ContextVar("arch", default="")


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
