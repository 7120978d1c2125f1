"""Rung 2: conversions as real kernels do them, over all inputs, against torch and tables."""

from __future__ import annotations

import pytest
import torch
from cutlass import BFloat16, Float16, Float32, Int8, Int16, Int32, Uint8

from tests.emulator.emulate import emulate
from tests.emulator.kernels import converts
from tests.emulator.snippets import host

ARCHITECTURES = ("sm_90a", "sm_100a", "sm_120a")
BLACKWELL = ARCHITECTURES[1:]
HALVES = torch.arange(1 << 16).to(torch.uint16)
"""Every pattern of 16 bits."""
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E2M1_TIES = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
"""Middles of neighbours go to the one with an even code (PTX ISA, cvt)."""

_BOUNDARIES = 20_000
_CHUNK = 1 << 14


def _run(kernel, x, y):
    """A kernel on tensors of which one is several times as long as the other, part by part."""
    count = min(len(x), len(y))
    for start in range(0, count, _CHUNK):
        part = [
            t[start * len(t) // count : min(start + _CHUNK, count) * len(t) // count]
            for t in (x, y)
        ]
        emulate(kernel, *part, outputs=part[1:])


def _positive(name):
    """All finite numbers of a format that are not negative, in order."""
    if name.startswith("e2m1"):
        return E2M1
    dtype = {
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
        "bf16": torch.bfloat16,
        "f16": torch.float16,
    }[name]
    count = 1 << (8 * dtype.itemsize - 1)
    codes = torch.arange(count).to(torch.uint8 if dtype.itemsize == 1 else torch.uint16)
    numbers = codes.view(dtype).float()
    return numbers[numbers.isfinite()]


def _around_boundaries(name):
    """Each number of a format, each middle of two, and the float32 on both sides of those."""
    numbers = _positive(name)
    step = numbers[-1] - numbers[-2]
    last = (numbers[-1].double() + step.double()).float()  # what rounding overflows towards
    above = torch.cat([numbers[1:], last[None]])
    # Halves first: the sum of the largest two is not finite.
    middles = numbers / 2 + above / 2
    places = torch.cat([numbers, middles[middles.isfinite()]])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    found = torch.cat([places, torch.nextafter(places, up), torch.nextafter(places, down)])
    return torch.cat([found, -found])


def _inputs(name, width):
    """All bfloat16, and numbers next to boundaries, in a whole number of words.

    All boundaries, but of the 2^16 of 16-bit formats, on both sides of which are 3 numbers, a part.
    """
    special = torch.tensor([torch.finfo(torch.float32).max, 1e-45, torch.inf, torch.nan])
    negative_nan = torch.tensor([0xFFFFFFFF - 2**32], dtype=torch.int32).view(torch.float32)
    around = _around_boundaries(name)
    around = around[torch.randperm(len(around))[:_BOUNDARIES]]
    x = torch.cat([HALVES.view(torch.bfloat16).float(), around, special, -special, negative_nan])
    x = x[torch.randperm(len(x))]
    return torch.cat([x, x[: -len(x) % width]])


def _e2m1(x):
    """Codes by the definition: the nearest number, and of two as near the even code."""
    distance = (x.double().abs().clamp(max=6)[:, None] - E2M1).abs()
    nearest = distance == distance.amin(1, keepdim=True)
    even = torch.arange(8) % 2 == 0
    # Of one or two candidates, an even one wins.
    codes = (nearest.int() + (nearest & even).int()).argmax(1)
    codes = codes + 8 * torch.signbit(x)
    return torch.where(x.isnan(), 7, codes).to(torch.uint8)


def _expected(name, x):
    """Codes of every number: NaN is positive, and what is too large the largest."""
    if name.startswith("e2m1"):
        return _e2m1(x)
    if name in ("e4m3", "e5m2"):
        dtype = torch.float8_e4m3fn if name == "e4m3" else torch.float8_e5m2
        most = torch.finfo(dtype).max
        codes = x.clamp(-most, most).to(dtype).view(torch.uint8)
        return torch.where(x.isnan(), 0x7F, codes).to(torch.uint8)
    codes = x.to(torch.bfloat16 if name == "bf16" else torch.float16).view(torch.int16)
    return torch.where(x.isnan(), 0x7FFF, codes).to(torch.int16).view(torch.uint16)


def _codes(name, words):
    """Codes in the words of a kernel, lowest first."""
    if not name.startswith("e2m1"):
        return words.view(torch.uint16 if name in ("bf16", "f16") else torch.uint8)
    nibbles = words.view(torch.uint8)
    return torch.stack([nibbles & 15, nibbles >> 4], dim=-1).reshape(-1)


_WORDS = {Uint8: torch.uint8, converts.Uint16: torch.uint16, converts.Uint32: torch.uint32}


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        (arch, name)
        for arch in ARCHITECTURES
        for name in converts.ENCODERS
        # sm_120a has the instructions of sm_100a: those of 4 bits and of one other format.
        if (name.startswith("e2m1") and arch in BLACKWELL)
        or name == "e4m3"
        or (not name.startswith("e2m1") and arch != "sm_120a")
    ],
)
def test_encoding_of_all_bfloat16_and_around_every_boundary(arch, name):
    _, width, word = converts.ENCODERS[name]
    x = _inputs(name, width)
    words = torch.empty(len(x) // width, dtype=_WORDS[word])
    _run(host(converts.compile_encode, arch, name), x, words)
    got, wanted = _codes(name, words).int(), _expected(name, x).int()
    bad = (got != wanted).nonzero().flatten()[:5].tolist()
    assert torch.equal(got, wanted), [(x[i].item(), got[i].item(), wanted[i].item()) for i in bad]


def test_the_definition_of_e2m1_agrees_with_the_table():
    ties = torch.tensor(list(E2M1_TIES))
    assert E2M1[_e2m1(ties).long()].tolist() == list(E2M1_TIES.values())
    assert _e2m1(torch.tensor([torch.nan, -0.0, -0.25, 7.0, -torch.inf])).tolist() == [
        7, 8, 8, 7, 15,
    ]  # fmt: skip


def _patterns(name):
    """Words that hold every code of a format, those of 8 bits and less in both places.

    And the codes' numbers.
    """
    if name in ("bf16", "f16"):
        dtype = torch.bfloat16 if name == "bf16" else torch.float16
        halves = HALVES.int()[torch.randperm(len(HALVES))].to(torch.uint16)
        return halves.view(torch.uint32), halves.view(dtype).float()
    if name == "e4m3":
        numbers = HALVES.view(torch.uint8).view(torch.float8_e4m3fn).float()
        return HALVES, numbers
    codes = torch.arange(256).to(torch.uint8)
    values = torch.cat([E2M1, -E2M1])
    return codes, values[torch.stack([codes & 15, codes >> 4], dim=1).long()].flatten()


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        (arch, name)
        for arch in ARCHITECTURES
        for name in converts.DECODERS
        if (name == "e2m1" and arch in BLACKWELL) or (name != "e2m1" and arch != "sm_120a")
    ],
)
def test_decoding_of_every_code(arch, name):
    words, numbers = _patterns(name)
    x = torch.empty(2 * len(words))
    _run(host(converts.compile_decode, arch, name), words, x)
    assert torch.equal(x.isnan(), numbers.isnan())
    same = x.view(torch.int32) == numbers.view(torch.int32)
    assert (same | numbers.isnan()).all()


_TORCH = {
    Float32: torch.float32, Float16: torch.float16, BFloat16: torch.bfloat16, Int8: torch.int8,
    Uint8: torch.uint8, Int16: torch.int16, Int32: torch.int32,
}  # fmt: skip
_CASTS = [
    (Float32, Float16), (Float32, BFloat16), (Float16, Float32), (BFloat16, Float32),
    (Float16, BFloat16), (BFloat16, Float16), (Int8, Float32), (Uint8, Float32), (Int32, Float32),
    (Int16, BFloat16), (Float32, Int32), (Float32, Int8), (Float16, Int16), (Int32, Int8),
    (Int8, Int32), (Uint8, Int32), (Int16, Uint8),
]  # fmt: skip


def _source(source, target):
    """Every pattern, or of 32 bits some; only what torch converts as well."""
    dtype = _TORCH[source]
    if source is Float32:
        x = torch.cat([HALVES.view(torch.bfloat16).float(), torch.randn(5000) * 100])
        if not _TORCH[target].is_floating_point:
            return x[x.abs() < 100]
        return x
    if source is Int32:
        edges = torch.tensor([-(2**31), 2**31 - 1, 2**24 + 1, 2**25 + 2, 2**25 + 6, -(2**24) - 1])
        return torch.cat([torch.randint(-(2**31), 2**31, (5000,)), edges]).int()
    x = torch.arange(256).to(torch.uint8) if dtype.itemsize == 1 else HALVES
    x = x.view(dtype)
    return (
        x if _TORCH[target].is_floating_point or not dtype.is_floating_point else x[x.abs() < 3e4]
    )


@pytest.mark.parametrize(
    ("arch", "source", "target"),
    [("sm_100a", *pair) for pair in _CASTS] + [("sm_90a", *pair) for pair in _CASTS[:4]],
)
def test_casts_of_the_dsl(arch, source, target):
    x = _source(source, target)
    y = torch.empty(len(x), dtype=_TORCH[target])
    _run(host(converts.compile_cast, arch, source, target), x, y)
    wanted = x.to(y.dtype)
    if y.dtype.is_floating_point:
        assert torch.equal(y.isnan(), wanted.isnan())
        y, wanted = y[~wanted.isnan()], wanted[~wanted.isnan()]
    assert torch.equal(y.view(torch.uint8), wanted.view(torch.uint8))
