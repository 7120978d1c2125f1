"""The project's FP4 matmul for sm_100a, as users' calls launch it, gives the right results.

Every check of the emulator is on, in every mode of asynchronous work. Results are compared with
float64 within the error budget, and bit for bit where there is only one right answer.
"""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is installed on Linux only")

from fos_compile.kernels.cute.host_matmul_sm100 import key_of, tiling
from fos_compile.kernels.cute.matmul_layout import CLUSTERS, SHARED_BYTES, TILE_K, TILES
from tests.emulator.machine.engine import MODES
from tests.emulator.machine.program import Settings
from tests.emulator.own_matmul import host, problem, run
from tests.emulator.tensor_map import decode

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ALONE = (1, 1)
ONE = (128, 64), ALONE
PAIR = (256, 128), (2, 1)
SQUARE = (128, 64), (2, 2)
WIDE = (128, 192), ALONE
WIDEST = (128, 256), ALONE
WIDE_PAIR = (256, 192), (2, 1)
VALID = [
    (tile, cluster)
    for tile, cluster in itertools.product(TILES, CLUSTERS)
    if cluster[0] % (tile[0] // 128) == 0
]
SOME_CLUSTERS = [
    (tile, cluster) for tile, cluster in VALID if tile[1] == 64 and 1 < cluster[0] * cluster[1] <= 4
]
SCHEDULES = [Settings(mode=mode) for mode in MODES]
SCHEDULES += [Settings(mode="random", schedule="random", seed=seed) for seed in (1, 2)]
LATE, RANDOM = Settings(mode="late"), Settings(mode="random", seed=3)


def named(case):
    tile, cluster = case
    return "{}x{}-cluster{}x{}".format(*tile, *cluster)


def multiply(
    configuration, sizes, settings, *, format="nvfp4", dtype=BF16, bias=None, arch="sm_100a",
    num_sms=2,
):  # fmt: skip
    """Run and compare; there are as many clusters as `num_sms` hold, or one."""
    tile, cluster = configuration
    case = problem(*sizes, format=format, dtype=dtype, bias=bias)
    key = key_of(format, tile, cluster, dtype=dtype, bias=bias, cols=sizes[1])
    out, done = run(key, case, settings=settings, arch=arch, num_sms=num_sms)
    assert done.launches[0].cluster == (*cluster, 1)
    assert done.launches[0].shared_bytes <= SHARED_BYTES
    assert out.dtype == dtype
    worst = case.errors(out).max().item()
    assert worst <= 1, f"error of {worst:.3g} budgets"
    return case, out


@pytest.mark.parametrize("settings", SCHEDULES, ids=lambda s: f"{s.mode}-{s.schedule}{s.seed}")
@pytest.mark.parametrize("configuration", [ONE, WIDEST, PAIR, SQUARE], ids=named)
def test_every_order_of_events_gives_the_result(configuration, settings):
    """Three tiles a cluster, so that an accumulator is used again, and three stages of K."""
    (_, cols), (_, along_n) = configuration
    multiply(configuration, (200, 3 * cols * along_n - 8, 576), settings, num_sms=1)


@pytest.mark.parametrize("length", ["one MMA", "one stage", "the ring", "three turns"])
@pytest.mark.parametrize("configuration", [ONE, PAIR], ids=named)
def test_lengths_of_k(configuration, length):
    tile, cluster = configuration
    stages = tiling(key_of("nvfp4", tile, cluster, dtype=BF16, cols=8)).stages
    k = {
        "one MMA": 64,
        "one stage": TILE_K,
        "the ring": stages * TILE_K,
        "three turns": (3 * stages + 1) * TILE_K + 100,
    }[length]
    multiply(configuration, (128, 64, k), LATE)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 8), (130, 72), (257, 200), (40, 331)])
@pytest.mark.parametrize("configuration", [ONE, WIDE, WIDE_PAIR], ids=named)
def test_ragged_sizes(configuration, m, n):
    """Tiles beyond the matrix are filled with zeros and not stored; odd rows of the output are
    stored without TMA."""
    multiply(configuration, (m, n, 530), RANDOM)


@pytest.mark.parametrize("sizes", [(136, 72, 320, 3), (5, 67, 100, 2)], ids=str)
@pytest.mark.parametrize("configuration", [ONE, PAIR], ids=named)
def test_batches(configuration, sizes):
    multiply(configuration, sizes, LATE)


@pytest.mark.parametrize("n", [72, 69])
@pytest.mark.parametrize("bias", [None, BF16, F16, F32], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_what_is_stored(dtype, bias, n):
    """Each output type and bias, bit for bit: one MMA has one right sum, and after it every
    operation rounds once, in the contract's order."""
    case, out = multiply(ONE, (130, n, 64), LATE, dtype=dtype, bias=bias)
    _, _, amax_a, qs_a, _, _, amax_b, qs_b, added = case.arguments
    alpha = (amax_a / torch.tensor(qs_a)) * (amax_b / torch.tensor(qs_b))
    expected = case.sums.float() * alpha
    if added is not None:
        expected = expected + added.float()
    assert torch.equal(out, expected.to(dtype))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile, format):
    """Three tiles along N: of odd numbers of columns, one begins inside of a band of scales."""
    cluster = (tile[0] // 128, 1)
    multiply((tile, cluster), (tile[0] + 30, 3 * tile[1] - 24, 400), RANDOM, format=format)


@pytest.mark.parametrize("configuration", SOME_CLUSTERS, ids=named)
def test_clusters(configuration):
    """Operands are loaded in parts, each for all CTAs that need it."""
    multiply(configuration, (300, 300, 300), LATE)


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_wide_numbers_have_fewer_stages(dtype):
    multiply(WIDEST, (130, 300, 1100), RANDOM, dtype=dtype, bias=dtype)


@pytest.mark.parametrize("configuration", [WIDE, WIDE_PAIR], ids=named)
def test_sm_103a(configuration):
    multiply(configuration, (140, 400, 544), RANDOM, bias=BF16, arch="sm_103a")


def test_more_than_two_to_the_31():
    """By what the host code hands to the hardware: nothing of it is allocated but addresses."""
    key = key_of("nvfp4", *ONE, dtype=BF16, cols=2**17)
    a = torch.empty(3, 2**17, 2**14, dtype=torch.uint8)
    b, scales_a, scales_b, out = 16, 32, 48, 64
    (launch,) = host(key, "sm_100a").launches(
        a, b, scales_a, scales_b, 0, 0, 1.0, 1.0, 0, out, 2**17, 148
    )
    maps = {each.address: each for each in map(decode, filter(is_map, launch.params))}
    for address in (a.data_ptr(), b):
        assert maps[address].dims == (2**15, 2**17, 3)
        assert maps[address].strides == (2**14, 2**31)
    for address in (scales_a, scales_b):
        assert maps[address].dims == (128, 2**9, 2**10, 3)
        assert maps[address].strides == (2**9, 2**18, 2**28)
    assert maps[out].dims == (2**17, 2**17, 3)
    assert maps[out].strides == (2**18, 2**35)
    assert launch.grid == (1, 1, 148)


def is_map(parameter):
    return len(parameter) == 128


@pytest.mark.parametrize("amax", [float("nan"), float("inf")])
def test_a_bad_amax_shows(amax):
    case = problem(40, 24, 64)
    case.arguments[2].fill_(amax)
    out, _ = run(key_of("nvfp4", *ONE, dtype=BF16, cols=24), case)
    wrong = out.isnan() | out.isinf() | (case.sums == 0)
    assert wrong.all()


def test_a_bad_scale_spoils_its_row_alone():
    """Byte 0x7F is NaN: what the quantizer writes where the input is not finite."""
    case = problem(40, 24, 64)
    case.arguments[1][:, 16 * 5] = 0x7F  # row 5, first block
    out, _ = run(key_of("nvfp4", *ONE, dtype=BF16, cols=24), case)
    bad = out.isnan().all(dim=-1)[0]
    assert bad.tolist() == [row == 5 for row in range(40)]
    assert not out.isnan()[0, ~bad].any()


def test_operands_that_tma_cannot_read_are_copied():
    """Views of other strides, and addresses between 16 bytes."""
    case = problem(40, 24, 100, batch=2)
    a, scales_a, *rest = case.arguments
    a = a.transpose(0, 1).contiguous().transpose(0, 1)
    buffer = torch.empty(scales_a.numel() + 1, dtype=torch.uint8)
    buffer[1:] = scales_a.flatten()
    rest[2] = torch.cat([torch.zeros(1, dtype=torch.uint8), rest[2].flatten()])[1:].view_as(rest[2])
    case = type(case)((a, buffer[1:].view_as(scales_a), *rest), case.sums, case.exact, case.budget)
    out, _ = run(key_of("nvfp4", *ONE, dtype=BF16, cols=24), case)
    assert case.errors(out).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("configuration", VALID, ids=named)
def test_every_configuration(configuration, format, mode):
    (_, cols), cluster = configuration
    n = cols * cluster[1] + 40
    multiply(configuration, (300, n, 544), Settings(mode=mode), format=format, bias=F32)
