"""The kernel for 2D tiles: run on the CPU lane by lane, compiled for every architecture, launched."""

from __future__ import annotations

import itertools
import math
import types

import pytest
import torch

import simt
from fos_compile.kernels import QUANTIZE

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
from fos_compile.kernels.cute import (
    contract,
    filtered,
    filtered_tiles,
    host_quantize_filtered,
    quantize_tiles_staged,
    warp_tiles,
)

ORDERS = {"up": range(simt.LANES), "down": range(simt.LANES)[::-1]}


def plain(owner):
    """Functions as they are written, not as the DSL reads them."""
    return {name: f.__wrapped__ for name, f in vars(owner).items() if hasattr(f, "__wrapped__")}


def ceil_div(a, b):
    return -(-a // b)


DSL = {
    "Uint32": simt.u32,
    "Int32": simt.integer,
    "Int64": simt.integer,
    "Float32": float,
    "cute": types.SimpleNamespace(
        ceil_div=ceil_div, make_rmem_tensor=lambda size, kind: [kind(0)] * size
    ),
    "cutlass": types.SimpleNamespace(
        const_expr=lambda value: value,
        range=lambda *bounds, unroll=0: range(*map(simt.integer, bounds)),
        range_constexpr=range,
        min=min,
        Uint8=None,
    ),
}


def run(monkeypatch, x, amaxes, rules, *, row, col, order="up"):
    """What the kernel writes, and instructions with bank conflicts: (outputs, conflicts)."""
    batch, rows, cols = x.shape
    outputs, conflicts = [], set()
    for r, c, wanted in ((rows, cols, row), (cols, rows, col)):
        values, scales = QUANTIZE.reference(torch.zeros(batch, r, c).bfloat16(), torch.ones(()))
        outputs += [values.fill_(0xA5), scales.fill_(0xA5)] if wanted else [None, None]
    kernel = quantize_tiles_staged.QuantizeTilesStaged(rules, row=row, col=col)
    bound = {name: types.MethodType(f, kernel) for name, f in plain(type(kernel)).items()}
    for name, method in bound.items():
        monkeypatch.setattr(kernel, name, method, raising=False)
    for module in (quantize_tiles_staged, warp_tiles, contract):
        for name, value in {**DSL, **plain(module)}.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    matrix = types.SimpleNamespace(
        shape=tuple(x.shape),
        stride=tuple(x.stride()),
        iterator=types.SimpleNamespace(toint=x.data_ptr),
    )
    addresses = [0 if output is None else output.data_ptr() for output in outputs]
    warps = quantize_tiles_staged.WARPS
    ctas = batch * ceil_div(rows, warp_tiles.BAND) * kernel.groups(matrix)
    for cta, which in itertools.product(range(ctas), range(warps)):
        warp = simt.Warp(ORDERS[order])
        memory = simt.Memory(warp)
        for tensor in (*amaxes, *outputs):
            if tensor is not None:
                content = simt.of_tensor(tensor)
                memory.add(tensor.data_ptr(), len(content), content)
        span = 2 * (1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)))
        memory.add(x.data_ptr(), span, simt.of_tensor(x.as_strided((span // 2,), (1,))))
        shared = simt.Shared(warp, warps * warp_tiles.BYTES)
        shared.source = memory
        ptx = simt.ptx_of(warp, memory)
        for module in (contract, filtered, filtered_tiles, quantize_tiles_staged, warp_tiles):
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
                block_idx=lambda cta=cta: (cta, 0, 0),
                sync_warp=lambda warp=warp: warp.collect("barrier"),
                alloc_smem=lambda kind, size, alignment: 0,
            ),
        }
        for module, name in itertools.product((quantize_tiles_staged, warp_tiles), replaced):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, replaced[name])
        exponents = simt.u32(host_quantize_filtered.HALF_EXPONENTS)
        pointers = [amax.data_ptr() for amax in amaxes]
        warp.run(lambda lane: bound["kernel"](matrix, *pointers, *addresses, exponents))
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


def matrix(*shape):
    generator = torch.Generator().manual_seed(math.prod(shape))
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(torch.randint(-2, 1, (*shape[:-1], 1), generator=generator))
    x[..., 0, :5] = -0.0
    return x.bfloat16()


SHAPES = [(16, 16), (40, 88), (130, 72), (1, 64), (65, 8), (2, 33, 136)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_orientations(monkeypatch, shape):
    x = matrix(*shape)
    amax = float(x.abs().max())
    check(monkeypatch, x, amax, amax)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sides", ["row", "col"])
@pytest.mark.parametrize("shape", [(40, 88), (130, 72), (2, 33, 136)], ids=str)
def test_one_orientation(monkeypatch, shape, sides, order):
    x = matrix(*shape)
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
    check(monkeypatch, matrix(33, 72), *amaxes, rule=rule)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sides", [{}, {"col": False}, {"row": False}], ids=str)
def test_undecided_tiles(monkeypatch, sides, order):
    x = undecided(50, 80)
    x[3, 5], x[20, 20] = float("nan"), float("-inf")
    check(monkeypatch, x, 6.0, 6.0, **sides, order=order)


def test_static_6(monkeypatch):
    x = matrix(40, 88)
    check(monkeypatch, x, 1.5, 1.5, rule="static_6")


def test_reads_nothing_beside_a_view(monkeypatch):
    wide = torch.full((2, 50, 96), float("nan")).bfloat16()
    x = wide[:, 3:43, 8:80]
    x.copy_(matrix(2, 40, 72))
    check(monkeypatch, x, 4.0, 4.0)


def swapped(function):
    return lambda a, b, *rest: function(b, a, *rest)


def moved(at, words, store):
    return store(at ^ 16, words)


MUTANTS = {
    "no barrier after the copies": ("wait", lambda: warp_tiles.shared.wait_copies()),
    "too few rows": ("ROWS", 16),
    "another chunk": ("COLS", 128),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees(monkeypatch, mutant):
    monkeypatch.setattr(warp_tiles, *MUTANTS[mutant])
    x = matrix(40, 88)
    with pytest.raises(AssertionError):
        check(monkeypatch, x, 4.0, 4.0)
