"""Host code behind a TVM-FFI entry, called as its users call it.

It checks that tensors are on a CUDA device; the ones here are on the CPU and say that they are not.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import dlpack

_CUDA = 2
"""kDLCUDA of dlpack.h."""


def libraries() -> tuple[str, ...]:
    """What an object with a TVM-FFI entry is linked with."""
    import tvm_ffi

    path = tvm_ffi.libinfo.find_libtvm_ffi()
    return (path, f"-Wl,-rpath,{Path(path).parent}")


@functools.cache
def _module(path: Path) -> Any:
    import tvm_ffi

    return tvm_ffi.load_module(str(path))


class _Disguised:
    """A CPU tensor that claims to be on cuda:0."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        # Sizes of one-element dimensions say nothing in DLPack; strides are kept as they are.
        capsule = dlpack.to_dlpack(self.tensor.detach())
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        managed = get(capsule, b"dltensor")
        # DLTensor starts with its data pointer; the device follows: type and number.
        device = ctypes.cast(managed + 8, ctypes.POINTER(ctypes.c_int32))
        device[0], device[1] = _CUDA, 0
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, 0


def call(path: Path, name: str, arguments: tuple[Any, ...]) -> None:
    """Call a function of a library; tensors keep their memory."""
    import tvm_ffi

    values = [
        tvm_ffi.from_dlpack(_Disguised(value)) if isinstance(value, torch.Tensor) else value
        for value in arguments
    ]
    _module(path)[name](*values)
