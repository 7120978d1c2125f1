"""Operators of the library ``fos``: schemas, eager references, fakes, costs (docs/contract.md).

Importing this package registers the operators and nothing else: no cutlass, no triton.
"""

from __future__ import annotations

if __name__ != "fos_compile.kernels":
    raise ImportError(
        f"this package is installed as fos_compile.kernels but was imported as {__name__!r}, which "
        "would register its operators twice; run from outside the source tree or set "
        "PYTHONSAFEPATH=1"
    )

from fos_compile.kernels.amax import AMAX
from fos_compile.kernels.cpu.launch import register as register_cpu
from fos_compile.kernels.cuda import register as register_cuda
from fos_compile.kernels.dequantize import DEQUANTIZE
from fos_compile.kernels.errors import FosError, InvalidArgument, UnsupportedArgument
from fos_compile.kernels.formats import qs_of
from fos_compile.kernels.op import REGISTRY, Cost, Op, Status
from fos_compile.kernels.outlined import define_outlined
from fos_compile.kernels.quantize import QUANTIZE
from fos_compile.kernels.quantize_pair import QUANTIZE_PAIR
from fos_compile.kernels.scaled_mm import SCALED_MM
from fos_compile.kernels.seed import SEED
from fos_compile.kernels.unpacked_mm import UNPACKED_MM

register_cpu()
register_cuda()
define_outlined()

__all__ = [
    "AMAX",
    "DEQUANTIZE",
    "QUANTIZE",
    "QUANTIZE_PAIR",
    "REGISTRY",
    "SCALED_MM",
    "SEED",
    "UNPACKED_MM",
    "Cost",
    "FosError",
    "InvalidArgument",
    "Op",
    "Status",
    "UnsupportedArgument",
    "qs_of",
]
