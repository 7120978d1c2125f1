"""What stands for the CUDA runtime: answers host code's questions and records its launches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.emulator.errors import EmulatorError, UnsupportedError
from tests.emulator.host.device import STATIC_SHARED_LIMIT, attributes
from tests.emulator.launch import Launch
from tests.emulator.ptx.syntax import Entry, Module

_FAILED = 999  # cudaErrorUnknown; the exception says more
_LIBRARY = 0x1000
_STATIC_SHARED = 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES
_MAX_DYNAMIC_SHARED = 8  # cudaFuncAttributeMaxDynamicSharedMemorySize
_IGNORED_SETTINGS = {9, 14}  # carve-out; clusters of more than 8 CTAs
_COOPERATIVE, _CLUSTER = 2, 4
_IGNORED_ATTRIBUTES = {0, 5, 6, 8}
"""Padding, cluster scheduling, programmatic stream serialization (launches here never overlap) and
priority: none changes what a kernel computes."""


class _Dim(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))

    def values(self) -> tuple[int, int, int]:
        return self.x, self.y, self.z


class _Attribute(ctypes.Structure):
    """cudaLaunchAttribute: of `value` only the bytes that belong to the id mean anything."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_ubyte * 64))


class _Config(ctypes.Structure):
    """cudaLaunchConfig_t."""

    _fields_ = (
        ("grid", _Dim),
        ("block", _Dim),
        ("shared_bytes", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_P, _I = ctypes.c_void_p, ctypes.c_int
_SIGNATURES = {
    "load": (ctypes.POINTER(_P), _P),
    "kernel": (ctypes.POINTER(_P), _P, ctypes.c_char_p),
    "device_attribute": (ctypes.POINTER(_I), _I),
    "kernel_attribute": (ctypes.POINTER(_I), _I, _P),
    "set_attribute": (_P, _I, _I),
    "launch": (ctypes.POINTER(_Config), _P, ctypes.POINTER(_P)),
    "print": (ctypes.c_char_p,),
}
"""Of the members of `callbacks` in shim.c, in their order."""
_TYPES = {name: ctypes.CFUNCTYPE(_I, *types) for name, types in _SIGNATURES.items()}


class _Callbacks(ctypes.Structure):
    _fields_ = tuple(_TYPES.items())


class Runtime:
    """The CUDA runtime of one library of host code."""

    def __init__(self, module: Module, sm_count: int) -> None:
        self.module = module
        self.launches: list[Launch] = []
        self._attributes = attributes(module.target, sm_count)
        self._kernels: dict[int, Entry] = {}
        self._dynamic_limit: dict[int, int] = {}
        self._error: BaseException | None = None
        self._printed = ""
        # ctypes keeps no reference to a callback that C holds.
        functions = {name: getattr(self, f"_{name}") for name in _TYPES}
        self._callbacks = _Callbacks(
            **{name: _TYPES[name](self._guarded(function)) for name, function in functions.items()}
        )

    def connect(self, library: ctypes.CDLL) -> None:
        """Make the shim of a library ask here."""
        library.emulator_connect(ctypes.byref(self._callbacks))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While host code runs: what went wrong in a callback is raised here, after the call.

        An exception cannot cross C, which sees an error code instead and may raise its own.
        """
        self.launches, self._error, self._printed = [], None, ""
        try:
            yield
        except Exception as error:
            if self._error is None and self._printed:
                error.add_note(f"host code printed: {self._printed.strip()}")
            if self._error is None:
                raise
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def succeeded(self, code: int, what: str) -> None:
        """Raise if host code returned an error that no callback explains."""
        if code and self._error is None:
            raise EmulatorError(f"{what} returned CUDA error {code}. {self._printed.strip()}")

    def _guarded(self, function: Callable[..., None]) -> Callable[..., int]:
        def guarded(*arguments: Any) -> int:
            try:
                function(*arguments)
            except BaseException as error:  # KeyboardInterrupt, too, would be swallowed by C
                self._error = self._error or error
                return _FAILED
            return 0

        return guarded

    # What the shim asks for ------------------------------------------------------------------

    def _load(self, library: Any, code: int) -> None:
        library[0] = _LIBRARY

    def _kernel(self, kernel: Any, library: int, name: bytes) -> None:
        entry = self.module.entries.get(name.decode())
        if entry is None:
            known = ", ".join(self.module.entries) or "no entry"
            raise EmulatorError(
                f"host code launches {name.decode()}, but the PTX has {known}: was it dumped to a "
                f"folder that others write to?"
            )
        handle = _LIBRARY + 1 + len(self._kernels)
        self._kernels[handle] = entry
        kernel[0] = handle

    def _device_attribute(self, value: Any, attribute: int) -> None:
        if attribute not in self._attributes:
            raise UnsupportedError(f"host code asks for device attribute {attribute}")
        value[0] = self._attributes[attribute]

    def _kernel_attribute(self, value: Any, attribute: int, kernel: int) -> None:
        if attribute != _STATIC_SHARED:
            raise UnsupportedError(f"host code asks for attribute {attribute} of a kernel")
        value[0] = self._kernels[kernel].static_shared

    def _set_attribute(self, kernel: int, attribute: int, value: int) -> None:
        if attribute == _MAX_DYNAMIC_SHARED:
            self._check_shared(self._kernels[kernel], value, self._attributes[97])
            self._dynamic_limit[kernel] = value
        elif attribute not in _IGNORED_SETTINGS:
            raise UnsupportedError(f"host code sets attribute {attribute} of a kernel to {value}")

    def _print(self, text: bytes) -> None:
        self._printed += text.decode(errors="replace")

    def _launch(self, config: Any, kernel: int, arguments: Any) -> None:
        entry, given = self._kernels[kernel], config.contents
        cluster, cooperative = None, False
        for attribute in given.attributes[: given.count]:
            values = ctypes.cast(attribute.value, ctypes.POINTER(ctypes.c_int))
            if attribute.id == _CLUSTER:
                cluster = values[0], values[1], values[2]
            elif attribute.id == _COOPERATIVE:
                cooperative = bool(values[0])
            elif attribute.id not in _IGNORED_ATTRIBUTES:
                raise UnsupportedError(f"launch attribute {attribute.id} of {entry.name}")
        launch = Launch(
            kernel=entry.name,
            grid=given.grid.values(),
            block=given.block.values(),
            cluster=self._cluster(entry, cluster),
            shared_bytes=given.shared_bytes,
            params=tuple(
                ctypes.string_at(arguments[i], parameter.size)
                for i, parameter in enumerate(entry.parameters)
            ),
            cooperative=cooperative,
        )
        limit = self._dynamic_limit.get(kernel, STATIC_SHARED_LIMIT - entry.static_shared)
        self._check_shared(entry, launch.shared_bytes, limit + entry.static_shared)
        self._check_sizes(launch)
        self.launches.append(launch)

    # What CUDA would refuse ------------------------------------------------------------------

    def _cluster(self, entry: Entry, given: tuple[int, int, int] | None) -> tuple[int, int, int]:
        compiled = entry.directives.get("reqnctapercluster")
        if not compiled:
            return given or (1, 1, 1)
        x, y, z = (*compiled, 1, 1)[:3]
        if given not in (None, (x, y, z)):
            raise EmulatorError(
                f"{entry.name} is compiled for clusters of {(x, y, z)}, launched with {given}"
            )
        return x, y, z

    def _check_shared(self, entry: Entry, dynamic: int, limit: int) -> None:
        total = entry.static_shared + dynamic
        if total > limit:
            raise EmulatorError(
                f"{entry.name} wants {total} bytes of shared memory ({dynamic} dynamic); "
                f"{limit} are allowed on {self.module.target}"
            )

    def _check_sizes(self, launch: Launch) -> None:
        known = self._attributes
        threads = launch.block[0] * launch.block[1] * launch.block[2]
        for name, sizes, limits in (
            ("block", launch.block, (known[2], known[3], known[4])),
            ("grid", launch.grid, (known[5], known[6], known[7])),
        ):
            if any(not 0 < size <= limit for size, limit in zip(sizes, limits, strict=True)):
                raise EmulatorError(f"{launch.kernel}: {name} {sizes} is not in 1..{limits}")
        if threads > known[1]:
            raise EmulatorError(f"{launch.kernel}: {threads} threads a CTA, at most {known[1]}")
        if any(g % c for g, c in zip(launch.grid, launch.cluster, strict=True)):
            raise EmulatorError(
                f"{launch.kernel}: grid {launch.grid} is no multiple of cluster {launch.cluster}"
            )
