"""The cost model of tiles: it obeys the roofs, prefers what it should, and knows legal choices."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from fos_compile.kernels import formats
from fos_compile.kernels.cute import matmul_tiles as tiles
from fos_compile.kernels.cute.matmul_layout import Tiling

BF16 = torch.bfloat16
SQUARES = (1024, 2048, 4096, 8192, 16384)


def predicted(choice, m, n, k, batch=1, arch="sm_100a", **changes):
    given = {"format": "nvfp4", "dtype": BF16, "num_sms": tiles.rates(arch).num_sms, **changes}
    return tiles.seconds(choice, m, n, k, batch, arch=arch, **given)


def chosen(m, n, k, batch=1, arch="sm_100a", **changes):
    given = {"format": "nvfp4", "dtype": BF16, "num_sms": tiles.rates(arch).num_sms, **changes}
    return tiles.choose(m, n, k, batch, arch=arch, **given)


@pytest.mark.parametrize(
    ("arch", "format", "dtype"),
    list(itertools.product(("sm_100a", "sm_103a"), formats.FORMATS, formats.DTYPES)),
)
def test_candidates_are_tilings(arch, format, dtype):
    found = tiles.candidates(format, dtype, arch)
    assert len(set(found)) == len(found) >= 50
    for each in found:
        assert Tiling(*each.tile, each.cluster, format, dtype.itemsize).stages >= 2
        assert tiles.SWAP_AND_SPLIT or (not each.swap and each.split == 1)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match=r"sm_120a.*got 'sm_90a'"):
        tiles.candidates("nvfp4", BF16, "sm_90a")


@pytest.mark.parametrize("arch", tiles.RATES)
@pytest.mark.parametrize("size", SQUARES)
def test_nothing_beats_the_roof(size, arch):
    device = tiles.rates(arch)
    compute = 2 * size**3 / device.flops
    memory = (size * size * (2 * 0.5625 + 2)) / device.dram
    for each in tiles.candidates("nvfp4", BF16, arch):
        assert predicted(each, size, size, size, arch=arch) > max(compute, memory)


@pytest.mark.parametrize(
    ("arch", "flops"), [("sm_100a", 9e15), ("sm_103a", 15e15), ("sm_120a", 1.676e15)]
)
def test_rates_are_the_published_peaks(arch, flops):
    assert tiles.rates(arch).flops == pytest.approx(flops, rel=0.02)


def test_a_large_product_is_near_the_peak():
    size = 16384
    best = chosen(size, size, size)
    share = 2 * size**3 / predicted(best, size, size, size) / tiles.rates("sm_100a").flops
    assert 0.8 < share < 1
    assert best.tile[0] == 256, "two CTAs read each half of B"


def test_a_small_product_uses_more_sms():
    small, large = chosen(1024, 1024, 1024), chosen(16384, 16384, 16384)
    assert math.prod(small.tile) < math.prod(large.tile)


def test_decode_streams_the_weight():
    """With one row, time is the weight's bytes over a bandwidth; more SMs in flight are better."""
    weight = 28672 * 8192 * 0.5625
    time = predicted(chosen(1, 28672, 8192), 1, 28672, 8192)
    assert weight / 8e12 < time < 3 * weight / 8e12


def test_swap_and_split_are_offered_with_their_kernel(monkeypatch):
    monkeypatch.setattr(tiles, "SWAP_AND_SPLIT", True)
    found = tiles.candidates("nvfp4", BF16, "sm_100a")
    assert {each.split for each in found} == set(tiles.SPLITS)
    given = {"format": "nvfp4", "dtype": BF16, "arch": "sm_100a", "num_sms": 148}
    (decode,) = tiles.best(8, 4096, 14336, 1, **given)
    plain = tiles.Choice((128, 64), (1, 1))
    assert decode.swap or decode.split > 1
    assert predicted(decode, 8, 4096, 14336) < predicted(plain, 8, 4096, 14336)
    for size in (4096, 8192):
        (large,) = tiles.best(size, size, size, 1, **given)
        assert not large.swap and large.split == 1


def test_more_of_anything_is_not_faster():
    choice = tiles.Choice((128, 128), (1, 1))
    base = (512, 512, 512, 1)
    for index in range(4):
        longer = [8 * each if at == index else each for at, each in enumerate(base)]
        assert predicted(choice, *longer) >= predicted(choice, *base)
    assert predicted(choice, *base, num_sms=8) > predicted(choice, *base)
    assert predicted(choice, 0, 5, 5) == 0


def test_symbols_are_not_looked_at():
    class Symbol:
        def __int__(self):
            raise AssertionError("guarded")

        __index__ = __bool__ = __int__

    assert chosen(Symbol(), 4096, 4096) == chosen(tiles.DEFAULT_SIZES["m"], 4096, 4096)


def test_bytes_in_flight():
    choice = tiles.Choice((128, 128), (1, 1))
    layout = Tiling(128, 128, (1, 1), "nvfp4", 2)
    given = {"format": "nvfp4", "dtype": BF16, "arch": "sm_100a"}
    assert tiles.bytes_in_flight(choice, **given) == layout.stages * layout.load_bytes
    assert tiles.bytes_in_flight(choice, **{**given, "arch": "sm_120a"}) <= 99 * 1024


def test_choices_print():
    assert str(tiles.Choice((128, 64), (2, 1), True, 4)) == "128x64 cluster 2x1 swap split 4"
    assert dataclasses.replace(tiles.Choice((128, 64), (2, 1))) == tiles.Choice((128, 64), (2, 1))
