"""A warp of a kernel on the CPU, lane by lane: what `ptx_model` leaves out, memory above all.

Lanes run one after the other from one collective instruction to the next, in a given order. Shared
and global memory are checked: alignment, bounds, banks, and that no lane touches what another one
has written, or writes what another one has read, without a barrier of the warp between. Copies are
as late as they may be.
"""

from __future__ import annotations

import ctypes
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import ptx_model

LANES = 32


class Stopped(Exception):
    """Another lane failed."""


class Warp:
    """Runs one function on 32 lanes in turn."""

    def __init__(self, order: Sequence[int] = range(LANES)) -> None:
        self.order = order
        self.epoch = 0
        self._here = threading.local()
        self._go = [threading.Semaphore(0) for _ in range(LANES)]
        self._back = threading.Semaphore(0)
        self._given: dict[int, tuple[str, Any]] = {}
        self._taken: dict[int, Any] = {}
        self._running: set[int] = set()
        self._error: BaseException | None = None

    @property
    def lane(self) -> int:
        """The lane that runs."""
        return self._here.lane

    def run(self, function: Callable[[int], None]) -> None:
        """Call `function(lane)` on every lane to its end."""
        self._running = set(range(LANES))
        threads = [
            threading.Thread(target=self._start, args=(lane, function), daemon=True)
            for lane in range(LANES)
        ]
        for thread in threads:
            thread.start()
        while self._running:
            for lane in [lane for lane in self.order if lane in self._running]:
                self._go[lane].release()
                self._back.acquire()
            if self._error is None and self._running:
                self._exchange()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error

    def _start(self, lane: int, function: Callable[[int], None]) -> None:
        self._here.lane = lane
        self._go[lane].acquire()
        try:
            with np.errstate(all="ignore"):
                function(lane)
        except Stopped:
            pass
        except BaseException as error:
            self._error = self._error or error
        self._running.discard(lane)
        self._back.release()

    def _exchange(self) -> None:
        kinds = {kind for kind, _ in self._given.values()}
        if len(self._given) != LANES or len(kinds) != 1:
            self._error = AssertionError(f"lanes do not meet: {sorted(kinds)}, {self._running}")
            return
        self._taken = {lane: value for lane, (_, value) in self._given.items()}
        self._given = {}
        self.epoch += kinds == {"barrier"}

    def collect(self, kind: str, value: Any = None) -> dict[int, Any]:
        """What every lane gives to the same instruction."""
        self._given[self.lane] = kind, value
        self._back.release()
        self._go[self.lane].acquire()
        if self._error is not None:
            raise Stopped
        return self._taken


class Memory:
    """Bytes at addresses, and who touched them last."""

    def __init__(self, warp: Warp) -> None:
        self.warp = warp
        self._blocks: list[tuple[int, int, Any, np.ndarray]] = []

    def add(self, address: int, size: int, content: Any) -> None:
        """A block; `content` is a buffer of its bytes."""
        # Epoch and lane of the last write, and of the last read; lane -1 for several.
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
        self.accesses: list[list[tuple[str, int]]] = [[] for _ in range(LANES)]
        self._copies: list[list[tuple[int, bytes]]] = [[] for _ in range(LANES)]
        self.source: Memory | None = None

    def _note(self, kind: str, address: Any) -> None:
        self.accesses[self.warp.lane].append((kind, integer(address)))

    def conflicts(self) -> set[str]:
        """Instructions of 16 bytes a lane in which eight neighbours meet a bank twice."""
        found = set()
        for instruction in zip(*self.accesses, strict=False):
            kinds = {kind for kind, _ in instruction}
            if len(kinds) != 1:  # lanes went apart
                break
            for first in range(0, LANES, 8):
                vectors = {address // 16 for _, address in instruction[first : first + 8]}
                if len({vector % 8 for vector in vectors}) != len(vectors):
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
        return _words(self.memory.read(address, 4))[0]

    def store_v4(self, address: Any, words: Sequence[Any]) -> None:
        self.memory.write(address, _bytes(*words))

    def store_b32(self, address: Any, a: Any) -> None:
        self.memory.write(address, _bytes(a))

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
