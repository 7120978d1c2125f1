"""Host side of ``quantize_tiles``: how it is compiled; it is launched as ``quantize_blocks`` is."""

from typing import Any

from fos_compile.kernels.cute.cache import KernelKey
from fos_compile.kernels.cute.host_general import options_of
from fos_compile.kernels.cute.host_quantize_blocks import arguments, prepare

__all__ = ["prepare", "signature"]


def signature(key: KernelKey) -> tuple[Any, list[Any]]:
    """The kernel and what it is compiled for; sizes are symbolic."""
    from fos_compile.kernels.cute.contract import Rules
    from fos_compile.kernels.cute.quantize_tiles import QuantizeTiles

    options = options_of(key)
    rules = Rules(*(options[name] for name in Rules._fields))
    return QuantizeTiles(rules, rht=options["rht"]), arguments(key)
