"""What older architectures compute instead of an instruction, against the model of that."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

import ptx_model
import simt

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
from fos_compile.kernels.cute import conversions, emulated, ptx

BYTES = np.arange(256, dtype=np.uint32)
HALVES = np.arange(1 << 16, dtype=np.uint32)
OPERANDS = {
    "e4m3x2": 2,
    "from_e4m3x2": 1,
    "e5m2x4": 4,
    "max_u16x2": 2,
    "add_relu_s16x2": 2,
    "clear_negative_zeros_bf16x2": 1,
}


@pytest.fixture(autouse=True)
def model(monkeypatch):
    ptx_model.install(monkeypatch)
    with np.errstate(all="ignore"):
        yield


def by_torch(numbers, dtype):
    return torch.from_numpy(numbers).to(dtype).view(torch.uint8).numpy().astype(np.uint32)


def words(rng, num):
    return rng.integers(0, 1 << 32, num, dtype=np.uint32)


def test_e4m3_of_everything_near_a_number_or_a_tie():
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    ties = (numbers[1:] + numbers[:-1]) / 2
    points = np.concatenate([numbers, ties])
    bits = points.view(np.uint32)[:, None] + np.arange(-3, 4, dtype=np.int32).view(np.uint32)
    near = bits.view(np.float32).ravel()
    near = near[near >= 0]
    want = by_torch(np.minimum(near, np.float32(448)), torch.float8_e4m3fn)
    got = emulated.e4m3x2(near, near[::-1])
    assert np.array_equal(got & 0xFF, want) and np.array_equal(got >> 8, want[::-1])


def test_e4m3_of_random_and_special_numbers():
    rng = np.random.default_rng(0)
    numbers = np.exp(rng.uniform(-90, 90, 1 << 16)).astype(np.float32)
    special = np.array([0, 1e-45, 448, 464, 480, np.inf, np.nan, -np.nan], np.float32)
    both = np.concatenate([numbers, special])
    got = emulated.e4m3x2(both, both)
    want = by_torch(np.minimum(both, np.float32(448)), torch.float8_e4m3fn)
    want[-2:] = 0x7F
    assert np.array_equal(got, want | (want << 8))


def test_e4m3_is_decoded():
    patterns = BYTES | (BYTES[::-1] << np.uint32(8))
    decoded = torch.from_numpy(BYTES.astype(np.uint8)).view(torch.float8_e4m3fn).half()
    for got, want in zip(
        ptx_model.widen(emulated.from_e4m3x2(patterns)),
        (decoded.float().numpy(), decoded.float().numpy()[::-1]),
        strict=True,
    ):
        assert np.array_equal(got, want, equal_nan=True)
        number = ~np.isnan(want)
        assert np.array_equal(np.signbit(got[number]), np.signbit(want[number]))


def test_e5m2_of_its_own_numbers():
    numbers = torch.from_numpy(BYTES.astype(np.uint8)).view(torch.float8_e5m2).float().numpy()
    finite = np.isfinite(numbers)
    numbers, codes = numbers[finite], BYTES[finite]
    got = emulated.e5m2x4(numbers, numbers[::-1], np.float32(0), numbers)
    shifted = codes[::-1] << np.uint32(8)
    assert np.array_equal(got, codes | shifted | (codes << np.uint32(24)))


@pytest.mark.parametrize("name", ["max_u16x2", "add_relu_s16x2"])
def test_pairs_of_integers(name):
    rng = np.random.default_rng(0)
    a, b = words(rng, 1 << 16), words(rng, 1 << 16)
    a[:4], b[:4] = [0, 0xFFFFFFFF, 0x80007FFF, 0x7FFF8000], [0, 1, 0x80007FFF, 0xFFFF0001]
    with conversions.target("sm_90a"):
        want = getattr(ptx_model, name)(a, b)
    assert np.array_equal(getattr(emulated, name)(a, b), want)


def test_negative_zeros_are_cleared_and_nothing_else():
    finite = HALVES[(HALVES & np.uint32(0x7F80)) != 0x7F80]
    both = finite | (finite[::-1] << np.uint32(16))
    with conversions.target("sm_90a"):
        want = ptx_model.clear_negative_zeros_bf16x2(both)
    assert np.array_equal(emulated.clear_negative_zeros_bf16x2(both), want)


def test_matrices_are_stored_transposed(monkeypatch):
    """As `stmatrix` does."""
    rng = np.random.default_rng(0)
    given = rng.integers(0, 1 << 32, (32, 4), dtype=np.uint32)
    rows = rng.permutation(32).astype(np.uint32) * np.uint32(16)
    written = []
    for by_instruction in (True, False):
        warp = simt.Warp()
        memory = simt.Shared(warp, 512)
        store = memory.store_transposed if by_instruction else emulated.store_transposed
        write = memory.memory.write
        halves = types.SimpleNamespace(
            store_u16=lambda at, a, write=write: write(at, np.uint16(a & 0xFFFF).tobytes())
        )
        monkeypatch.setattr(emulated, "shared", halves)
        monkeypatch.setattr(emulated, "ptx", simt.ptx_of(warp, memory.memory))
        warp.run(lambda lane, store=store: store(rows[lane], list(given[lane])))
        warp.epoch += 1
        warp._here.lane = 0
        written.append(memory.memory.read(0, 512))
    assert written[0] == written[1]
    assert len(set(written[0])) > 1


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("arch,expected", [("sm_80", True), ("sm_86", True), ("sm_90a", False)])
def test_chosen_by_architecture(monkeypatch, name, arch, expected):
    asked = []
    monkeypatch.setattr(emulated, name, lambda *operands: asked.append(operands))
    monkeypatch.setattr(ptx, "_emit", lambda *code: "")
    monkeypatch.setattr(ptx.arch, "inline_ptx", lambda *code, **operands: "")
    with conversions.target(arch):
        getattr(ptx, name)(*"abcd"[: OPERANDS[name]])
    assert bool(asked) == expected


def test_ada_converts_small_floats_but_has_no_pairs_of_integers():
    with conversions.target("sm_89"):
        assert conversions.has_fp8() and not conversions.has_sm_90()


def test_an_architecture_without_a_number_is_an_error():
    with conversions.target("hopper"), pytest.raises(ValueError, match="'hopper'"):
        conversions.has_fp8()
