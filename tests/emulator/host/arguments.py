"""Arguments of a host function: what was promised at compile time against what is passed.

The DSL keeps no record of the placeholders that a function was compiled for, and without TVM-FFI
checks nothing at a call. :func:`record_placeholders`, called when this package is imported, keeps
them with every function compiled from then on.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Sequence
from typing import Any

import cuda.bindings.driver as cuda
import numpy as np
import torch
from cutlass.base_dsl.jit_executor import ExecutionArgs
from cutlass.base_dsl.typing import Integer, Numeric
from cutlass.cute.runtime import _FakeStream
from cutlass.cute.typing import Pointer
from cutlass.cute.typing import Tensor as CuteTensor

from tests.emulator.errors import ArgumentsError

_STORAGE = {
    "Float64": (torch.float64,),
    "Float32": (torch.float32,),
    "TFloat32": (torch.float32,),
    "Float16": (torch.float16,),
    "BFloat16": (torch.bfloat16,),
    "Int64": (torch.int64,),
    "Int32": (torch.int32,),
    "Int16": (torch.int16,),
    "Int8": (torch.int8,),
    "Uint64": (torch.uint64, torch.int64),
    "Uint32": (torch.uint32, torch.int32),
    "Uint16": (torch.uint16, torch.int16),
    "Uint8": (torch.uint8,),
    "Boolean": (torch.bool, torch.uint8),
    "Float8E4M3FN": (torch.float8_e4m3fn, torch.uint8),
    "Float8E5M2": (torch.float8_e5m2, torch.uint8),
    "Float8E8M0FNU": (torch.float8_e8m0fnu, torch.uint8),
    "Float4E2M1FN": (torch.float4_e2m1fn_x2, torch.uint8),
}
"""Element type of the DSL -> dtypes that may hold it; the first is what host code is told."""


def record_placeholders() -> None:
    """Have the DSL keep what a function was compiled for, as `placeholders` of its arguments."""
    original = ExecutionArgs.record_arg_specs_from_compile_args
    if getattr(original, "records", False):
        return

    def record(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        original(self, args, kwargs)
        self.placeholders = self.get_rectified_args(args, kwargs) if args or kwargs else []

    record.records = True
    ExecutionArgs.record_arg_specs_from_compile_args = record


class Signature:
    """Parameters of a host function by position, with their placeholders where known."""

    def __init__(self, name: str, arguments: ExecutionArgs) -> None:
        self.name = name
        parameters = list(arguments.signature.parameters.values())
        self.names = [parameter.name for parameter in parameters]
        self.known = hasattr(arguments, "placeholders")
        empty = [None] * len(parameters)
        self.placeholders: list[Any] = getattr(arguments, "placeholders", None) or empty
        self.types = [
            None if parameter.annotation is inspect.Parameter.empty else parameter.annotation
            for parameter in parameters
        ]

    def is_stream(self, index: int) -> bool:
        """Whether a parameter is a stream, which callers may leave out."""
        is_placeholder = isinstance(self.placeholders[index], _FakeStream | cuda.CUstream)
        return is_placeholder or self.types[index] is cuda.CUstream

    def bind(self, given: Sequence[Any]) -> list[Any]:
        """One checked value a parameter; None where it is a stream."""
        streams = {i for i in range(len(self.names)) if self.is_stream(i)}
        wanted = [name for i, name in enumerate(self.names) if i not in streams]
        if len(given) == len(self.names) and streams:
            given = [value for i, value in enumerate(given) if i not in streams]
        if len(given) != len(wanted):
            raise ArgumentsError(
                f"{self.name} takes {len(wanted)} arguments without its stream "
                f"({', '.join(wanted)}), {len(given)} were given"
            )
        values = iter(given)
        return [
            None if i in streams else self._checked(i, name, next(values))
            for i, name in enumerate(self.names)
        ]

    def _checked(self, index: int, name: str, value: Any) -> Any:
        where = f"argument {index} ({name}) of {self.name}"
        if not self.known:
            return value
        return checked(where, self.placeholders[index], self.types[index], value)


def checked(where: str, placeholder: Any, kind: Any, value: Any) -> Any:
    """`value` as its placeholder promised it: a tensor in its dtype, a pointer as its address."""
    if isinstance(placeholder, CuteTensor):
        return _tensor(where, placeholder, value)
    if isinstance(placeholder, Pointer):
        return _address(where, placeholder, value)
    if isinstance(placeholder, list | tuple):
        if not isinstance(value, list | tuple) or len(placeholder) != len(value):
            raise ArgumentsError(
                f"{where}: a tuple of {len(placeholder)} values is required, got {value}"
            )
        pairs = zip(placeholder, value, strict=True)
        return tuple(checked(f"value {i} of {where}", p, None, v) for i, (p, v) in enumerate(pairs))
    number = type(placeholder) if isinstance(placeholder, Numeric) else kind
    if isinstance(number, type) and issubclass(number, Numeric):
        return _number(where, number, value)
    if isinstance(value, torch.Tensor):
        raise ArgumentsError(f"{where}: a tensor was given where none was compiled for")
    return value


def _tensor(where: str, placeholder: Any, value: Any) -> Any:
    if isinstance(value, CuteTensor):
        return value
    if not isinstance(value, torch.Tensor):
        raise ArgumentsError(f"{where}: a tensor is required, got {type(value).__name__}")
    value = _as_element(where, placeholder.element_type, value)
    rank = len(placeholder.shape)
    if value.dim() != rank:
        raise ArgumentsError(f"{where}: rank {rank} is required, got shape {tuple(value.shape)}")
    return value


def _as_element(where: str, element: Any, value: torch.Tensor) -> torch.Tensor:
    """A CPU tensor seen in the dtype of an element type."""
    if value.device.type != "cpu":
        raise ArgumentsError(f"{where}: a CPU tensor is required, got one on {value.device}")
    if element is None:
        return value.detach()
    allowed = _STORAGE.get(element.__name__)
    if allowed is None:
        raise ArgumentsError(f"{where}: no torch dtype is known for {element.__name__}")
    if value.dtype not in allowed:
        names = " or ".join(str(dtype) for dtype in allowed)
        raise ArgumentsError(
            f"{where}: {names} is required ({element.__name__}), got {value.dtype}"
        )
    return value.detach().view(allowed[0])


def _address(where: str, placeholder: Any, value: Any) -> int:
    if isinstance(value, torch.Tensor):
        value = _as_element(where, placeholder.dtype, value).data_ptr()
    elif isinstance(value, Pointer):
        value = value._pointer
    elif isinstance(value, ctypes.c_void_p):
        value = value.value or 0
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentsError(
            f"{where}: an address or a tensor is required, got {type(value).__name__}"
        )
    align = placeholder._assumed_align or 1
    if value % align:
        raise ArgumentsError(f"{where}: {align}-byte alignment is required, got {value:#x}")
    return value


def _number(where: str, kind: Any, value: Any) -> Any:
    if isinstance(value, Numeric):
        return value
    whole = issubclass(kind, Integer)
    if not isinstance(value, int if whole else int | float):
        raise ArgumentsError(f"{where}: {kind.__name__} is required, got {type(value).__name__}")
    if whole and kind.width > 1:
        low, high = (-(2 ** (kind.width - 1)), 2**kind.width)
        if not (low if kind.signed else 0) <= value < (high // 2 if kind.signed else high):
            raise ArgumentsError(f"{where}: {value} does not fit in {kind.__name__}")
    return value


def storage(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    """The address that a tensor's elements start at, and which bytes from there on are theirs."""
    if not tensor.numel():
        return tensor.data_ptr(), torch.zeros(0, dtype=torch.bool)
    size = tensor.element_size()
    pairs = list(zip(tensor.shape, tensor.stride(), strict=True))
    owned = np.zeros((sum((n - 1) * stride for n, stride in pairs) + 1) * size, bool)
    view = np.lib.stride_tricks.as_strided(
        owned, (*tensor.shape, size), (*(stride * size for _, stride in pairs), 1)
    )
    view[...] = True
    return tensor.data_ptr(), torch.from_numpy(owned)
