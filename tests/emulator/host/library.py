"""An object file of the DSL and the shim, linked and loaded into this process."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

from tests.emulator.errors import EmulatorError, UnsupportedError

_SHIM = Path(__file__).with_name("shim.c")


def linked(code: bytes) -> ctypes.CDLL:
    """The library of an object file; its calls of CUDA go to its own copy of the shim."""
    with tempfile.TemporaryDirectory() as folder:
        kernel, library = Path(folder, "kernel.o"), Path(folder, "kernel.so")
        kernel.write_bytes(code)
        # -Bsymbolic: the DSL's runtime in this process defines the same names. -z defs: a name that
        # nobody here defines is an error now, by name, and not a crash at its first call.
        command = ["cc", "-shared", "-Wl,-Bsymbolic", "-Wl,-z,defs", "-o", library, kernel]
        made = _run([*command, _shim(), *_ffi()])
        if made.returncode:
            missing = sorted(
                {
                    line.partition("undefined reference to ")[2].strip("`'")
                    for line in made.stderr.splitlines()
                    if "undefined reference to " in line
                }
            )
            if missing:
                raise UnsupportedError(
                    f"host code calls {', '.join(missing)}, which shim.c does not know"
                )
            raise EmulatorError(f"linking host code: {made.stderr}")
        return ctypes.CDLL(str(library))  # stays mapped when the file is gone


@functools.cache
def _shim() -> Path:
    """The compiled shim; the folder goes with the process."""
    path = Path(_folder().name, "shim.o")
    options = ["-O1", "-fPIC", "-fno-builtin", "-Wall", "-Wextra", "-Werror"]
    made = _run(["cc", *options, "-c", _SHIM, "-o", path])
    if made.returncode:
        raise EmulatorError(f"compiling {_SHIM}: {made.stderr}")
    return path


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="emulator-")


@functools.cache
def _ffi() -> list[str]:
    """How to link with TVM-FFI, whose own library the host code reports its errors to."""
    from tvm_ffi import libinfo

    found = libinfo.find_libtvm_ffi()
    return [found, f"-Wl,-rpath,{Path(found).parent}"]


def _run(command: list[str | Path]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise EmulatorError("a C compiler is needed: there is no cc here") from error
