"""Python values as compiled host code takes them.

The C interface passes every argument by address: a tensor as a struct of its pointer and those of
its sizes (int32) and strides (int64) that are not compiled in, in the order of dimensions.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.emulator.errors import ArgumentsError

_TENSOR = re.compile(
    r"typedef struct \{\s*void \*data;(?P<body>.*?)\}\s*\w+_Tensor_(?P<name>\w+)_t;", re.DOTALL
)
_SCALARS: dict[str, Any] = {
    "int8_t": ctypes.c_int8, "uint8_t": ctypes.c_uint8, "int16_t": ctypes.c_int16,
    "uint16_t": ctypes.c_uint16, "int32_t": ctypes.c_int32, "uint32_t": ctypes.c_uint32,
    "int64_t": ctypes.c_int64, "uint64_t": ctypes.c_uint64, "float": ctypes.c_float,
    "double": ctypes.c_double, "bool": ctypes.c_bool,
}  # fmt: skip


@dataclass(frozen=True)
class Parameter:
    """One argument of a host function."""

    name: str
    kind: str
    """``tensor``, ``pointer``, ``stream`` or a C type."""
    shapes: int = 0
    strides: int = 0
    shape_bits: int = 32


def parameters(header: Any) -> list[Parameter]:
    """Those of a compiled function, from what the DSL would write into a C header."""
    if header is None or header.error_msg is not None:
        reason = header.error_msg if header else "it has no arguments"
        raise ArgumentsError(f"the DSL cannot describe this function's arguments in C: {reason}")
    tensors = {}
    for found in _TENSOR.finditer("\n".join(header.declarations)):
        body = found["body"]
        shape = re.search(r"int(\d+)_t dynamic_shapes\[(\d+)\]", body)
        stride = re.search(r"dynamic_strides\[(\d+)\]", body)
        tensors[found["name"]] = (
            int(shape[2]) if shape else 0,
            int(stride[1]) if stride else 0,
            int(shape[1]) if shape else 32,
        )
    return [_parameter(text.strip(), tensors) for text in header.arguments]


def _parameter(text: str, tensors: dict[str, tuple[int, int, int]]) -> Parameter:
    kind, name = re.split(r"[\s*]+(?=\w+$)", text)
    kind = kind.strip()
    if "_Tensor_" in kind:
        return Parameter(name, "tensor", *tensors[name])
    if "tream" in kind:
        return Parameter(name, "stream")
    if "*" in text:
        return Parameter(name, "pointer")
    if kind not in _SCALARS:
        raise ArgumentsError(f"argument {name} of C type {kind} is not supported")
    return Parameter(name, kind)


def pack(wanted: list[Parameter], given: tuple[Any, ...]) -> list[Any]:
    """ctypes values to pass by address, streams filled in."""
    visible = [p for p in wanted if p.kind != "stream"]
    if len(given) != len(visible):
        names = ", ".join(p.name for p in visible)
        raise ArgumentsError(f"{len(visible)} arguments are required ({names}), got {len(given)}")
    values = iter(given)
    return [ctypes.c_void_p(0) if p.kind == "stream" else _packed(p, next(values)) for p in wanted]


def _packed(parameter: Parameter, value: Any) -> Any:
    if parameter.kind == "tensor":
        if not isinstance(value, Tensor):
            raise ArgumentsError(f"{parameter.name} must be a tensor, got {type(value).__name__}")
        return _tensor(parameter, value)
    if isinstance(value, Tensor):
        value = address(value, parameter.name)
    if parameter.kind == "pointer":
        return ctypes.c_void_p(value)
    return _SCALARS[parameter.kind](value)


def address(tensor: Tensor, name: str) -> int:
    """Where a CPU tensor's first element is."""
    if tensor.device.type != "cpu":
        raise ArgumentsError(f"{name} must be on the CPU, got {tensor.device}")
    return tensor.data_ptr()


def _tensor(parameter: Parameter, tensor: Tensor) -> Any:
    pointer = address(tensor, parameter.name)
    shape, strides = list(tensor.shape), list(tensor.stride())
    if parameter.shapes not in (0, len(shape)):
        raise ArgumentsError(
            f"{parameter.name} must have {parameter.shapes} dimensions whose size is not compiled "
            f"in, got {tuple(shape)}"
        )
    if parameter.strides == len(strides) - 1 and 1 in strides:
        # The contiguous dimension's stride is compiled in: the last of stride 1.
        del strides[len(strides) - 1 - strides[::-1].index(1)]
    elif parameter.strides == 0:
        strides = []
    if parameter.strides != len(strides):
        raise ArgumentsError(
            f"{parameter.name} must have {parameter.strides} strides that are not compiled in, got "
            f"{tensor.stride()}"
        )
    size = ctypes.c_int64 if parameter.shape_bits == 64 else ctypes.c_int32

    class Struct(ctypes.Structure):
        _fields_ = [
            ("data", ctypes.c_void_p),
            ("shapes", size * parameter.shapes),
            ("strides", ctypes.c_int64 * parameter.strides),
        ]

    sizes = (size * parameter.shapes)(*shape[: parameter.shapes])
    return Struct(pointer, sizes, (ctypes.c_int64 * parameter.strides)(*strides))


def storage(tensor: Tensor) -> tuple[int, torch.Tensor]:
    """Address of the first byte, and [bytes] bool: which of the span's bytes are elements."""
    owned = torch.zeros(0, dtype=torch.bool)
    if not tensor.numel():
        return tensor.data_ptr(), owned
    size = tensor.element_size()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((n - 1) * s for n, s in steps)
    owned = torch.zeros(span, dtype=torch.bool)
    owned.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return tensor.data_ptr(), owned.repeat_interleave(size)
