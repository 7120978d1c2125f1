"""The kernel for 2D tiles: on the CPU lane by lane, compiled for every architecture, launched."""

from __future__ import annotations

import itertools
import types

import pytest
import torch

import cubins
import cute_cases
import simt
import stand_ins
from cute_cases import LAYOUTS
from fos_compile.kernels import QUANTIZE, QUANTIZE_PAIR, cuda

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is installed on Linux only")
from fos_compile.kernels.cute import (
    build,
    contract,
    host_quantize_filtered,
    layout,
    quantize_tiles_staged,
    tensor_constants,
    warp_tiles,
)
from fos_compile.kernels.cute import host_quantize_tiles_staged as host
from fos_compile.kernels.cute.tables import TABLES

ORDERS = {"up": range(simt.LANES), "down": range(simt.LANES)[::-1]}


def run(monkeypatch, x, amaxes, rules, *, row, col, order="up"):
    """What the kernel writes, and instructions with bank conflicts: (outputs, conflicts)."""
    batch, rows, cols = x.shape
    outputs, conflicts = [], set()
    for r, c, wanted in ((rows, cols, row), (cols, rows, col)):
        values, scales = QUANTIZE.reference(torch.zeros(batch, r, c).bfloat16(), torch.ones(()))
        outputs += [values.fill_(0xA5), scales.fill_(0xA5)] if wanted else [None, None]
    kernel = quantize_tiles_staged.QuantizeTilesStaged(rules, row=row, col=col)
    entry = simt.bind(monkeypatch, kernel, quantize_tiles_staged, warp_tiles, contract)
    matrix = simt.matrix_of(x)
    addresses = [0 if given is None else given.data_ptr() for given in (*amaxes, *outputs)]
    exponents = simt.u32(host_quantize_filtered.HALF_EXPONENTS)
    warps = quantize_tiles_staged.WARPS
    ctas = range(simt.ceil_div(rows, warp_tiles.BAND) * kernel.groups(matrix)), range(batch)
    for *cta, which in itertools.product(*ctas, range(warps)):
        warp = simt.Warp(ORDERS[order])
        memory = simt.memory_of(warp, (*amaxes, *outputs), x)
        shared = simt.Shared(warp, warps * warp_tiles.BYTES)
        shared.source = memory
        ptx = simt.ptx_of(warp, memory)
        for module in simt.arithmetic():
            monkeypatch.setattr(module, "ptx", ptx)
        replaced = {
            "shared": shared,
            "store_transposed": shared.store_transposed,
            "again": lambda a: a,
            "ballot": lambda a, warp=warp: simt.u32(
                sum(1 << i for i, value in warp.collect("ballot", a).items() if value)
            ),
            "arch": types.SimpleNamespace(
                thread_idx=lambda warp=warp, which=which: (which * 32 + warp.lane, 0, 0),
                block_idx=lambda cta=cta: (*cta, 0),
                sync_warp=lambda warp=warp: warp.collect("barrier"),
                alloc_smem=lambda kind, size, alignment: 0,
            ),
        }
        for module, name in itertools.product(
            (quantize_tiles_staged, warp_tiles, tensor_constants), replaced
        ):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replaced[name])
        warp.run(lambda lane: entry(matrix, *addresses, exponents))
        conflicts |= shared.conflicts()
    return outputs, conflicts


def check(monkeypatch, x, *amaxes, rule="mse", row=True, col=True, order="up"):
    """Against the reference."""
    amaxes = [torch.tensor(amax) for amax in amaxes]
    x = x if x.dim() == 3 else x.unsqueeze(0)
    rules = contract.Rules(scale_rule=rule, block="2d")
    outputs, conflicts = run(monkeypatch, x, amaxes, rules, row=row, col=col, order=order)
    assert not conflicts
    for i, transpose in enumerate((False, True)):
        want = QUANTIZE.reference(x, amaxes[i], scale_rule=rule, block="2d", transpose=transpose)
        for got, wanted in zip(outputs[2 * i : 2 * i + 2], want, strict=True):
            if got is not None:
                off = (got != wanted).nonzero()
                assert not len(off), (transpose, got.shape, off[:8].tolist())


SHAPES = [(16, 16), (40, 88), (130, 72), (1, 64), (65, 8), (2, 33, 136)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_orientations(monkeypatch, shape):
    x = simt.matrix(*shape)
    amax = float(x.abs().max())
    check(monkeypatch, x, amax, amax)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sides", ["row", "col"])
@pytest.mark.parametrize("shape", [(40, 88), (130, 72), (2, 33, 136)], ids=str)
def test_one_orientation(monkeypatch, shape, sides, order):
    x = simt.matrix(*shape)
    amax = float(x.abs().max())
    check(monkeypatch, x, amax, amax, row=sides == "row", col=sides == "col", order=order)


def undecided(*shape):
    """Two numbers and a peak in every tile: a fifth of the tiles is near."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, 2, generator=generator) * 6
    x = x.flatten()[torch.randint(2, shape, generator=generator)]
    x[..., ::16, ::16] = 6.0
    return x.bfloat16()


AMAXES = [
    (4.0, 9.0),
    (float("nan"), float("nan")),
    (float("inf"), 4.0),
    (0.0, 4.0),
    (2.0**-117, 2.0**-115),
    (2.0**70, 2.0**70),
]


@pytest.mark.parametrize("rule", ["mse", "static_6"])
@pytest.mark.parametrize("amaxes", AMAXES, ids=str)
def test_amaxes(monkeypatch, amaxes, rule):
    """Outside of the range of the filter every tile is undecided; if they differ, all is done
    twice."""
    check(monkeypatch, simt.matrix(33, 72), *amaxes, rule=rule)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sides", [{}, {"col": False}, {"row": False}], ids=str)
def test_undecided_tiles(monkeypatch, sides, order):
    x = undecided(50, 80)
    x[3, 5], x[20, 20] = float("nan"), float("-inf")
    check(monkeypatch, x, 6.0, 6.0, **sides, order=order)


def test_static_6(monkeypatch):
    x = simt.matrix(40, 88)
    check(monkeypatch, x, 1.5, 1.5, rule="static_6")


def test_reads_nothing_beside_a_view(monkeypatch):
    wide = torch.full((2, 50, 96), float("nan")).bfloat16()
    x = wide[:, 3:43, 8:80]
    x.copy_(simt.matrix(2, 40, 72))
    check(monkeypatch, x, 4.0, 4.0)


def forgets(name):
    """A kernel in which a step is missing."""
    return quantize_tiles_staged.QuantizeTilesStaged, name, lambda *_: None


def unswizzled(mine, i):
    """As if rows r and r + 4 lay alike."""
    return LOAD_ROW(mine ^ (mine >> 5 & 16), i)


LOAD_ROW, STORE_COLUMNS = warp_tiles.load_row, warp_tiles.store_columns
MUTANTS = {
    "no barrier after the copies": (
        warp_tiles,
        "wait",
        lambda: warp_tiles.shared.wait_copies(),
    ),
    "no wait": (warp_tiles, "wait", lambda: warp_tiles.arch.sync_warp()),
    "undecided tiles as they are": forgets("finish"),
    "another tile's rows": (warp_tiles, "load_row", unswizzled),
    "the other half of a sector": (
        warp_tiles,
        "store_columns",
        lambda at, words, part, lane: STORE_COLUMNS(at, words, 1 - part, lane),
    ),
    "scales of one row less": (warp_tiles, "BAND", 127),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees(monkeypatch, mutant):
    """Each of these mistakes is a race, or gives other bits."""
    owner, name, value = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, value)
    x = undecided(50, 80)
    x[3, 5] = float("inf")
    with pytest.raises(AssertionError):
        check(monkeypatch, x, 6.0, 6.0)


def test_bank_conflicts_are_seen():
    shared = simt.Shared(simt.Warp(), 4096)

    def lane(_):
        shared.load_v4(simt.u32(shared.warp.lane * 128))

    shared.warp.run(lane)
    assert shared.conflicts() == {"load"}


def keys():
    """Every key of the kernel, by its sides and rule."""
    found = {}
    for op in ("quantize", "quantize_pair"):
        for entry in TABLES[op]:
            if entry.name != "quantize_tiles_staged":
                continue
            for chosen in itertools.product(*entry.options.values()):
                key = entry.key(torch.bfloat16, chosen)
                options = dict(key.options)
                side = {True: "col", False: "row", None: "both"}[options.get("by_column")]
                found[f"{side}-{options['scale_rule']}"] = key
    return found


KEYS = keys()


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_103a", "sm_120a"])
@pytest.mark.parametrize("name", KEYS)
def test_fits_in_its_registers(tmp_path, name, arch):
    compiled = build.compiled(KEYS[name], arch, f"--keep-ptx --keep-cubin --dump-dir {tmp_path}")
    ptx = compiled.__ptx__
    assert f".minnctapersm {host.CTAS_PER_SM}" in ptx and f".reqntid {host.THREADS}" in ptx
    assert ("stmatrix" in ptx) is (not name.startswith("row"))
    assert ("cvt.rn.satfinite.e2m1x2.f32" in ptx) is (arch != "sm_90a")
    assert "cp.async.cg.shared.global" in ptx and ".local" not in ptx
    found = cubins.attributes(compiled.__cubin__)
    assert set(found[cubins.FRAME]) == set(found[cubins.STACK]) == {0}, "a frame would be a spill"
    # Registers are handed out to warps in units of 8 a thread.
    most = 65536 // (host.THREADS * host.CTAS_PER_SM) // 8 * 8
    assert max(found[cubins.REGISTERS]) <= most


@pytest.fixture
def kernels(monkeypatch):
    found = stand_ins.install(monkeypatch)
    with stand_ins.guarded():
        yield found


ROW, COL = torch.tensor(3.0), torch.tensor(7.0)


def same(actual, expected):
    return all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_pairs_are_launched(kernels, name):
    x = cute_cases.matrix(name, torch.bfloat16)
    for rule in ("mse", "static_6"):
        options = {"block": "2d", "scale_rule": rule}
        actual = cuda.cuda_quantize_pair(x, ROW, COL, **options)
        assert same(actual, QUANTIZE_PAIR.reference(x, ROW, COL, **options))
    served = kernels.names() == ["quantize_tiles_staged"] * 2
    assert served is (not layout.vector(x))


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_orientation_is_launched(kernels, name, transpose):
    x = cute_cases.matrix(name, torch.bfloat16)
    options = {"block": "2d", "transpose": transpose}
    assert same(cuda.cuda_quantize(x, ROW, **options), QUANTIZE.reference(x, ROW, **options))
    served = kernels.names() == ["quantize_tiles_staged"]
    assert served is (not layout.vector(x) or not layout.vector(x.mT))


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 128, 64), (2, 0, 64)])
def test_nothing_to_do(kernels, shape):
    x = torch.empty(shape).bfloat16()
    expected = QUANTIZE_PAIR.reference(x, ROW, COL, block="2d")
    assert same(cuda.cuda_quantize_pair(x, ROW, COL, block="2d"), expected)
    assert same(cuda.cuda_quantize(x, ROW, block="2d"), expected[:2])
    assert not kernels.launched


@pytest.mark.parametrize(
    "options",
    [{"rounding": "stochastic"}, {"rht": True}, {"scale_rule": "mae"}, {"block": "1d"}],
    ids=str,
)
def test_other_options_go_elsewhere(kernels, options):
    x = cute_cases.matrix("rows", torch.bfloat16)
    options = {"block": "2d", **options}
    seed = torch.ones(1, dtype=torch.int64)
    actual = cuda.cuda_quantize(x, ROW, seed, **options)
    assert same(actual, QUANTIZE.reference(x, ROW, seed, **options))
    assert "quantize_tiles_staged" not in kernels.names()


def test_the_host_calls_what_it_compiles():
    """The number, order and types of arguments: the compiled code looks at x last of all."""
    x = torch.empty(16, 64).bfloat16()
    for name, key in KEYS.items():
        kernel = build.load(key, build.object_file(key, "sm_90a"))
        given = x.mT if name.startswith("col") else x
        amaxes = (ROW,) if "rounding" in dict(key.options) else (ROW, COL)
        launch = host.prepare(kernel, 132, key, given)
        with pytest.raises(ValueError, match="device_type=cuda"):
            launch(given, *amaxes, None, 0)
