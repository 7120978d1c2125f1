"""The real host code of compiled kernels, run on this machine.

A CuTe-DSL function compiles to an object file that computes grids, writes tensor maps and launches
its kernels through the CUDA runtime. Here that runtime is `shim.c`, which hands launches over
instead. `load(compiled)` takes what ``cute.compile`` returned; kernels compiled with TVM-FFI, as
those of the project are, are called through the same TVM-FFI entry that users call.

``--generate-line-info`` among the compile options makes messages name lines of the kernel's source.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from pathlib import Path
from typing import Any

from tests.emulator.errors import ArgumentsError
from tests.emulator.host import foreign
from tests.emulator.host.arguments import pack, parameters
from tests.emulator.host.library import Library, link
from tests.emulator.launch import Launch
from tests.emulator.ptx.parser import parse
from tests.emulator.ptx.syntax import Module

PREFIX = "emulated"


class Host:
    """Host code of one compiled function: `module` is its PTX, `arch` what it is for."""

    def __init__(self, compiled: Any, sm_count: int) -> None:
        text = compiled.__ptx__
        if not text:
            raise ArgumentsError("no PTX was kept: compile with --keep-ptx and --dump-dir")
        # The DSL's own text has a NUL at its end.
        self.module: Module = parse(text.rstrip("\0"))
        self.arch = self.module.target
        self.compiled = compiled
        self.foreign = hasattr(compiled, "_tvm_ffi_function")
        code = _object(compiled, self.foreign)
        libraries = foreign.libraries() if self.foreign else ()
        sizes = {e.name: [p.size for p in e.parameters] for e in self.module.entries.values()}
        self.library = Library(link(code, libraries), self.arch, sizes, sm_count)

    def launches(self, *arguments: Any) -> list[Launch]:
        """Call the host code; tensors are on the CPU, the stream is left out."""
        with self.library.capturing() as found:
            if self.foreign:
                foreign.call(self.library.path, PREFIX, arguments)
            else:
                self._call(arguments)
        if not found:
            raise ArgumentsError("the host code launched nothing for these arguments")
        return found

    def _call(self, arguments: tuple[Any, ...]) -> None:
        values = pack(parameters(self.compiled.c_header_arguments), arguments)
        handle = self.library.handle
        result = ctypes.c_int32(0)
        module = ctypes.c_void_p(0)
        pointer, device = ctypes.c_void_p(ctypes.addressof(module)), ctypes.c_int32(0)
        for name, parts in (
            ("cuda_init", (pointer, result)),
            ("cuda_load_to_device", (pointer, device, result)),
        ):
            handle[f"_mlir_{PREFIX}_{name}"](_addresses(parts))
            if result.value:
                raise ArgumentsError(f"{name} of the host code failed: {result.value}")
        entry = _entry(self.library.path)
        handle[entry](_addresses((*values, result)), len(values) + 1)
        if result.value:
            raise ArgumentsError(f"the host code failed: {result.value}")


def _addresses(values: tuple[Any, ...]) -> Any:
    return (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))


def _entry(path: Path) -> str:
    """The host function's symbol, from the dynamic string table."""
    names = re.findall(rb"_mlir_" + PREFIX.encode() + rb"__mlir_ciface_\w+", path.read_bytes())
    if not names:
        raise ArgumentsError("the object has no host function")
    return names[0].decode()


def _object(compiled: Any, is_foreign: bool) -> bytes:
    """The object file as the DSL exports it."""
    # Exporting links against it, and the DSL itself loads it only for its default architecture.
    from cutlass.cute.runtime import find_runtime_libraries

    for library in find_runtime_libraries(enable_tvm_ffi=False):
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{PREFIX}.o"
        if is_foreign:
            compiled.export_to_c(str(path), function_name=PREFIX)
        else:
            compiled.export_to_c(folder, PREFIX, function_prefix=PREFIX)
        return path.read_bytes()


def load(compiled: Any, sm_count: int = 4) -> Host:
    """Host code of what ``cute.compile`` returned; `sm_count` is what the device claims to have."""
    return Host(compiled, sm_count)
