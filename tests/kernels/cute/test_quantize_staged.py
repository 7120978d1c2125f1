"""The kernel for rows and columns of 1D blocks on the CPU, lane by lane, against the reference."""

from __future__ import annotations

import itertools
import math
import types

import numpy as np
import pytest
import torch

import cute_cases
import simt

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
from fos_compile.kernels.cute import (
    contract,
    fast,
    host_quantize_filtered,
    quantize_staged,
    random_bits,
    staged,
    tensor_constants,
)
from fos_compile.kernels.cute import tiles as tiles_of_scales
from fos_compile.kernels.cute.quantize_staged import QuantizeStaged, Side

pytestmark = pytest.mark.usefixtures("no_kernel")
LANES = range(quantize_staged.THREADS)
ORDERS = {"up": LANES, "down": LANES[::-1]}
GUARD = 256
"""Bytes of nobody around every output."""
IN_ORDER = (0, 1, 3)
"""What follows these barriers is done by all lanes alike; undecided blocks lie anywhere."""
SEED, STREAM = torch.tensor([-(2**40) + 3]), 8
WGRAD = {"rounding_col": "stochastic", "rht_col": True}
"""The pair of a linear layer's input: rows for the next product, columns for the weight's."""


def outputs_of(x, kernel):
    """Values and scales of both orientations, 0xA5 between and in them; None if not wanted."""
    batch, rows, cols = x.shape
    sizes = []
    for side, r, c in ((kernel.row, rows, cols), (kernel.col, cols, rows)):
        chunks = simt.ceil_div(c, 64)
        sizes += [batch * r * chunks * 32, batch * simt.ceil_div(r, 128) * chunks * 512]
        sizes[-2:] = sizes[-2:] if side else [0, 0]
    starts = [GUARD + sum(sizes[:i]) + i * GUARD for i in range(4)]
    arena = torch.full((starts[-1] + sizes[-1] + GUARD,), 0xA5, dtype=torch.uint8)
    views = [arena[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return [view if len(view) else None for view in views]


def run(monkeypatch, x, amaxes, kernel, *, order="up", without=None):
    """What the kernel writes and instructions with bank conflicts: (outputs, conflicts).

    Barrier `without` is left out, counted from 0.
    """
    outputs, conflicts = outputs_of(x, kernel), set()
    entry = simt.bind(monkeypatch, kernel, quantize_staged, staged, contract)
    monkeypatch.setattr(tiles_of_scales, "Uint32", simt.u32)
    matrix = simt.matrix_of(x)
    given = (*amaxes, SEED, *outputs)
    addresses = [0 if each is None else each.data_ptr() for each in given]
    streams = simt.u32(STREAM), simt.u32(STREAM + 1)
    exponents = simt.u32(host_quantize_filtered.HALF_EXPONENTS)
    written = [np.zeros(0 if each is None else len(each), int) for each in outputs]
    tiles = math.prod(simt.ceil_div(size, staged.SIDE) for size in x.shape[1:])
    for cta in itertools.product(range(tiles), range(len(x))):
        warp = simt.Warp(ORDERS[order])
        memory = simt.memory_of(warp, given, x)
        shared = simt.Shared(warp, 0)
        shared.source = memory
        with monkeypatch.context() as patch:
            install(patch, warp, memory, shared, cta, without)
            warp.run(lambda lane: entry(matrix, *addresses, *streams, exponents))
        conflicts |= shared.conflicts(IN_ORDER)
        for count, tensor in zip(written, outputs, strict=True):
            if tensor is not None:
                count += memory.written(tensor.data_ptr())
    assert all((count == 1).all() for count in written), "not by one CTA each"
    return outputs, conflicts


def install(patch, warp, memory, shared, cta, without):
    """What a CTA runs on."""
    ptx = simt.ptx_of(warp, memory)
    for module in simt.arithmetic():
        patch.setattr(module, "ptx", ptx)
    for module in (quantize_staged, staged, tensor_constants):
        patch.setattr(module, "shared", shared)
    passed = dict.fromkeys(LANES, -1)

    def sync_threads():
        passed[warp.lane] += 1
        if passed[warp.lane] != without:
            warp.collect("barrier")

    arch = types.SimpleNamespace(
        thread_idx=lambda: (warp.lane, 0, 0),
        block_idx=lambda: (*cta, 0),
        sync_threads=sync_threads,
        alloc_smem=lambda kind, size, alignment: shared.alloc(size),
    )
    patch.setattr(quantize_staged, "arch", arch)
    # A block at a time would take minutes.
    exactly = warp.together(
        lambda words, tensor, rules, dice, outside, by=fast.exact: by(
            words, tensor, rules, dice and (lambda: dice), outside
        )
    )
    patch.setattr(
        fast,
        "exact",
        lambda words, tensor, rules, throw, outside: exactly(
            words, tensor, rules, throw and throw(), bool(outside)
        ),
    )
    for module, name in ((fast, "block"), (fast, "rotated"), (random_bits, "philox")):
        patch.setattr(module, name, warp.together(getattr(module, name)))


def check(monkeypatch, x, *amaxes, row=True, col=True, rule="mse", order="up", **options):
    """Against the reference."""
    amaxes = [torch.tensor(amax) for amax in amaxes]
    x = x if x.dim() == 3 else x.unsqueeze(0)
    sides = []
    for wanted, name in ((row, "row"), (col, "col")):
        rounding = options.get(f"rounding_{name}", "nearest")
        rules = contract.Rules(scale_rule=rule, rounding=rounding)
        sides.append(Side(rules, options.get(f"rht_{name}", False)) if wanted else None)
    without = options.pop("without", None)
    kernel = QuantizeStaged(*sides)
    outputs, conflicts = run(monkeypatch, x, amaxes, kernel, order=order, without=without)
    assert not conflicts
    want = torch.ops.fos.quantize_pair(x, *amaxes, SEED, stream=STREAM, scale_rule=rule, **options)
    for i, (got, wanted) in enumerate(zip(outputs, want, strict=True)):
        if got is not None:
            off = (got.view(wanted.shape) != wanted).nonzero()
            assert not len(off), (i, wanted.shape, off[:8].tolist())


@pytest.mark.parametrize("shape", [(40, 88), (130, 136), (2, 24, 72)], ids=str)
def test_both_orientations(monkeypatch, shape):
    check(monkeypatch, simt.matrix(*shape), 4.0, 9.0, **WGRAD)


SINGLE = [
    {"row": False, "rht_col": True},
    {"row": False, "rounding_col": "stochastic_unbiased", "rule": "static_6"},
    {"col": False, "rounding_row": "stochastic", "rht_row": True},
]


@pytest.mark.parametrize("options", SINGLE, ids=str)
def test_one_orientation(monkeypatch, options):
    check(monkeypatch, simt.matrix(72, 136), 4.0, 4.0, order="down", **options)


def test_dice_for_both(monkeypatch):
    options = {"rounding_row": "stochastic_unbiased", "rounding_col": "stochastic"}
    check(monkeypatch, simt.matrix(40, 88), 5.0, 4.0, **options)


def beyond_amax():
    """Most blocks saturate at an amax of 0.5, which a filter leaves to the contract."""
    x = simt.matrix(50, 80)
    x[3, 5], x[20, 79], x[49, 30] = math.nan, math.inf, -math.inf
    return x


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("amax", [0.5, 4.0])
def test_a_static_amax(monkeypatch, amax, order):
    check(monkeypatch, beyond_amax(), amax, 2 * amax, order=order, **WGRAD)


LEAST, MOST = contract.MIDRANGE_AMAX
AMAXES = [
    (float("inf"), float("inf")),
    (4.0, float("nan")),
    (0.0, 4.0),
    (LEAST / 2, LEAST / 2),
    (MOST * 2, MOST * 2),
    (2.0**-117, 2.0**-115),
]


@pytest.mark.parametrize("amaxes", AMAXES, ids=str)
def test_amaxes(monkeypatch, amaxes):
    """Outside of the range of the filter every block is undecided, also those of the padding."""
    x = simt.matrix(40, 88)
    finite = [amax for amax in amaxes if 0 < amax < math.inf]
    factor = min(finite, default=1.0) / 4
    check(monkeypatch, (x.float() * factor).bfloat16(), *amaxes, **WGRAD)


def test_the_queue_is_as_long_as_the_tile_has_blocks(monkeypatch):
    x = (simt.matrix(128, 128).float() * MOST).bfloat16()
    amax = float(x.float().abs().max())
    assert amax > MOST
    check(monkeypatch, x, amax, amax, **WGRAD)


def test_an_infinite_amax_shows_in_the_padding(monkeypatch):
    x, amax = simt.matrix(1, 40, 88), torch.tensor(math.inf)
    kernel = QuantizeStaged(Side(contract.Rules(), rht=False), None)
    (values, scales, *_), _ = run(monkeypatch, x, [amax, amax], kernel)
    assert not values.any()
    # Of 128 rows and two chunks of four blocks 40 rows are there, all chunks.
    assert scales.unique().tolist() == [0, 0x7F] and (scales == 0x7F).sum() == 40 * 8


VIEWS = {
    "expanded": lambda: simt.matrix(1, 72).expand(40, 72),
    "expanded batch": lambda: simt.matrix(40, 72).expand(2, 40, 72),
    "sliced": lambda: cute_cases.padded_storage(simt.matrix(2, 40, 72), 8, 16)[:, 3:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(monkeypatch, view):
    """Nothing is read beside them, where NaN lies."""
    check(monkeypatch, VIEWS[view](), 4.0, 9.0, **WGRAD)


def test_static_6(monkeypatch):
    check(monkeypatch, simt.matrix(40, 88), 1.5, 1.5, rule="static_6", **WGRAD)


READS = {
    "the blocks of a row by 8 lanes": lambda lane: staged.row_block(0, lane >> 3, lane & 7),
    "a block of 8 rows by 8 lanes": lambda lane: staged.row_block(0, 24 + (lane & 7), lane >> 3),
    "8 words of 4 groups by a warp": lambda lane: staged.column_rows(
        0, 4 + (lane & 3), (lane >> 4) * 8 + (lane >> 2 & 3)
    ),
}


def conflicts_of(monkeypatch, read):
    """Of the first warp."""
    shared = simt.Shared(simt.Warp(), staged.TILE_BYTES)
    for name, value in {**simt.DSL, "shared": shared}.items():
        if hasattr(staged, name):
            monkeypatch.setattr(staged, name, value)
    shared.warp.run(read)
    assert all(shared.accesses)
    return shared.conflicts()


@pytest.mark.parametrize("read", READS)
def test_reads_meet_no_bank_twice(monkeypatch, read):
    assert not conflicts_of(monkeypatch, READS[read])


def test_bank_conflicts_are_seen(monkeypatch):
    wrong = {
        "load": lambda lane: staged.row_block(0, lane * 8 & 127, 0),
        "load word": lambda lane: staged.column_rows(0, lane & 3, lane >> 2),
    }
    for kind, read in wrong.items():
        assert conflicts_of(monkeypatch, read) == {kind}


@pytest.mark.parametrize("barrier", range(3))
def test_a_missing_barrier_is_seen(monkeypatch, barrier):
    """After the copies, before the exact phase, before the scales are written."""
    with pytest.raises(AssertionError):
        check(monkeypatch, beyond_amax(), 0.5, 0.5, without=barrier, **WGRAD)


def changed(method, **fields):
    """A method that is given an `Output` with something else in it."""

    def mutant(self, *given):
        found = [
            each._replace(**{name: f(getattr(each, name)) for name, f in fields.items()})
            if isinstance(each, quantize_staged.Output)
            else each
            for each in given
        ]
        return method(self, *found)

    return mutant


WRITTEN = simt.plain(QuantizeStaged)
REMEMBER, THROW = WRITTEN["remember"], QuantizeStaged.throw
FINISH_ROWS, FINISH_COLUMNS = (WRITTEN[name] for name in ("finish_rows", "finish_columns"))
MUTANTS = {
    "entries of the queue one too far": (
        QuantizeStaged,
        "remember",
        changed(REMEMBER, queue=lambda queue: queue + 2),
    ),
    "the first undecided rows left out": (
        QuantizeStaged,
        "finish_rows",
        lambda self, tile, out, first, step: FINISH_ROWS(self, tile, out, first + 32, step),
    ),
    "half of the undecided columns": (
        QuantizeStaged,
        "finish_columns",
        lambda self, tile, out, first, step: FINISH_COLUMNS(self, tile, out, first, 2 * step),
    ),
    "columns throw the dice of rows": (
        QuantizeStaged,
        "throw",
        changed(THROW, stream=lambda stream: simt.u32(STREAM)),
    ),
    "dice of the next row": (QuantizeStaged, "throw", changed(THROW, group=lambda n: n + 1)),
    "undecided blocks as they are": (QuantizeStaged, "finish", lambda *_: None),
    "rows beyond the matrix": (
        quantize_staged,
        "address",
        lambda out, row, block, by=quantize_staged.address: by(out, row + 1, block),
    ),
    "a swizzle without the groups": (staged, "swizzle", lambda row: row & 7),
    "rows and columns swizzled apart": (
        staged,
        "column_rows",
        lambda tile, group, pair, by=staged.column_rows: by(tile, group, pair ^ 8),
    ),
    "scales of the other chunk": (
        staged,
        "place_of_scale",
        lambda row, block, by=staged.place_of_scale: by(row, block ^ 4),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees(monkeypatch, mutant):
    """Each of these mistakes is a race, out of bounds or gives other bits."""
    owner, name, value = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(AssertionError):
        check(monkeypatch, beyond_amax(), 0.5, 0.5, rounding_row="stochastic", **WGRAD)


def test_the_comparison_passes_the_kernel_itself(monkeypatch):
    check(monkeypatch, beyond_amax(), 0.5, 0.5, rounding_row="stochastic", **WGRAD)


def test_a_swizzle_with_conflicts_is_seen(monkeypatch):
    """All lie where they are looked for, but columns of four groups in the same banks."""
    monkeypatch.setattr(staged, "swizzle", lambda row: row & 7)
    monkeypatch.setattr(staged, "turn", lambda place, j: place + j * staged.ROWS_A_TURN * 256)
    kernel = QuantizeStaged(None, Side(contract.Rules(), rht=False))
    amaxes = [torch.tensor(4.0)] * 2
    _, conflicts = run(monkeypatch, simt.matrix(1, 40, 88), amaxes, kernel)
    assert conflicts == {"load word"}
