"""Build ``quantize.cpp`` once per machine and source, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from fos_compile.kernels.op import Status

SOURCE = Path(__file__).with_name("quantize.cpp")
# No fast-math, and no contraction: every operation rounds as docs/contract.md says.
FLAGS = (
    "-O3", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-pthread",
)  # fmt: skip
# Tried in order: not every compiler knows the name of the machine.
_EXTRAS = (("-march=native",), ())


@functools.cache
def library() -> ctypes.CDLL | Status:
    """The loaded library, or why there is none. Builds in about two seconds, once."""
    if os.environ.get("FOS_CPU_KERNEL") == "0":
        return Status("cpu kernel switched off by FOS_CPU_KERNEL=0")
    compiler = next(filter(None, map(shutil.which, _compilers())), None)
    if compiler is None:
        return Status("no C++ compiler (set CXX, or install g++ or clang++)")
    path = _cache() / f"quantize-{_key(compiler)}.so"
    if not path.exists():
        problem = _build(compiler, path)
        if problem:
            return Status(f"{compiler} failed: {problem}")
    try:
        built = ctypes.CDLL(str(path))
    except OSError as error:
        path.unlink(
            missing_ok=True
        )  # a truncated or foreign file: the next process builds it again
        return Status(f"cannot load {path.name}: {error}")
    built.fos_amax.restype = ctypes.c_float
    return built


def loaded() -> ctypes.CDLL:
    """The library, for callers that asked :func:`status` first."""
    found = library()
    assert not isinstance(found, Status), found.reason
    return found


def status() -> Status:
    """Truthy if the CPU kernel serves; falsy with the reason if not."""
    found = library()
    return found if isinstance(found, Status) else Status()


def _compilers() -> list[str]:
    return [c for c in (os.environ.get("CXX"), "g++", "clang++", "c++") if c]


def _cache() -> Path:
    root = (
        os.environ.get("FOS_CACHE_DIR")
        or os.environ.get("XDG_CACHE_HOME")
        or Path.home() / ".cache"
    )
    return Path(root) / "fos_compile" / "cpu"


def _key(compiler: str) -> str:
    """Source, flags, compiler and processor: a home directory may be shared between machines."""
    try:
        model = next((line for line in open("/proc/cpuinfo") if line.startswith("flags")), "")
    except OSError:
        model = platform.processor()
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=False
    ).stdout
    parts = (SOURCE.read_text(), *FLAGS, str(_EXTRAS), version, platform.machine(), model)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _build(compiler: str, path: Path) -> str:
    """Compile to ``path`` by an atomic rename; returns the compiler's complaint, or nothing."""
    complaint = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for extra in _EXTRAS:
            handle, scratch = tempfile.mkstemp(suffix=".so", dir=path.parent)
            os.close(handle)
            command = [compiler, *FLAGS, *extra, "-o", scratch, str(SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                os.replace(scratch, path)
                return ""
            os.unlink(scratch)
            complaint = (
                done.stderr.strip().splitlines()[-1]
                if done.stderr.strip()
                else f"exit {done.returncode}"
            )
    except OSError as error:
        return str(error)
    return complaint
