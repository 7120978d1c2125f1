"""Kernels of the test ladder, and what they share: placeholders and how they are compiled.

`compile_x(arch, ...)` of a module returns what `cute.compile` returned; its docstring lists the
arguments that the host side is called with, without the stream that follows them. The text of the
PTX is in `__ptx__`, with a `.loc` for every line of a kernel.
"""

import ctypes
import tempfile
from typing import Any

from cutlass import cute
from cutlass.cute.runtime import find_runtime_libraries, make_fake_stream, make_fake_tensor

from fos_compile.kernels.cute import conversions


def compiled(arch: str, launch: Any, *arguments: Any) -> Any:
    """Compile a `cute.jit` function for an architecture; the stream is its last argument."""
    # `export_to_c` links against it, and the DSL itself loads it only for its default architecture.
    for library in find_runtime_libraries(enable_tvm_ffi=False):
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    with conversions.target(arch), tempfile.TemporaryDirectory() as folder:
        options = f"--gpu-arch {arch} --keep-ptx --generate-line-info --dump-dir {folder}"
        return cute.compile(launch, *arguments, make_fake_stream(), options=options)


def vector(dtype: Any, align: int | None = None) -> Any:
    """Placeholder for a contiguous tensor [n]."""
    return make_fake_tensor(dtype, (cute.sym_int32(),), (1,), assumed_align=align)


def matrix(dtype: Any) -> Any:
    """Placeholder for a tensor [R, C] of any strides."""
    shape = tuple(cute.sym_int32() for _ in range(2))
    return make_fake_tensor(dtype, shape, tuple(cute.sym_int64() for _ in range(2)))
