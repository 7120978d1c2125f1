"""Load the host code of a compiled CuTe-DSL function and call it."""

from __future__ import annotations

import re
import tempfile
from typing import Any

from cutlass.base_dsl.jit_executor import JitCompiledFunction
from cutlass.cutlass_dsl.tvm_ffi_provider import TVMFFIJitCompiledFunctionBase

from tests.emulator.errors import ArgumentsError
from tests.emulator.host.arguments import Signature, record_placeholders
from tests.emulator.host.calls import FfiFunction, PackedFunction
from tests.emulator.host.runtime import Runtime
from tests.emulator.launch import Launch
from tests.emulator.ptx.parser import parse

record_placeholders()


class Host:
    """A compiled function whose launches are recorded.

    Attributes:
        ptx: The text of its kernels.
        module: The same, parsed.
        arch: What it was compiled for: ``sm_100a``.
    """

    def __init__(self, compiled: Any, sm_count: int) -> None:
        self.ptx = _ptx(compiled)
        self.module = parse(self.ptx)
        self.arch = self.module.target
        self._signature = Signature(_name(compiled), compiled.execution_args)
        self._runtime = Runtime(self.module, sm_count)
        ffi = isinstance(compiled, TVMFFIJitCompiledFunctionBase)
        with tempfile.TemporaryDirectory() as folder:
            function = FfiFunction if ffi else PackedFunction
            self._function = function(compiled, self._signature, self._runtime, folder)

    def launches(self, *arguments: Any) -> list[Launch]:
        """Call the host code and return what it launched.

        Args:
            arguments: Those of the function, its stream left out or not: CPU tensors for tensors
                (float4 in uint8 or float4_e2m1fn_x2, float8 in its dtype or uint8), a tensor or an
                address for a pointer, numbers and tuples of them. Launches hold addresses only:
                keep the tensors.

        Raises:
            ArgumentsError: Their number, a dtype, a rank, a size, a stride or an alignment is not
                what the function was compiled for.
            UnsupportedError: Host code asks CUDA for what the shim does not know.
        """
        values = self._signature.bind(arguments)
        with self._runtime.listening():
            self._function(values)
        if not self._runtime.launches:
            raise ArgumentsError(f"{self._signature.name} launched no kernel for these arguments")
        return self._runtime.launches


def load(compiled: Any, sm_count: int = 4, arch: str | None = None) -> Host:
    """The host side of what ``cute.compile`` returned, or of an artifact that holds it.

    Args:
        compiled: With its PTX kept: compile with ``--keep-ptx --dump-dir <a private folder>``.
        sm_count: SMs that the device claims to have: few, for few CTAs of persistent kernels.
        arch: What it must have been compiled for, if given.
    """
    compiled = getattr(compiled, "compiled_obj", compiled)
    if not isinstance(compiled, JitCompiledFunction):
        raise ArgumentsError(
            f"what cute.compile returned is required, got {type(compiled).__name__}"
        )
    host = Host(compiled, sm_count)
    if arch not in (None, host.arch):
        raise ArgumentsError(f"compiled for {host.arch}, {arch} was asked for")
    return host


def _ptx(compiled: Any) -> str:
    text = (compiled.__ptx__ or "").rstrip("\0")  # the DSL's text ends with a NUL
    if ".entry" not in text:
        raise ArgumentsError(
            f"{_name(compiled)} was compiled without its PTX: pass options "
            f"'--keep-ptx --dump-dir <a private folder>' to cute.compile"
        )
    return text


def _name(compiled: Any) -> str:
    """Of the function or of the class it is a method of; the DSL mangles more into it."""
    name = compiled.function_name.removeprefix("cutlass_")
    method = re.search(r"([A-Z]\w*?)_object_at_", name)
    return method[1] if method else re.sub(r"_(Fake|Tensor|Ptr).*", "", name)
