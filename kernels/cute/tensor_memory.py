"""PTX instructions of tensor memory (sm_100a, sm_103a)."""

from typing import Any

from cutlass import Float32
from cutlass.cute import arch


def load_32x32(address: Any) -> list[Any]:
    """32 neighbouring columns of this thread's lane, once they are there.

    The wait is part of the instruction here: what uses the registers could otherwise be moved
    ahead of it.
    """
    registers = ", ".join(f"{{$w{i}}}" for i in range(32))
    code = (
        f"tcgen05.ld.sync.aligned.32x32b.x32.b32 {{{registers}}}, [{{$r0}}]; "
        "tcgen05.wait::ld.sync.aligned;"
    )
    return list(arch.inline_ptx(code, write_only_types=[Float32] * 32, read_only_args=[address]))


def fence_before() -> None:
    """Order this thread's accesses of tensor memory before what it signals next."""
    arch.inline_ptx("tcgen05.fence::before_thread_sync;")


def fence_after() -> None:
    """Order this thread's next accesses of tensor memory after what it waited for."""
    arch.inline_ptx("tcgen05.fence::after_thread_sync;")
