"""Kernels to object files and back: the one place that calls the DSL's compiler.

An object file holds the cubin and a TVM-FFI function that launches it; the DSL links it in memory,
so neither a linker nor a driver is needed until the first launch, and the arch to compile for need
not be that of a device here.
"""

import importlib
import tempfile
from pathlib import Path
from typing import Any

from cutlass import cute
from cutlass.cute.runtime import load_module

from fos_compile.kernels.cute import conversions
from fos_compile.kernels.cute.cache import Kernel, KernelKey


def _host(key: KernelKey) -> Any:
    return importlib.import_module(f"fos_compile.kernels.cute.host_{key.name}")


def compiled(key: KernelKey, arch: str, extra: str = "") -> Any:
    """What the DSL makes of a kernel; `extra` are options of its compiler."""
    kernel, arguments = _host(key).signature(key)
    options = f"--enable-tvm-ffi --gpu-arch {arch} {extra}"
    with conversions.target(arch):
        return cute.compile(kernel, *arguments, options=options)


def counting(key: KernelKey, arch: str, counter: int) -> Kernel:
    """`quantize_filtered` as it adds undecided blocks to the int32 at address `counter`."""
    kernel, arguments = _host(key).signature(key)
    kernel.count = True
    with conversions.target(arch):
        run = cute.compile(kernel, *arguments, options=f"--enable-tvm-ffi --gpu-arch {arch}")

    def counted(x: Any, amax: int, values: int, scales: int, _: int, *rest: int) -> None:
        run(x, amax, values, scales, counter, *rest)

    return counted


def object_file(key: KernelKey, arch: str) -> bytes:
    """Compile for an architecture: about a second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        compiled(key, arch).export_to_c(str(path), function_name=key.name)
        return path.read_bytes()


def load(key: KernelKey, code: bytes) -> Kernel:
    """The function in an object file of :func:`object_file`: milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        path.write_bytes(code)
        return load_module(str(path), enable_tvm_ffi=True)[key.name]
