"""The FP4 matmul compiles for every tile, fits, and is made of the instructions it should be."""

from __future__ import annotations

import functools
import itertools
import re
import time

import pytest
import torch

import cubins

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is installed on Linux only")

from fos_compile.kernels import formats
from fos_compile.kernels.cute import build, matmul_layout
from fos_compile.kernels.cute.host_matmul_sm100 import key_of, layout, prepare, tiling
from fos_compile.kernels.cute.matmul_layout import CLUSTERS, TILES, Tiling

ARCHS = ("sm_100a", "sm_103a")
SECONDS = 5
"""A compilation may take."""
BF16 = torch.bfloat16
VALID = [
    (tile, cluster)
    for tile, cluster in itertools.product(TILES, CLUSTERS)
    if cluster[0] % (tile[0] // 128) == 0
]
NEAREST = [(tile, (tile[0] // 128, 1)) for tile in TILES]
"""Each tile in its smallest cluster."""
EPILOGUES = [
    (dtype, bias, cols)
    for dtype in formats.DTYPES
    for bias in (None, *formats.DTYPES)
    for cols in (64, 63)
]


def named(configuration):
    tile, cluster = configuration
    return "{}x{}-cluster{}x{}".format(*tile, *cluster)


@functools.cache
def artifacts(key, arch, folder):
    """PTX, cubin and seconds of CPU time that they took: another process may have the core."""
    start = time.process_time()
    compiled = build.compiled(key, arch, f"--keep-ptx --keep-cubin --dump-dir {folder}")
    return compiled.__ptx__, compiled.__cubin__, time.process_time() - start


def check(key, arch, folder):
    ptx, cubin, seconds = artifacts(key, arch, folder)
    assert re.search(rf"^\.target {arch}\b", ptx, re.MULTILINE)
    check_instructions(ptx, key)
    found = cubins.attributes(cubin)
    assert max(found[cubins.FRAME] + found[cubins.STACK]) == 0, "a frame is a spill"
    assert 16 <= max(found[cubins.REGISTERS]) <= 128
    assert int(re.search(r"^\.reqntid (\d+)", ptx, re.MULTILINE)[1]) == 192
    assert seconds < SECONDS


def check_instructions(ptx, key):
    """The hardware at work: how often, too, because a stage has so many MMAs and no more."""
    chosen = tiling(key)
    group = f"cta_group::{chosen.ctas}"
    kinds = {"nvfp4": "mxf4nvf4.block_scale.block16", "mxfp4": "mxf4nvf4.block_scale.block32"}
    products = re.findall(r"tcgen05\.mma\.\S+", ptx)
    assert len(products) == matmul_layout.TILE_K // matmul_layout.MMA_K
    assert all(group in each and kinds[chosen.format] in each for each in products)
    copies = re.findall(r"tcgen05\.cp\.\S+", ptx)
    assert copies == [f"tcgen05.cp.{group}.32x128b.warpx4"] * (chosen.chunks * (1 + chosen.bands))
    loads = re.findall(r"cp\.async\.bulk\.tensor\.\dd\.shared::\S+", ptx)
    assert len(loads) == 4
    along_m, along_n = chosen.cluster
    shared = 2 * (along_n > 1) + (along_m > chosen.ctas) + (along_m > 1)
    assert sum("multicast" in each for each in loads) == shared
    options = dict(key.options)
    # The loop over boxes of 32 columns does two at a time.
    assert len(re.findall(r"tcgen05\.ld\.\S+32x32b\.x32", ptx)) == 2
    stores = re.findall(r"cp\.async\.bulk\.tensor\.\dd\.global\S+", ptx)
    assert len(stores) == 2 * options["boxes"]
    assert ptx.count("mul.rn.f32x2") == 2 * 16
    assert ptx.count("add.rn.f32x2") == (2 * 16 if options["bias"] else 0)
    narrow = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}
    assert ptx.count(narrow.get(key.dtype, "no such")) == (2 * 16 if key.dtype in narrow else 0)
    assert ptx.count("div.rn.f32") == 2
    for part in (".local", "div.full", "div.approx", "fma.", "ld.shared.f32"):
        assert part not in ptx


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dump")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("configuration", NEAREST, ids=named)
def test_every_tile(configuration, arch, folder):
    check(key_of("nvfp4", *configuration, dtype=BF16, cols=64), arch, folder)


@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
def test_clusters(cluster, folder):
    tile = (128 if cluster[0] % 2 else 256, 128)
    check(key_of("nvfp4", tile, cluster, dtype=BF16, cols=64), "sm_100a", folder)


@pytest.mark.parametrize("configuration", [NEAREST[2], NEAREST[7]], ids=named)
def test_mxfp4(configuration, folder):
    check(key_of("mxfp4", *configuration, dtype=BF16, cols=64), "sm_100a", folder)


@pytest.mark.parametrize(("dtype", "bias", "cols"), EPILOGUES)
def test_epilogues(dtype, bias, cols, folder):
    check(key_of("nvfp4", *NEAREST[0], dtype=dtype, bias=bias, cols=cols), "sm_100a", folder)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("dtype", formats.DTYPES)
@pytest.mark.parametrize("configuration", VALID, ids=named)
def test_every_configuration(configuration, dtype, format, arch, folder):
    for bias, cols in itertools.product((None, torch.float32), (64, 63)):
        check(key_of(format, *configuration, dtype=dtype, bias=bias, cols=cols), arch, folder)


# Plain numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("format", formats.FORMATS)
@pytest.mark.parametrize("configuration", VALID, ids=named)
def test_tiles_fit(configuration, format, item):
    tile, cluster = configuration
    found = Tiling(*tile, cluster, format, item)
    used = found.stages * found.load_bytes + found.epilogue_bytes
    assert used <= matmul_layout.SHARED_BYTES < used + found.load_bytes + 2048
    assert found.stages >= 3
    assert found.scales_at + found.scale_columns <= found.tensor_columns <= 512
    overlap = found.cols - found.accumulator_step
    if overlap > 0:
        assert found.accumulators == 1
        assert 0 <= found.free_after * matmul_layout.BOX - overlap < matmul_layout.BOX
    else:
        assert found.accumulators == 2
        assert found.free_after * matmul_layout.BOX == found.cols


@pytest.mark.parametrize("wrong", [((128, 96), (1, 1)), ((128, 64), (3, 1)), ((256, 64), (1, 2))])
def test_other_tiles_are_refused(wrong):
    tile, cluster = wrong
    with pytest.raises(ValueError, match="cluster"):
        Tiling(*tile, cluster, "nvfp4", 2)


@pytest.mark.parametrize(("rows", "cols", "batch"), [(1, 1, 1), (3, 5, 2), (8, 4, 1), (19, 7, 3)])
def test_every_tile_has_its_turn(rows, cols, batch):
    found = [matmul_layout.place(i, rows, cols) for i in range(rows * cols * batch)]
    every = itertools.product(range(batch), range(rows), range(cols))
    assert sorted((b, r, c) for r, c, b in found) == list(every)


def test_a_wave_of_tiles_is_about_square():
    """Of 64 x 64 tiles the 148 that run together touch few rows and columns."""
    wave = [matmul_layout.place(i, 64, 64) for i in range(148)]
    assert len({row for row, _, _ in wave}) + len({col for _, col, _ in wave}) <= 28


# Host side ----------------------------------------------------------------------------------------


def test_keys_hold_no_size():
    """Only whether rows of the output are whole 16 bytes."""
    keys = {key_of("nvfp4", *NEAREST[1], dtype=BF16, cols=cols) for cols in (8, 16, 4096)}
    keys |= {key_of("nvfp4", *NEAREST[1], dtype=BF16, cols=cols) for cols in (1, 12, 4097)}
    assert len(keys) == 2


def test_what_the_kernel_refuses():
    a, b = torch.empty(3, 64, dtype=torch.uint8), torch.empty(5, 64, dtype=torch.uint8)
    assert not layout(a, b) and not layout(a, b, torch.empty(5))
    assert "positive" in layout(a[:, :0], b[:, :0])
    assert "[n]" in layout(a, b, torch.empty(3, 5))
    assert "[n]" in layout(a, b, torch.empty(1))
    many = torch.empty(70000, 1, 32, dtype=torch.uint8)
    assert "batches" in layout(many, many)


@pytest.mark.parametrize(
    "shape", [((0, 32), (5, 32)), ((3, 32), (0, 32)), ((0, 3, 32), (0, 5, 32))]
)
def test_nothing_is_launched_for_nothing(shape):
    a, b = (torch.empty(each, dtype=torch.uint8) for each in shape)
    key = key_of("nvfp4", *NEAREST[0], dtype=BF16, cols=8)
    out = prepare(None, 148, key, a, b)(a, *[None] * 7)
    assert out.shape == (*a.shape[:-1], b.shape[-2])
    assert out.dtype == BF16


def test_the_host_side_calls_what_it_compiles():
    """The number, order and types of arguments: the compiled code looks at a last of all."""
    a, b = torch.zeros(3, 32, dtype=torch.uint8), torch.zeros(8, 32, dtype=torch.uint8)
    scales, amax = torch.zeros(512, dtype=torch.uint8), torch.ones(())
    key = key_of("nvfp4", *NEAREST[0], dtype=BF16, bias=BF16, cols=8)
    kernel = build.load(key, build.object_file(key, "sm_100a"))
    call = prepare(kernel, 148, key, a, b)
    with pytest.raises(ValueError, match="device_type=cuda"):
        call(a, scales, amax, 1536.0, b, scales, amax, 1536.0, torch.zeros(8, dtype=BF16))
