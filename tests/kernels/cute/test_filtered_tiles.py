"""`filtered_tiles`, the fast choice for 2D tiles and codes both ways, on the numpy model of PTX.

Under test: a tile that it does not call `near` has the bits of the reference in both orientations.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import ptx_model
from fos_compile.kernels import formats

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
from fos_compile.kernels.cute import (
    contract,
    conversions,
    filtered,
    filtered_tiles,
    host_quantize_filtered,
)

TILES = 1 << 10
"""128 warps of 32 rows x 64 columns."""


@pytest.fixture(autouse=True)
def model(monkeypatch, request):
    ptx_model.install(monkeypatch, contract, filtered, filtered_tiles)
    arch = getattr(request, "param", "sm_90a")
    with np.errstate(all="ignore"), conversions.target(arch):
        yield


both_conversions = pytest.mark.parametrize("model", ["sm_90a", "sm_100a"], indirect=True)
"""E2M1 by arithmetic, and by an instruction."""


def gaussian(generator):
    return torch.randn(TILES, 16, 16, generator=generator)


def heavy_tailed(generator):
    return gaussian(generator) * torch.exp(4 * torch.randn(TILES, 1, 1, generator=generator))


def uneven_rows(generator):
    """Rows of very different size in a tile: those of float16 that are summed apart."""
    return gaussian(generator) * torch.exp(3 * torch.randn(TILES, 16, 1, generator=generator))


def drawn(values, generator):
    return torch.tensor(values)[torch.randint(len(values), (TILES, 16, 16), generator=generator)]


def on_the_grid(generator):
    return drawn([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -6], generator)


def at_thresholds(generator):
    return drawn([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], generator) * drawn([-1, 1], generator)


def next_to_thresholds(generator):
    """Within a float16 rounding of a tie, where q may be on the wrong side."""
    return at_thresholds(generator) * drawn([1 - 2.0**-8, 1, 1 + 2.0**-8], generator)


def sixteenths(generator):
    return torch.randint(-96, 97, (TILES, 16, 16), generator=generator) / 16


def mostly_tiny(generator):
    """One large element, the others down to what float16 cannot hold beside it."""
    exponents = torch.randint(-30, 1, (TILES, 16, 16), generator=generator)
    x = gaussian(generator) * torch.exp2(exponents)
    x[:, 3, 5] = 6.0
    return x


def sparse(generator):
    return gaussian(generator) * (torch.rand(TILES, 16, 16, generator=generator) < 0.01)


def tiny_negatives(generator):
    """What rounds to zero has a sign, what is zero has none, a tile of scale 0 has no code."""
    x = drawn([-0.0, 0.0, -(2.0**-30), 2.0**-30, -(2.0**-133)], generator)
    x[::2, 15, 0] = -6.0
    return x


def two_values(generator):
    """Two numbers and the peak: the filter's roundings do not average out."""
    x = torch.rand(TILES, 1, 2, generator=generator) * 6
    which = torch.randint(2, (TILES, 16, 16), generator=generator)
    x = torch.gather(x.expand(-1, 16, 2), 2, which)
    x[:, 0, 0] = 6.0
    return x


DATA = [
    two_values,
    gaussian,
    heavy_tailed,
    uneven_rows,
    on_the_grid,
    at_thresholds,
    next_to_thresholds,
    sixteenths,
    mostly_tiny,
    sparse,
    tiny_negatives,
]


def by_lane(tiles):
    """[warps, 32 lanes, 4 rows, 16]: lane 4 u + c has rows 4 u, ... of the tiles in column c."""
    warps = tiles.reshape(-1, 2, 4, 4, 4, 16)  # tile down, tile across, four rows, row
    return warps.permute(0, 1, 3, 2, 4, 5).reshape(-1, 32, 4, 16)


def matrix_of(tiles):
    """[rows, 64]: the warps below each other."""
    return tiles.reshape(-1, 4, 16, 16).permute(0, 2, 1, 3).reshape(-1, 64)


def words_of(lanes):
    """[rows][words] of arrays [warps, 32]."""
    words = np.ascontiguousarray(lanes.contiguous().view(torch.int16).numpy()).view(np.uint32)
    return [[words[:, :, row, i] for i in range(8)] for row in range(4)]


def choose(rows, amax, rule):
    """As the kernel does, row by row."""
    rules = contract.Rules(scale_rule=rule, block="2d")
    tensor = contract.tensor_of(np.full(rows[0][0].shape, amax, np.float32), rules.qs)
    peak = filtered_tiles.top(rows)
    if not rules.adaptive:
        return filtered_tiles.single(peak, tensor)
    exponents = np.uint32(host_quantize_filtered.HALF_EXPONENTS)
    tile = filtered_tiles.tile_of(peak, tensor)
    sums = [np.zeros(peak.shape, np.float32)] * 3
    for row in rows:
        found = filtered_tiles.errors(row, tile, exponents)
        sums = [ptx_model.add(a, b) for a, b in zip(sums, found, strict=True)]
    return filtered_tiles.decide(tile, *sums)


def nibbles(words, lanes):
    """[..., 8 * words] codes of arrays of words."""
    packed = np.stack([np.broadcast_to(word, lanes) for word in words], -1).astype(np.uint32)
    return (packed[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15).reshape(*lanes, -1)


def encode(rows, choice):
    """Codes [warps, 32, 4, 16] by way of rows and by way of columns."""
    cleared = [filtered.without_negative_zeros(row) for row in rows]
    signs = filtered_tiles.signs_of(choice)
    pairs = [
        filtered_tiles.codes(cleared[i], cleared[i + 1], choice.inverse, signs) for i in (0, 2)
    ]
    lanes = rows[0][0].shape
    by_row = [nibbles(words, lanes) for pair in pairs for words in filtered_tiles.row_words(pair)]
    columns = np.zeros((*lanes, 16, 4), np.uint32)
    for first, word in zip(
        filtered_tiles.COLUMNS, filtered_tiles.column_words(*pairs), strict=True
    ):
        four = nibbles([word], lanes)
        columns[..., first, :], columns[..., first + 2, :] = four[..., :4], four[..., 4:]
    return np.stack(by_row, -2), columns.swapaxes(-1, -2)


def reference(x, amax, rule, transpose):
    """Codes [R, 64] of x and scales [R / 16, 4] of its tiles, from the buffers of one orientation.

    Padding rows are not stored, and a scale is the same in every row of a tile.
    """
    values, scales = torch.ops.fos.quantize(
        x, torch.tensor(amax), scale_rule=rule, block="2d", transpose=transpose
    )
    codes = torch.stack([values & 15, values >> 4], -1).flatten(-2)
    blocks = formats.from_blocked(scales, codes.shape[0], codes.shape[1] // 16)
    blocks = blocks.reshape(-1, 16, blocks.shape[-1])
    assert bool((blocks == blocks[:, :1]).all())
    blocks = blocks[:, 0]
    return (codes.mT, blocks.mT) if transpose else (codes, blocks)


def quantize(tiles, amax, rule):
    """(wrong, near) by tile, both orientations."""
    lanes = by_lane(tiles)
    rows = words_of(lanes)
    choice = choose(rows, amax, rule)
    assert set(np.unique(choice.near)) <= {0, 1}
    by_tile = [np.asarray(each).reshape(-1, 2, 4, 4) for each in (choice.near, choice.scale)]
    # The four lanes of a tile agree, whatever the order in which they add.
    assert all((each == each[:, :, :1]).all() for each in by_tile)
    near, scale = (each[:, :, 0].reshape(-1) for each in by_tile)
    wrong = np.zeros(len(tiles), bool)
    x = matrix_of(tiles)
    for codes, transpose in zip(encode(rows, choice), (False, True), strict=True):
        want, scales = reference(x, amax, rule, transpose)
        wanted = by_lane(want.reshape(-1, 16, 4, 16).permute(0, 2, 1, 3)).numpy()
        off = (codes != wanted).any((-1, -2)).reshape(-1, 2, 4, 4).any(2).reshape(-1)
        wrong |= off | (scale != scales.reshape(-1).numpy())
    return wrong, near != 0


def amaxes(most):
    """Other tensor scales put the same tile elsewhere on the grid; below the largest it
    saturates."""
    return most, most * 1.01, most * 1.7, most * 40, most / 3


@both_conversions
@pytest.mark.parametrize("rule", ["mse", "static_6"])
@pytest.mark.parametrize("make", DATA)
def test_wrong_only_where_it_says_so(model, make, rule):
    tiles = make(torch.Generator().manual_seed(0)).bfloat16()
    for amax in amaxes(float(tiles.abs().max())):
        wrong, near = quantize(tiles, amax, rule)
        assert not (wrong & ~near).any(), (np.flatnonzero(wrong & ~near)[:4], amax)


@pytest.mark.parametrize("exponent", [-39, -20, 0, 40, 59])
def test_holds_in_the_range_it_claims(exponent):
    tiles = (gaussian(torch.Generator().manual_seed(0)) * 2.0**exponent / 5).bfloat16()
    wrong, near = quantize(tiles, 2.0**exponent, "mse")
    assert not (wrong & ~near).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", ["mse", "static_6"])
def test_what_is_not_finite_is_near(value, rule):
    """Beside a static amax; and nothing else becomes near through it."""
    tiles = gaussian(torch.Generator().manual_seed(0)).bfloat16()
    before = quantize(tiles, 5.0, rule)[1]
    for i in range(256):
        tiles[i, i // 16, i % 16] = value
    wrong, near = quantize(tiles, 5.0, rule)
    assert near[:256].all() and (near[256:] == before[256:]).all()
    assert not (wrong & ~near).any()


def test_few_gaussian_tiles_are_near():
    """What the speed rests on."""
    found = []
    for seed in range(4):
        tiles = gaussian(torch.Generator().manual_seed(seed)).bfloat16()
        most = float(tiles.abs().max())
        found.append([quantize(tiles, most, rule)[1].mean() for rule in ("mse", "static_6")])
    near, static_near = np.mean(found, 0)
    assert near < 0.025 and static_near < 0.003  # of 1024 one has the peak


def off_by_one_row(upper, lower):
    return COLUMN_WORDS(lower, upper)


def a_little_more(x, factor):
    """Ties go up."""
    return CODE(x, factor * np.float32(1 + 2**-20))


def half_a_tile(word, distance):
    return word if distance == 8 else SHUFFLE(word, distance)


def without_last(function):
    return lambda values: function([*values[:-1], values[-1] * np.uint32(0)])


CODE, COLUMN_WORDS = filtered.code, filtered_tiles.column_words
SHUFFLE, TOP = ptx_model.shuffle_xor, filtered_tiles.top
MUTANTS = {
    "no band": (filtered, "BAND", 0.0),
    "a narrow band": (filtered, "BAND", 0.0005),
    "no slope": (filtered, "SLOPE", 0.0),
    "a peak that forgets a row": (filtered_tiles, "top", lambda rows: TOP([*rows[:-1], rows[0]])),
    "a sum that forgets two elements": (
        filtered,
        "total",
        without_last(filtered.total),
    ),
    "half a tile": (ptx_model, "shuffle_xor", half_a_tile),
    "a wrong magic number": (filtered, "HALF_512", 0x5C005C00),
    "a wrong shift of the codes": (filtered, "CODE_SHIFT", -20),
    "ties up": (filtered, "code", a_little_more),
    "negative zeros kept": (ptx_model, "clear_negative_zeros_bf16x2", lambda a: a),
    "signs kept in magnitudes": (filtered, "MAGNITUDES", 0xFFFF7FFF),
    "signs in a tile of scale 0": (filtered_tiles, "signs_of", lambda _: np.uint32(0x08080808)),
    "pairs of rows swapped in columns": (filtered_tiles, "column_words", off_by_one_row),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees(monkeypatch, mutant):
    """Each of these mistakes makes a tile wrong that is not called near."""
    monkeypatch.setattr(*MUTANTS[mutant])
    for make in DATA:
        for seed in range(2):
            tiles = make(torch.Generator().manual_seed(seed)).bfloat16()
            for amax in amaxes(float(tiles.abs().max())):
                try:
                    wrong, near = quantize(tiles, amax, "mse")
                except AssertionError:
                    return
                if (wrong & ~near).any():
                    return
    raise AssertionError("nothing differs")
