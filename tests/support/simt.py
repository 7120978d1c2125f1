"""A warp or CTA of a kernel on the CPU, lane by lane: what `ptx_model` leaves out, mostly memory.

Lanes run one after the other from one collective instruction to the next, in a given order. Shared
and global memory are checked: alignment, bounds, banks, and that no lane touches what another one
has written, or writes what another one has read, without a barrier of them all between. Copies are
as late as they may be. Arithmetic between accesses may be done for many lanes at once.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
import types
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ptx_model
from lanes import LANES, Warp


class Memory:
    """Bytes at addresses, and who touched them last."""

    def __init__(self, warp: Warp) -> None:
        self.warp = warp
        self._blocks: list[tuple[int, int, Any, np.ndarray]] = []

    def add(self, address: int, size: int, content: Any) -> None:
        """A block; `content` is a buffer of its bytes."""
        # Epoch and lane of the last write, and of the last read; -1 for several, -2 for atomics.
        self._blocks.append((address, size, content, np.full((4, size), -1)))

    def _find(self, address: int, size: int) -> tuple[Any, np.ndarray, int]:
        address = integer(address)
        assert address % size == 0, f"address {address:#x} is no multiple of {size}"
        for start, length, content, marks in self._blocks:
            if start <= address and address + size <= start + length:
                return content, marks, address - start
        raise AssertionError(f"{size} bytes at {address:#x} are nobody's")

    def read(self, address: int, size: int) -> bytes:
        """An aligned vector."""
        content, marks, at = self._find(address, size)
        written, writer, seen, reader = marks[:, at : at + size]
        epoch, lane = self.warp.epoch, self.warp.lane
        assert not ((written == epoch) & (writer != lane)).any(), "read before a barrier"
        reader[:] = np.where((seen == epoch) & (reader != lane), -1, lane)
        seen[:] = epoch
        return bytes(content[at : at + size])

    def write(self, address: int, data: bytes) -> None:
        """An aligned vector."""
        content, marks, at = self._find(address, len(data))
        written, writer, seen, reader = marks[:, at : at + len(data)]
        epoch, lane = self.warp.epoch, self.warp.lane
        assert not ((written == epoch) & (writer != lane)).any(), "written twice, no barrier"
        assert not ((seen == epoch) & (reader != lane)).any(), "written what another lane reads"
        written[:], writer[:] = epoch, lane
        content[at : at + len(data)] = data

    def add_atomically(self, address: int, a: int) -> int:
        """To a 32-bit integer; what was there before."""
        content, marks, at = self._find(address, 4)
        written, writer, seen, reader = marks[:, at : at + 4]
        epoch, lane = self.warp.epoch, self.warp.lane
        assert not ((written == epoch) & (writer != -2)).any(), "written and added to, no barrier"
        assert not ((seen == epoch) & (reader != lane)).any(), "added to what another lane reads"
        written[:], writer[:] = epoch, -2
        before = int.from_bytes(content[at : at + 4], "little")
        content[at : at + 4] = (before + a & 0xFFFFFFFF).to_bytes(4, "little")
        return before

    def written(self, address: int) -> np.ndarray:
        """Which bytes of the block at an address were written."""
        (marks,) = (marks for start, _, _, marks in self._blocks if start == address)
        return marks[0] >= 0


def of_tensor(tensor: Any) -> Any:
    """The bytes of a tensor, as a buffer that can be written."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_uint8 * size).from_address(tensor.data_ptr())).cast("B")


def integer(value: Any) -> int:
    """In place of the DSL's signed types; the model makes arrays of one entry."""
    return int(np.asarray(value).item())


def u32(value: Any) -> np.uint32:
    """In place of the DSL's type."""
    return np.uint32(integer(value) & 0xFFFFFFFF)


def _words(data: bytes) -> list[np.uint32]:
    return list(np.frombuffer(data, np.uint32))


def _bytes(*words: Any) -> bytes:
    return np.array([integer(word) for word in words], np.uint32).tobytes()


def ceil_div(a: int, b: int) -> int:
    """In place of `cute.ceil_div`."""
    return -(-a // b)


DSL = {
    "Uint32": u32,
    "Int32": integer,
    "Int64": integer,
    "Float32": float,
    "cute": types.SimpleNamespace(
        ceil_div=ceil_div, make_rmem_tensor=lambda size, kind: [kind(0)] * size
    ),
    "cutlass": types.SimpleNamespace(
        const_expr=lambda value: value,
        range=lambda *bounds, unroll=0: range(*map(integer, bounds)),
        range_constexpr=range,
        min=min,
        Uint8=None,
    ),
}
"""Names that kernels import, where their functions run as Python."""


def plain(owner: Any) -> dict[str, Any]:
    """Functions as they are written, not as the DSL reads them."""
    return {
        name: _as_written(f.__wrapped__)
        for name, f in vars(owner).items()
        if hasattr(f, "__wrapped__")
    }


def _as_written(function: Any) -> types.FunctionType:
    """A function with the code of its source: the DSL replaces it when it compiles a kernel."""
    module = sys.modules[function.__module__]
    code = _codes_of(module.__file__)[function.__qualname__]
    plain_one = types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__
    )
    plain_one.__kwdefaults__ = function.__kwdefaults__
    return plain_one


@functools.cache
def _codes_of(path: str) -> dict[str, types.CodeType]:
    """Of every function and method of a file, by qualified name."""
    found, left = {}, [compile(Path(path).read_text(), path, "exec")]
    while left:
        code = left.pop()
        found[code.co_qualname] = code
        left += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return found


def arithmetic() -> list[types.ModuleType]:
    """All modules that compute with `ptx`, however the arithmetic is divided among them."""
    ours = [name for name in sys.modules if name.startswith("fos_compile.kernels.cute.")]
    return [sys.modules[name] for name in ours if hasattr(sys.modules[name], "ptx")]


def bind(monkeypatch: Any, kernel: Any, *modules: types.ModuleType) -> Callable[..., Any]:
    """Let `modules` and the methods of a kernel run as Python; returns where a thread begins."""
    bound = {name: types.MethodType(f, kernel) for name, f in plain(type(kernel)).items()}
    for name, method in bound.items():
        monkeypatch.setattr(kernel, name, method, raising=False)
    for module in modules:
        for name, value in {**DSL, **plain(module)}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    return bound["kernel"]


def memory_of(warp: Warp, tensors: Sequence[Any], x: Any) -> Memory:
    """Global memory with these tensors, None left out, and all that a view reaches."""
    memory = Memory(warp)
    for tensor in tensors:
        if tensor is not None:
            content = of_tensor(tensor)
            memory.add(tensor.data_ptr(), len(content), content)
    add_span(memory, x)
    return memory


def matrix(*shape: int) -> torch.Tensor:
    """bf16 of several magnitudes and some -0, always the same for a shape."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(torch.randint(-2, 1, (*shape[:-1], 1), generator=generator))
    x[..., 0, :5] = -0.0
    return x.bfloat16()


def matrix_of(x: Any) -> types.SimpleNamespace:
    """In place of `cute.Tensor`."""
    return types.SimpleNamespace(
        shape=tuple(x.shape),
        stride=tuple(x.stride()),
        iterator=types.SimpleNamespace(toint=x.data_ptr),
    )


def add_span(memory: Memory, x: Any) -> None:
    """All that lies between the first and the last number of a matrix."""
    span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    content = of_tensor(x.as_strided((span,), (1,)))
    memory.add(x.data_ptr(), len(content), content)


def ptx_of(warp: Warp, memory: Memory) -> types.SimpleNamespace:
    """`ptx_model` with lanes one at a time and memory."""

    def shuffle(a: Any, source: Any) -> Any:
        return warp.collect("shuffle", a)[integer(source)]

    def load(kind: Any, size: int) -> Callable[..., Any]:
        def loaded(address: Any, wanted: Any = 1) -> Any:
            data = memory.read(address, size) if wanted else bytes(size)
            return kind(np.frombuffer(data, f"u{size}")[0])

        return loaded

    def store(address: Any, words: Sequence[Any], wanted: Any, size: int) -> None:
        if wanted:
            memory.write(address, _bytes(*words)[:size])

    model = {name: getattr(ptx_model, name) for name in dir(ptx_model) if name[0] != "_"}
    return types.SimpleNamespace(
        **{
            **model,
            "u32": u32,
            "lane": lambda: u32(warp.lane),
            "shuffle": shuffle,
            "shuffle_xor": lambda a, distance: shuffle(a, warp.lane ^ distance),
            "find_low": lambda a: u32((integer(a) & -integer(a)).bit_length() - 1),
            "bfloat16x2": lambda low, high: (
                (ptx_model.bits(ptx_model.to_bfloat16(low)) >> np.uint32(16))
                | ptx_model.bits(ptx_model.to_bfloat16(high))
            ),
            "popc": lambda a: u32(integer(a).bit_count()),
            "load_v2": lambda address: _words(memory.read(address, 8)),
            "load_b16": load(u32, 2),
            "load_b32": load(u32, 4),
            "load_f32": lambda address: ptx_model.real(load(u32, 4)(address)),
            "store_u8": lambda at, a, wanted: store(at, [a], wanted, 1),
            "store_v2": lambda at, a, b, wanted: store(at, [a, b], wanted, 8),
            "store_v4": lambda at, words, wanted: store(at, words, wanted, 16),
        }
    )


class Shared:
    """In place of `kernels.cute.shared`, with `store_transposed` of 8x8 matrices."""

    def __init__(self, warp: Warp, size: int) -> None:
        self.warp = warp
        self.memory = Memory(warp)
        self.memory.add(0, size, bytearray(b"\xa5" * size))
        # Kind, address and epoch.
        self.accesses: list[list[tuple[str, int, int]]] = [[] for _ in warp.order]
        self._copies: list[list[tuple[int, bytes]]] = [[] for _ in warp.order]
        self._allocated: list[list[int]] = [[] for _ in warp.order]
        self._end = size
        self.source: Memory | None = None

    def alloc(self, size: int) -> int:
        """The address that every lane is given by the same call: apart from all others."""
        mine = self._allocated[self.warp.lane]
        most = max(self._allocated, key=len)
        if len(mine) == len(most):
            self.memory.add(self._end, size, bytearray(b"\xa5" * size))
            mine.append(self._end)
            self._end += -(-size // 128) * 128 + 128
        else:
            mine.append(most[len(mine)])
        return mine[-1]

    def _note(self, kind: str, address: Any) -> None:
        self.accesses[self.warp.lane].append((kind, integer(address), self.warp.epoch))

    def conflicts(self, epochs: Container[int] | None = None) -> set[str]:
        """Instructions in which a bank is met twice: by eight neighbours with 16 bytes each, or by
        a warp with 4. Those of some epochs only, if given: lanes must not go apart before.
        """
        found = set()
        for first in range(0, self.warp.lanes, LANES):
            lanes = [
                [access for access in lane if epochs is None or access[2] in epochs]
                for lane in self.accesses[first : first + LANES]
            ]
            for instruction in zip(*lanes, strict=False):
                kinds = {kind for kind, _, _ in instruction}
                if len(kinds) != 1:  # lanes went apart
                    break
                size, most = (4, LANES) if kinds == {"load word"} else (16, 8)
                for start in range(0, LANES, most):
                    units = {at // size for _, at, _ in instruction[start : start + most]}
                    if len({unit % (128 // size) for unit in units}) != len(units):
                        found |= kinds
        return found

    @staticmethod
    def address_of(pointer: int) -> np.uint32:
        return u32(pointer)

    def copy_async_16(self, to: Any, source: Any) -> None:
        self.copy_async_16_or_zero(to, source, 1)

    def copy_async_16_or_zero(self, to: Any, source: Any, wanted: Any) -> None:
        self._note("copy", to)
        data = self.source.read(source, 16) if wanted else bytes(16)
        self.memory.write(to, b"\xa5" * 16)
        self._copies[self.warp.lane].append((integer(to), data))

    def wait_copies(self) -> None:
        for to, data in self._copies[self.warp.lane]:
            self.memory.write(to, data)
        self._copies[self.warp.lane] = []

    def load_v4(self, address: Any) -> list[np.uint32]:
        self._note("load", address)
        return _words(self.memory.read(address, 16))

    def load_b32(self, address: Any) -> np.uint32:
        self._note("load word", address)
        return _words(self.memory.read(address, 4))[0]

    def load_u16(self, address: Any) -> np.uint32:
        return u32(int.from_bytes(self.memory.read(address, 2), "little"))

    def store_v4(self, address: Any, words: Sequence[Any]) -> None:
        self.memory.write(address, _bytes(*words))

    def store_v2(self, address: Any, a: Any, b: Any) -> None:
        self.memory.write(address, _bytes(a, b))

    def store_b32(self, address: Any, a: Any) -> None:
        self.memory.write(address, _bytes(a))

    def store_u16(self, address: Any, a: Any) -> None:
        self.memory.write(address, _bytes(a)[:2])

    def atomic_add(self, address: Any, a: Any) -> np.uint32:
        return u32(self.memory.add_atomically(integer(address), integer(a)))

    def store_u8(self, address: Any, a: Any) -> None:
        self.memory.write(address, bytes([integer(a) & 0xFF]))

    def store_transposed(self, address: Any, words: Sequence[Any]) -> None:
        """As PTX has it: memory row r of matrix k, at the address of lane 8 k + r, takes from lane
        4 i + j its element i if the lane's word holds column r: r is 2 j or 2 j + 1.
        """
        self._note("transposed", address)
        given = self.warp.collect("stmatrix", [integer(word) for word in words])
        k, r = self.warp.lane // 8, self.warp.lane % 8
        row = [given[4 * i + r // 2][k] >> (16 * (r % 2)) & 0xFFFF for i in range(8)]
        self.memory.write(address, np.array(row, np.uint16).tobytes())
