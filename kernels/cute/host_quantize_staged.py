"""Host side of ``quantize_staged``: how it is compiled and launched."""

from typing import Any

from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute.cache import KernelKey

CTAS_PER_SM = 4


def signature(key: KernelKey) -> tuple[Any, list[Any]]:
    """The kernel and what it is compiled for; sizes are symbolic."""
    from cutlass import Int64, Uint32

    from fos_compile.kernels.cute.contract import Rules
    from fos_compile.kernels.cute.quantize_staged import QuantizeStaged, Side

    options = dict(key.options)
    shared = options["format"], options["scale_rule"]
    sides = [
        Side(Rules(*shared, options[f"rounding_{which}"], "1d"), options[f"rht_{which}"])
        if options.get(f"rounding_{which}")
        else None
        for which in ("row", "col")
    ]
    addresses = [Int64(0)] * 7
    numbers = [Uint32(0), Uint32(0), Uint32(0)]
    return QuantizeStaged(*sides), [
        general.fake_matrix(key), *addresses, *numbers, general.env_stream(),
    ]  # fmt: skip
