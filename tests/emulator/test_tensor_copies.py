"""Rung 3: tiles through swizzled shared memory by TMA and by threads, in all modes."""

from __future__ import annotations

import pytest
import torch
from cutlass import BFloat16, Float4E2M1FN, Float32, Uint8

from tests.emulator.emulate import emulate
from tests.emulator.errors import ArgumentsError, Fault
from tests.emulator.kernels.tensor_copies import compile_tensor_copy
from tests.emulator.machine.engine import MODES
from tests.emulator.machine.program import Settings
from tests.emulator.snippets import host

SWIZZLES = (0, 32, 64, 128)
ROUTES = (("tma", "tma"), ("tma", "threads"), ("threads", "tma"), ("multicast", "threads"))
ELEMENTS = {
    "f32": (Float32, torch.float32),
    "bf16": (BFloat16, torch.bfloat16),
    "u8": (Uint8, torch.uint8),
    "e2m1": (Float4E2M1FN, torch.uint8),
}
ROWS = 16
"""Of a tile: twice the eight after which every swizzle repeats."""
ON = {"sm_90a": ("f32", "bf16", "u8"), "sm_100a": ("bf16", "e2m1"), "sm_120a": ("f32", "e2m1")}


def _matrix(rows, columns, pitch, dtype, copies=None):
    """A matrix [rows, columns] in rows of `pitch`, at a 16-byte boundary; its buffer."""
    shape = (rows, pitch) if copies is None else (copies, rows, pitch)
    buffer = torch.empty(shape, dtype=dtype)
    assert buffer.data_ptr() % 16 == 0
    raw = buffer.view(torch.uint8)
    raw.copy_(torch.randint(0, 256, raw.shape, dtype=torch.uint8))
    return buffer[..., :columns], buffer


def _check(arch, name, swizzle, load, store, shape, settings):
    """Copy a matrix of `shape` in rows of which only a part is its own."""
    element, dtype = ELEMENTS[name]
    per_byte = 2 if name == "e2m1" else 1
    size = dtype.itemsize
    tile = (ROWS, (swizzle or 64) // size * per_byte)
    kernel = host(compile_tensor_copy, arch, element, tile, swizzle, load, store)
    rows, columns = shape[0], shape[1] // size  # of what torch calls an element
    pitch = -(-shape[1] // 16) * 16 // size + 16 // size
    x, _ = _matrix(rows, columns, pitch, dtype)
    copies = 2 if load == "multicast" else None
    y, buffer = _matrix(rows, columns, pitch, dtype, copies)
    before = buffer.view(torch.uint8).clone()
    counts = (rows, columns * per_byte, pitch * per_byte)
    run = emulate(kernel, x, y, *counts, outputs=[y], memory=[x, y], settings=settings)
    expected = before.view(dtype)
    expected[..., :columns] = x
    # Bytes, for NaN is not equal to itself; those between the rows are unchanged.
    assert torch.equal(buffer.view(torch.uint8), expected.view(torch.uint8))
    ctas = 2 if copies else 1
    grid = (-(-columns * per_byte // tile[1]) * ctas, -(-rows // ROWS), 1)
    assert run.launches[0].grid == grid


@pytest.mark.parametrize(("load", "store"), ROUTES)
@pytest.mark.parametrize("swizzle", SWIZZLES)
@pytest.mark.parametrize(
    ("arch", "element"), [(arch, element) for arch in ON for element in ON[arch]]
)
def test_every_swizzle_in_every_mode(arch, element, swizzle, load, store):
    """33 rows of 172 bytes: the last tile is short in both directions."""
    for mode in MODES:
        _check(arch, element, swizzle, load, store, (33, 172), Settings(mode=mode, seed=2))


@pytest.mark.parametrize("shape", [(1, 4), (16, 128), (7, 300), (50, 16)])
@pytest.mark.parametrize("element", ["f32", "bf16", "e2m1"])
def test_sizes(element, shape):
    settings = Settings(mode="random", schedule="random", seed=7)
    for load, store in ROUTES:
        _check("sm_100a", element, 128, load, store, shape, settings)


@pytest.mark.parametrize(("rows", "text"), [(16, "reaches outside"), (17, "covers gaps of")])
def test_a_map_of_more_than_the_tensor_is_out_of_bounds(rows, text):
    """Columns of the map are those of the buffer, of which the tensor owns fewer."""
    kernel = host(compile_tensor_copy, "sm_90a", Float32, (16, 16), 64, "tma", "tma")
    x, _ = _matrix(rows, 12, 16, torch.float32)
    y, _ = _matrix(16, 16, 16, torch.float32)
    with pytest.raises(Fault, match=f"the map {text}") as error:
        emulate(kernel, x, y, 16, 16, 16, memory=[x, y])
    assert error.value.check == "out of bounds"
    assert "cp.async.bulk.tensor.2d.shared" in str(error.value)
    assert "(tensor_copies.py:" in str(error.value)


def test_misaligned_addresses_are_refused():
    kernel = host(compile_tensor_copy, "sm_90a", Float32, (16, 16), 64, "tma", "tma")
    x, y = (_matrix(16, 16, 16, torch.float32)[0] for _ in range(2))
    with pytest.raises(ArgumentsError, match="16-byte alignment is required"):
        emulate(kernel, x[:, 1:], y, 16, 12, 16)
