"""Kernels of ``fos_compile.kernels.cute`` that compute with the reference, and guarded buffers.

A stand-in has the signature of the compiled kernel and insists on what that one is promised: types,
alignment, strides, the limits of a grid. It writes to the addresses that it is given.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fos_compile.kernels import AMAX, DEQUANTIZE, QUANTIZE, QUANTIZE_PAIR, formats, target
from fos_compile.kernels.cute import (
    host_general,
    host_quantize_filtered,
    launch,
    layout,
    tables,
)
from fos_compile.kernels.cute.cache import KernelKey
from fos_compile.kernels.op import Status

GRID = 65535
"""Limit of a grid along y and z."""


def memory(address: int, size: int) -> Tensor:
    """The bytes at an address."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8)


def number(address: int, dtype: torch.dtype) -> Tensor:
    """The number at an address."""
    assert address % dtype.itemsize == 0
    return memory(address, dtype.itemsize).view(dtype)


def write(address: int, output: Tensor, alignment: int) -> None:
    """Put what a kernel computes where it was told to."""
    assert address % alignment == 0
    data = output.reshape(-1).contiguous().view(torch.uint8)
    memory(address, data.numel()).copy_(data)


class Kernels:
    """In place of the cache of compiled kernels; remembers who asked for what."""

    def __init__(self, arch: str = "sm_90a") -> None:
        self.arch = arch
        self.compiled: list[KernelKey] = []
        self.launched: list[KernelKey] = []

    def get(self, key: KernelKey, arch: str) -> Any:
        """A stand-in for `key`."""
        assert arch == self.arch
        self.compiled.append(key)
        compute = getattr(self, f"_{key.name}")

        @torch.no_grad()
        def kernel(*arguments: Any) -> None:
            self.launched.append(key)
            compute(key, *arguments)

        return kernel

    def names(self) -> list[str]:
        """What ran, in order."""
        return [key.name for key in self.launched]

    def _quantize_filtered(
        self,
        key: KernelKey,
        x: Tensor,
        amax: int,
        values: int,
        scales: int,
        counter: int,
        rounds: int,
        half_exponents: int,
    ) -> None:
        options: dict[str, Any] = dict(key.options)
        check_matrix(key, x, 256, 1)
        assert 1 <= rounds <= host_quantize_filtered.MAX_ROUNDS
        assert x.dtype == torch.bfloat16
        assert counter == 0 and half_exponents == host_quantize_filtered.HALF_EXPONENTS
        outputs = QUANTIZE.reference(
            x,
            number(amax, torch.float32),
            scale_rule=options["scale_rule"],
            rht=options["rht"],
        )
        for address, output in zip((values, scales), outputs, strict=True):
            write(address, output, 8)

    def _quantize_blocks(
        self,
        key: KernelKey,
        x: Tensor,
        amax: int,
        seed: int,
        values: int,
        scales: int,
        stream: int,
        rounds: int,
    ) -> None:
        options: dict[str, Any] = dict(key.options)
        check_matrix(key, x, 4 * formats.WIDTH[options["format"]], rounds)
        assert 0 <= stream < 2**32
        given = None if options["rounding"] == "nearest" else number(seed, torch.int64)
        names = ("format", "scale_rule", "rounding", "block", "rht")
        outputs = QUANTIZE.reference(
            x,
            number(amax, torch.float32),
            given,
            **{name: options[name] for name in names},
            stream=stream,
        )
        for address, output in zip((values, scales), outputs, strict=True):
            write(address, output, 8)

    _quantize_tiles = _quantize_blocks

    def _quantize_staged(
        self,
        key: KernelKey,
        x: Tensor,
        amax_row: int,
        amax_col: int,
        seed: int,
        values_row: int,
        scales_row: int,
        values_col: int,
        scales_col: int,
        stream_row: int,
        stream_col: int,
        half_exponents: int,
    ) -> None:
        options: dict[str, Any] = dict(key.options)
        assert x.dtype == torch.bfloat16 and x.dim() == 3 and x.shape[0] <= GRID
        assert not layout.vector(x) and x.data_ptr() % layout.VECTOR_BYTES == 0
        assert half_exponents == host_quantize_filtered.HALF_EXPONENTS
        assert 0 <= stream_row < 2**32 and 0 <= stream_col < 2**32
        row = amax_row, values_row, scales_row, stream_row
        col = amax_col, values_col, scales_col, stream_col
        single = "rounding" in options
        for suffix, (amax, values, scales, stream) in {"_row": row, "_col": col}.items():
            if single and options["by_column"] != (suffix == "_col"):
                assert not values and not scales
                continue
            own = "" if single else suffix
            rounding = options["rounding" + own]
            outputs = QUANTIZE.reference(
                x,
                number(amax, torch.float32),
                None if rounding == "nearest" else number(seed, torch.int64),
                scale_rule=options["scale_rule"],
                rounding=rounding,
                rht=options["rht" + own],
                transpose=suffix == "_col",
                stream=stream,
            )
            for address, output in zip((values, scales), outputs, strict=True):
                write(address, output, 8)

    def _quantize_tiles_staged(
        self,
        key: KernelKey,
        x: Tensor,
        amax_row: int,
        amax_col: int,
        values_row: int,
        scales_row: int,
        values_col: int,
        scales_col: int,
        half_exponents: int,
    ) -> None:
        options: dict[str, Any] = dict(key.options)
        assert x.dtype == torch.bfloat16 and x.dim() == 3 and x.numel()
        assert not layout.vector(x) and x.data_ptr() % layout.VECTOR_BYTES == 0
        assert half_exponents == host_quantize_filtered.HALF_EXPONENTS
        row, col = (amax_row, values_row, scales_row), (amax_col, values_col, scales_col)
        for transpose, (amax, *addresses) in enumerate((row, col)):
            if options.get("by_column", transpose) != transpose:
                assert addresses == [0, 0]
                continue
            outputs = QUANTIZE.reference(
                x,
                number(amax, torch.float32),
                scale_rule=options["scale_rule"],
                block="2d",
                transpose=bool(transpose),
            )
            for address, output in zip(addresses, outputs, strict=True):
                write(address, output, layout.VECTOR_BYTES)

    def _pair(
        self,
        key: KernelKey,
        x: Tensor,
        amax_row: int,
        amax_col: int,
        seed: int,
        buffers: tuple[int, ...],
        stream: int,
    ) -> None:
        options: dict[str, Any] = dict(key.options)
        check_matrix(key, x, 64, 1)
        has_dice = {options["rounding_row"], options["rounding_col"]} != {"nearest"}
        outputs = QUANTIZE_PAIR.reference(
            x,
            number(amax_row, torch.float32),
            number(amax_col, torch.float32),
            number(seed, torch.int64) if has_dice else None,
            **{name: options[name] for name in tables.NAMES["quantize_pair"]},
            stream=stream,
        )
        for address, output in zip(buffers, outputs, strict=True):
            write(address, output, 8)

    def _amax_rotated(self, key: KernelKey, x: Tensor, amax: int, rounds: int) -> None:
        check_matrix(key, x, 64, rounds)
        assert number(amax, torch.float32) == 0
        write(amax, AMAX.reference(x, True), 4)

    def _dequantize_blocks(
        self,
        key: KernelKey,
        values: Tensor,
        scales: int,
        amax: int,
        qs: float,
        out: int,
        cols: int,
        rounds: int,
    ) -> None:
        options: dict[str, Any] = dict(key.options)
        batch, rows, half = values.shape
        assert values.dtype == torch.uint8 and values.is_contiguous()
        assert values.data_ptr() % 8 == 0 and half % 32 == 0 and batch <= GRID
        check_rounds(half // (2 * formats.WIDTH[options["format"]]), rounds)
        count = formats.scale_count(rows, 2 * half, options["format"])
        output = DEQUANTIZE.reference(
            values,
            memory(scales, batch * count).view(batch, count),
            number(amax, torch.float32) if options["scaled"] else None,
            rows,
            cols,
            format=options["format"],
            qs=qs,
            dtype=getattr(torch, options["dtype"]),
        )
        write(out, output, 16)


def prepare_pair(kernel: Any, num_sms: int, key: KernelKey, x: Tensor) -> host_general.Launch:
    """The host side of a kernel that writes both orientations."""
    options: dict[str, Any] = dict(key.options)
    *batch, rows, cols = x.shape
    sides = (*batch, rows, cols), (*batch, cols, rows)
    new = [
        each for shape in sides for each in host_general.buffers(shape, options["format"], x.device)
    ]
    if not x.numel():
        return host_general.idle(*new)
    read = host_general.reader(x, options.get("vector", False))

    def launch(
        x: Tensor, amax_row: Tensor, amax_col: Tensor, seed: Tensor | None, stream: int
    ) -> tuple[Tensor, ...]:
        buffers = tuple(each() for each in new)
        addresses = tuple(buffer.data_ptr() for buffer in buffers)
        dice = 0 if seed is None else seed.data_ptr()
        kernel(read(x), amax_row.data_ptr(), amax_col.data_ptr(), dice, addresses, stream)
        return buffers

    return launch


def pair_entry(**options: tuple[Any, ...]) -> tables.Entry:
    """A kernel for pairs of bf16 matrices that it can read in vectors; all options by default."""
    every: dict[str, tuple[Any, ...]] = {
        "format": ("nvfp4",),
        "scale_rule": formats.SCALE_RULES,
        "block": formats.BLOCKS,
        "rounding_row": formats.ROUNDINGS,
        "rounding_col": formats.ROUNDINGS,
        "rht_row": (False, True),
        "rht_col": (False, True),
    }
    return tables.Entry(
        name="pair",
        dtypes=(torch.bfloat16,),
        options={**every, **options},
        layout=layout.vector,
        prepare=prepare_pair,
        alignment=layout.VECTOR_BYTES,
        reads={"vector": True},
    )


def check_matrix(key: KernelKey, x: Tensor, chunk: int, rounds: int) -> None:
    """The promises of `host_general.fake_matrix`, and the limits of `tiles.grid_of`."""
    assert str(x.dtype) == f"torch.{key.dtype}" and x.dim() == 3
    options = dict(key.options)
    size = x.element_size()
    assert x.data_ptr() % size == 0
    if options.get("vector"):
        step = 16 // size
        assert x.data_ptr() % 16 == 0 and x.stride(2) == 1
        assert not x.shape[2] % step and not x.stride(0) % step and not x.stride(1) % step
    if options.get("by_column"):
        assert x.stride(1) == 1, "the loads of a warp would not be neighbours"
    assert x.shape[0] <= GRID
    check_rounds(-(-x.shape[2] // chunk), rounds)


def check_rounds(chunks: int, rounds: int) -> None:
    """Every chunk has a CTA, and a grid holds them."""
    assert rounds >= 1 and -(-chunks // rounds) <= GRID


def install(monkeypatch: pytest.MonkeyPatch, arch: str = "sm_90a") -> Kernels:
    """Any device has this architecture, the 132 SMs of an H100, and these kernels."""
    kernels = Kernels(arch)
    monkeypatch.setattr(target, "status", lambda device: Status())
    monkeypatch.setattr(target, "arch", lambda device: arch)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(launch, "KERNELS", kernels)
    monkeypatch.setattr(launch, "_PLANS", {})
    monkeypatch.setattr(launch, "_READY", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # Its own test runs it; here it would count as a launch.
    monkeypatch.setattr(launch, "disagreement", lambda *arguments: "")
    return kernels


class Guarded:
    """Allocates for host sides: poisoned buffers between zones that must stay as they are."""

    ZONE = 4096 + 16  # no more aligned than 16 bytes
    POISON = 0xA5

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []

    def empty_strided(self, device: Any) -> Callable[..., Tensor]:
        """In place of `host_general.empty_strided`."""

        def allocate(
            shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
        ) -> Tensor:
            size = math.prod(shape) * dtype.itemsize
            total = size + 2 * self.ZONE
            whole = torch.full((total,), self.POISON, dtype=torch.uint8, device=device)
            self.buffers.append((whole, size))
            buffer = whole[self.ZONE : self.ZONE + size].view(dtype).view(shape)
            assert buffer.stride() == strides
            return buffer

        return allocate

    def check(self) -> None:
        """Nobody wrote beside a buffer."""
        for whole, size in self.buffers:
            zones = whole[: self.ZONE], whole[self.ZONE + size :]
            assert all(bool((zone == self.POISON).all()) for zone in zones)


@contextlib.contextmanager
def guarded() -> Iterator[Guarded]:
    """Buffers of every host side are guarded meanwhile, and looked at in the end."""
    zones = Guarded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_general, "empty_strided", zones.empty_strided)
        patch.setattr(launch, "_READY", {})  # those allocate as they were prepared to
        yield zones
    zones.check()
