"""Objects of compiled host code, linked with the shim and called."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.emulator.errors import ArgumentsError, UnsupportedError
from tests.emulator.launch import Launch

SHARED_LIMIT = {"sm_120": 101376, "sm_121": 101376, "sm_89": 101376, "sm_80": 166912}
"""Shared memory a block can opt in to, in bytes (CUDA programming guide, compute capabilities)."""

_MAX_SHARED, _SM_COUNT, _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 97, 16, 75, 76
_CLUSTER, _COOPERATIVE = 4, 2
"""Numbers of device and launch attributes (cuda_runtime_api.h)."""


class _Dim(ctypes.Structure):
    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]

    def values(self) -> tuple[int, int, int]:
        return self.x, self.y, self.z


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", _Dim),
        ("block", _Dim),
        ("shared", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


_Pointers = ctypes.POINTER(ctypes.c_void_p)
_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_void_p, _Pointers)
_KERNEL = ctypes.CFUNCTYPE(ctypes.c_int, _Pointers, ctypes.c_void_p, ctypes.c_char_p)
_ATTRIBUTE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.c_int)


@functools.cache
def _folder() -> Path:
    """Where libraries live until the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="fos-emulator-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[Any] = []


def _compiler() -> str:
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return name
    raise ArgumentsError(
        "the emulator needs a C compiler to link host code: none of cc, gcc, clang"
    )


@functools.cache
def _shim() -> Path:
    target = _folder() / "shim.o"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([_compiler(), "-O1", "-fPIC", "-c", "-o", target, source], check=True)
    return target


def link(code: bytes, libraries: tuple[str, ...] = ()) -> Path:
    """A shared library of an object file and the shim."""
    name = hashlib.sha256(code).hexdigest()[:24]
    target = _folder() / f"{name}.so"
    if not target.exists():
        source = _folder() / f"{name}.o"
        source.write_bytes(code)
        command = [_compiler(), "-shared", "-fPIC", "-Wl,-Bsymbolic", "-o", target, source, _shim()]
        done = subprocess.run([*command, *libraries], check=False, capture_output=True, text=True)
        if done.returncode:
            raise UnsupportedError(f"host code does not link with the shim:\n{done.stderr[-2000:]}")
    return target


class Library:
    """Host code in memory; `sizes` are bytes of each kernel's parameters, from the PTX."""

    def __init__(self, path: Path, arch: str, sizes: dict[str, list[int]], sm_count: int) -> None:
        self.path = path
        self.arch = arch
        self.sizes = sizes
        self.sm_count = sm_count
        self.handle = ctypes.CDLL(str(path))
        self._kernels: dict[int, str] = {}
        self._launches: list[Launch] = []
        self._error: BaseException | None = None
        # ctypes forgets callbacks that nobody holds, and host code would then jump nowhere.
        self._callbacks = (
            _LAUNCH(self._guarded(self._on_launch)),
            _KERNEL(self._guarded(self._on_kernel)),
            _ATTRIBUTE(self._guarded(self._on_attribute)),
        )
        self.handle.emulator_set(*self._callbacks)

    def _guarded(self, function: Callable[..., None]) -> Callable[..., int]:
        """An exception cannot pass through C: keep it for :meth:`capturing`."""

        def called(*arguments: Any) -> int:
            try:
                function(*arguments)
            except BaseException as error:
                self._error = self._error or error
                return 1
            return 0

        return called

    @contextmanager
    def capturing(self) -> Iterator[list[Launch]]:
        """Collect what is launched inside; raises what went wrong in a callback."""
        self._launches, self._error = [], None
        try:
            yield self._launches
        finally:
            error, self._error = self._error, None
            if error is not None:
                raise error

    def _on_kernel(self, kernel: Any, library: Any, name: bytes) -> None:
        found = name.decode()
        if found not in self.sizes:
            raise UnsupportedError(f"host code asks for kernel {found}, which is not in the PTX")
        number = 0x2000 + 16 * len(self._kernels)
        self._kernels[number] = found
        kernel[0] = number

    def _on_attribute(self, value: Any, attribute: int) -> None:
        major, minor = self.arch.removeprefix("sm_").rstrip("af")[:-1], self.arch.rstrip("af")[-1]
        family = self.arch.rstrip("af")
        known = {
            _MAX_SHARED: SHARED_LIMIT.get(family, 232448),
            _SM_COUNT: self.sm_count,
            _CAPABILITY_MAJOR: int(major),
            _CAPABILITY_MINOR: int(minor),
        }
        if attribute not in known:
            raise UnsupportedError(f"host code asks for device attribute {attribute}")
        value[0] = known[attribute]

    def _on_launch(self, config: Any, kernel: int, arguments: Any) -> None:
        asked = config.contents
        name = self._kernels[kernel]
        attributes = {a.id: a.value for a in asked.attributes[: asked.count]}
        cluster = tuple(attributes[_CLUSTER][:3]) if _CLUSTER in attributes else (1, 1, 1)
        params = tuple(ctypes.string_at(arguments[i], n) for i, n in enumerate(self.sizes[name]))
        cooperative = bool(attributes[_COOPERATIVE][0]) if _COOPERATIVE in attributes else False
        self._launches.append(
            Launch(
                name, asked.grid.values(), asked.block.values(),
                tuple(max(n, 1) for n in cluster),  # type: ignore[arg-type]
                asked.shared, params, cooperative,
            )
        )  # fmt: skip
