"""The two ways that host code is called: through TVM-FFI, and by pointers to packed arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
import tvm_ffi
from cutlass.cute.runtime import find_runtime_libraries
from cutlass.cute.typing import SymInt

from tests.emulator.errors import ArgumentsError, EmulatorError
from tests.emulator.host.arguments import Signature
from tests.emulator.host.library import linked
from tests.emulator.host.runtime import Runtime

_NAME = "kernel"
_CUDA = 2  # kDLCUDA
_DEVICE_OFFSET = 8  # of DLTensor.device.device_type


class FfiFunction:
    """Host code with TVM-FFI, which checks dtypes, shapes, strides and alignments itself."""

    def __init__(self, compiled: Any, signature: Signature, runtime: Runtime, folder: str) -> None:
        path = f"{folder}/{_NAME}.o"
        compiled.export_to_c(path, function_name=_NAME)
        with open(path, "rb") as file:
            library = linked(file.read())
        runtime.connect(library)
        address = ctypes.cast(library[f"__tvm_ffi_{_NAME}"], ctypes.c_void_p).value
        self._function = tvm_ffi.Function.__from_extern_c__(address, keep_alive_object=library)
        self._signature = signature
        self._runtime = runtime

    def __call__(self, values: Sequence[Any]) -> None:
        signature = self._signature
        arguments = []
        for index, value in enumerate(values):
            if not signature.is_stream(index):
                arguments.append(_as_cuda(value))
            elif not getattr(signature.placeholders[index], "use_tvm_ffi_env_stream", False):
                arguments.append(0)
        try:
            self._function(*arguments)
        except (TypeError, ValueError) as error:
            raise ArgumentsError(f"{signature.name}: {error}") from error
        except (RuntimeError, OSError) as error:
            raise EmulatorError(f"{signature.name}: {error}") from error


class PackedFunction:
    """Host code without TVM-FFI: takes an array of addresses, the last one of its result."""

    def __init__(self, compiled: Any, signature: Signature, runtime: Runtime, folder: str) -> None:
        # Exporting links against the runtime, which the DSL loads for some architectures only.
        for library in find_runtime_libraries(enable_tvm_ffi=False):
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        self._library = linked(compiled.dump_to_object(_NAME))
        runtime.connect(self._library)
        self._arguments = compiled.execution_args
        header = compiled.c_header_arguments
        known = header is not None and header.error_msg is None
        # A value too few would have host code read whatever lies behind.
        self._count = len(header.packed_args) if known else None
        self._entry = f"_mlir_{_NAME}__mlir_ciface_{compiled.function_name}"
        self._signature = signature
        self._runtime = runtime
        self._module = ctypes.c_void_p()
        with runtime.listening():
            module = ctypes.c_void_p(ctypes.addressof(self._module))
            device = ctypes.c_int32(0)
            where = ctypes.addressof(module)
            self._invoke(f"_mlir_{_NAME}_cuda_init", [where])
            load = f"_mlir_{_NAME}_cuda_load_to_device"
            self._invoke(load, [where, ctypes.addressof(device)])

    def __call__(self, values: Sequence[Any]) -> None:
        signature = self._signature
        adapted = [
            _Slots([ctypes.c_void_p(0)])
            if signature.is_stream(index)
            else self._packed(signature.names[index], signature.placeholders[index], value)
            for index, value in enumerate(values)
        ]
        pointers, alive = self._arguments.generate_execution_args(tuple(adapted), {})
        addresses = [p.value if isinstance(p, ctypes.c_void_p) else p for p in pointers]
        if self._count not in (None, len(addresses)):
            raise ArgumentsError(
                f"{signature.name} takes {self._count} values, these arguments make "
                f"{len(addresses)}: {values}"
            )
        self._invoke(self._entry, addresses)
        del alive

    def _packed(self, name: str, placeholder: Any, value: Any) -> Any:
        where = f"argument {name} of {self._signature.name}"
        if isinstance(value, torch.Tensor):
            if placeholder is None:
                raise ArgumentsError(
                    f"{where}: it is not known what this function was compiled for; import "
                    f"tests.emulator before compiling, or compile with --enable-tvm-ffi"
                )
            return _Slots([_descriptor(where, placeholder, value)])
        if isinstance(value, int) and hasattr(placeholder, "memspace"):
            return _Slots([ctypes.c_void_p(value)])
        if isinstance(value, tuple) and any(isinstance(v, torch.Tensor) for v in value):
            parts = zip(placeholder, value, strict=True)
            return tuple(self._packed(f"{name}[{i}]", p, v) for i, (p, v) in enumerate(parts))
        return value

    def _invoke(self, name: str, addresses: Sequence[int]) -> None:
        """Call a packed function with addresses of its arguments."""
        result = ctypes.c_int32(0)
        count = len(addresses) + 1
        packed = (ctypes.c_void_p * count)(*addresses, ctypes.addressof(result))
        self._library[name](packed, count)
        self._runtime.succeeded(result.value, name)


class _Slots:
    """Values that the DSL passes by address, kept alive here."""

    def __init__(self, values: list[Any]) -> None:
        self._values = values

    def __c_pointers__(self) -> list[ctypes.c_void_p]:
        return [ctypes.c_void_p(ctypes.addressof(value)) for value in self._values]


class _CudaTensor:
    """A CPU tensor that says of itself that it is on the GPU."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, 0

    def __dlpack__(self, **_: Any) -> Any:
        capsule = self._tensor.__dlpack__()
        address = _capsule_pointer(capsule, b"dltensor")
        ctypes.c_int32.from_address(address + _DEVICE_OFFSET).value = _CUDA
        return capsule


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _as_cuda(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _CudaTensor(value)
    if isinstance(value, tuple):
        return tuple(_as_cuda(each) for each in value)
    return value


def _descriptor(where: str, placeholder: Any, tensor: torch.Tensor) -> ctypes.Structure:
    """{data, dynamic sizes, dynamic strides}, as the DSL passes a tensor without TVM-FFI."""
    shape, strides = _logical(where, placeholder.element_type, tensor)
    fields: list[tuple[str, Any]] = [("data", ctypes.c_void_p)]
    values = [tensor.data_ptr()]
    narrow = bool(placeholder._use_32bit_stride)
    for kind, wanted, masks, found, default in (
        ("size", placeholder.shape, placeholder.dynamic_shapes_mask, shape, 32),
        ("stride", placeholder.stride, placeholder.dynamic_strides_mask, strides, 64),
    ):
        for axis, (promised, dynamic, value) in enumerate(zip(wanted, masks, found, strict=True)):
            if not dynamic:
                # A stride along a size of 1 is never used.
                if value != promised and not (kind == "stride" and shape[axis] == 1):
                    raise ArgumentsError(
                        f"{where}: {kind} {promised} of dimension {axis} is required, got {value}"
                    )
                continue
            step = promised.divisibility if isinstance(promised, SymInt) else 1
            if value % step:
                raise ArgumentsError(
                    f"{where}: {kind} of dimension {axis} must be a multiple of {step}, got {value}"
                )
            width = promised.width if isinstance(promised, SymInt) else default
            width = 32 if narrow and kind == "stride" else width
            fields.append((f"{kind}{axis}", ctypes.c_int32 if width == 32 else ctypes.c_int64))
            values.append(value)
    align = placeholder._assumed_align or tensor.element_size()
    if tensor.data_ptr() % align:
        raise ArgumentsError(
            f"{where}: {align}-byte alignment is required, got {tensor.data_ptr():#x}"
        )
    return type("Descriptor", (ctypes.Structure,), {"_fields_": fields})(*values)


def _logical(
    where: str, element: Any, tensor: torch.Tensor
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides in elements: two in a byte are packed along the axis of stride 1."""
    shape, strides = tuple(tensor.shape), tensor.stride()
    if element.width >= 8:
        return shape, strides
    if 1 not in strides:
        raise ArgumentsError(f"{where}: a dimension of stride 1 is required, got strides {strides}")
    packed, pack = strides.index(1), 8 // element.width
    return (
        tuple(n * pack if i == packed else n for i, n in enumerate(shape)),
        tuple(s if i == packed else s * pack for i, s in enumerate(strides)),
    )
