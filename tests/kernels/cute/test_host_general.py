"""What the general host sides hand to a kernel: matrices, rounds, addresses, guarded buffers."""

from __future__ import annotations

import itertools

import pytest
import torch

import stand_ins
from cute_cases import LAYOUTS, matrix
from fos_compile.kernels import AMAX, DEQUANTIZE, QUANTIZE
from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute import host_quantize_blocks, host_quantize_tiles
from fos_compile.kernels.cute.cache import KernelKey
from fos_compile.kernels.cute.tables import NAMES, TABLES

ARCH = "sm_90a"


def entry_for(op, x, dtype, *options):
    """The last entry, which reads anything, and one for each way to read x."""
    for entry in TABLES[op]:
        if not entry.refuses(NAMES[op], dtype, options) and not entry.layout(x):
            yield entry, entry.key(dtype, options)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("block", ["1d", "2d"])
def test_quantize_between_guards(name, block):
    x = matrix(name, torch.float16)
    amax, seed = torch.tensor(3.0), torch.tensor([-(2**63) + 5])
    rounding, stream = "stochastic_unbiased", 2**32 - 7
    options = ("nvfp4", "abs_max", rounding, block, True, False)
    expected = QUANTIZE.reference(
        x, amax, seed,
        scale_rule="abs_max", rounding=rounding, block=block, rht=True, stream=stream,
    )  # fmt: skip
    for entry, key in entry_for("quantize", x, x.dtype, *options):
        kernel = stand_ins.Kernels().get(key, ARCH)
        with stand_ins.guarded() as zones:
            actual = entry.launch(kernel, 132, key, x, amax, seed, stream)
            assert len(zones.buffers) == 2
        assert all(map(torch.equal, actual, expected))


def test_guards_see_a_byte_too_many():
    def kernel(x, amax, seed, values, scales, *rest):
        stand_ins.memory(scales + 512 * 1, 1).fill_(0)

    x = matrix("misaligned", torch.float16)
    key = TABLES["quantize"][-1].key(x.dtype, ("nvfp4", "mse", "nearest", "1d", False, False))
    with pytest.raises(AssertionError), stand_ins.guarded():
        host_quantize_blocks.prepare(kernel, 132, key, x)(x, torch.ones(()), None, 0)


def test_guards_see_what_is_not_written():
    x = matrix("rows", torch.float16)
    key = TABLES["quantize"][-1].key(x.dtype, ("nvfp4", "mse", "nearest", "1d", False, False))
    with stand_ins.guarded():
        launch = host_quantize_blocks.prepare(lambda *_: None, 132, key, x)
        values, scales = launch(x, torch.ones(()), None, 0)
    assert (values == 0xA5).all() and (scales == 0xA5).all()


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 3, 64), (2, 0, 64), (2, 3, 0)])
def test_nothing_is_launched_for_nothing(shape):
    x, amax = torch.empty(shape, dtype=torch.float16), torch.zeros(())
    options = ("nvfp4", "mae", "nearest", "1d", False, False)
    for entry, key in entry_for("quantize", x, x.dtype, *options):
        actual = entry.launch(None, 132, key, x, amax, None, 0)
        expected = QUANTIZE.reference(x, amax, scale_rule="mae")
        assert [t.shape for t in actual] == [t.shape for t in expected]
    for entry, key in entry_for("amax", x, x.dtype, True):
        assert entry.launch(None, 132, key, x) == 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_amax_between_guards(name):
    x = matrix(name, torch.bfloat16)
    for entry, key in entry_for("amax", x, x.dtype, True):
        kernel = stand_ins.Kernels().get(key, ARCH)
        with stand_ins.guarded():
            actual = entry.launch(kernel, 132, key, x)
        assert torch.equal(actual, AMAX.reference(x, True))


VALUES = {
    "plain": lambda v: v,
    "misaligned": lambda v: torch.cat([v.new_zeros(3), v.flatten()])[3:].view(v.shape),
    "every second column": lambda v: torch.stack([v, v], -1)[..., 0],
    "a batch": lambda v: v.view(2, 9, 64),
    "a slice of batches": lambda v: torch.stack([v, v, v])[::2],
}


@pytest.mark.parametrize("view", VALUES)
@pytest.mark.parametrize("cols", [128, 70, 65, 0])
@pytest.mark.parametrize("amax", [None, torch.tensor(3.0)], ids=["unscaled", "scaled"])
def test_dequantize_between_guards(view, cols, amax):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(256, (18, 64), dtype=torch.uint8, generator=generator)
    values = VALUES[view](values)
    *batch, rows, _ = values.shape
    scales = torch.randint(127, (*batch, 1024), dtype=torch.uint8, generator=generator)
    options = ("nvfp4", amax is not None, torch.float16)
    ((entry, key),) = entry_for("dequantize", values, torch.uint8, *options)
    kernel = stand_ins.Kernels().get(key, ARCH)
    with stand_ins.guarded():
        actual = entry.launch(kernel, 132, key, values, scales, amax, cols, 1536.0, torch.float16)
    expected = DEQUANTIZE.reference(
        values, scales, amax, rows, cols, qs=1536.0, dtype=torch.float16
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("view", [general._view, general._as_strided])
def test_a_matrix_is_read_where_its_elements_are(monkeypatch, name, view):
    """Whatever else the tensor of the call is: here the transposed one."""
    monkeypatch.setattr(general, "_view", view)
    x = matrix(name, torch.bfloat16).requires_grad_()
    for seen, given in ((x, x), (x, x.mT), (x.mT, x)):
        got = general.reader(seen, False)(given)
        want = seen if seen.dim() == 3 else seen.unsqueeze(0)
        assert got.shape == want.shape and got.stride() == want.stride()
        assert got.data_ptr() == x.data_ptr() and torch.equal(got, want)
        assert not got.requires_grad


def test_a_view_that_begins_anywhere_is_copied_for_vectors_only():
    x = matrix("misaligned", torch.bfloat16)
    assert x.data_ptr() % 16
    assert general.reader(x, False)(x).data_ptr() == x.data_ptr()
    copied = general.reader(x, True)(x)
    assert copied.data_ptr() % 16 == 0 and torch.equal(copied[0], x)
    batch = matrix("misaligned batch", torch.bfloat16)
    assert torch.equal(general.reader(batch, True)(batch), batch)
    aligned = x.clone()
    assert general.reader(x, True)(aligned).data_ptr() == aligned.data_ptr()


SHAPES = [(), (0,), (3,), (2, 5), (0, 5), (5, 0), (2, 3, 4), (2, 0, 4), (0, 3, 0)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("fast", [True, False])
def test_buffers_are_those_of_torch_empty(monkeypatch, shape, fast):
    if not fast:
        monkeypatch.delattr(general.guards, "_empty_strided_cpu")
    want = torch.empty(shape, dtype=torch.float16)
    new = general.allocator(shape, torch.float16, torch.device("cpu"))
    got, other = new(), new()
    assert got.dtype == want.dtype and got.device == want.device
    assert got.shape == want.shape and got.stride() == want.stride()
    assert not want.numel() or got.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("count,current,fast", [(1, 0, True), (2, 1, True), (2, 0, False)])
def test_buffers_are_on_the_device_that_was_asked_for(monkeypatch, count, current, fast):
    """The fast allocation takes the current device: with several, that is asked first."""
    used = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(general.guards, "_empty_strided_cuda", lambda *a: used.append(a))
    monkeypatch.setattr(torch, "empty_strided", lambda *a, **k: used.append((*a, k)))
    device = torch.device("cuda", count - 1)
    general.allocator((4, 8), torch.uint8, device)()
    wanted = {"dtype": torch.uint8, "device": device}
    assert used == [((4, 8), (8, 1), torch.uint8) if fast else ((4, 8), (8, 1), wanted)]


@pytest.mark.parametrize("sms", [1, 78, 132, 188])
def test_rounds_cover_within_a_grid(sms):
    batches, rows = (1, 7, 65535), (1, 128, 5000, 10**6)
    for batch, row, chunks in itertools.product(batches, rows, (1, 2, 15, 64, 10**5, 2**25)):
        rounds = general.rounds(batch, row, chunks, sms)
        assert rounds >= 1 and -(-chunks // rounds) <= general.MAX_GRID_YZ
        if chunks <= general.MAX_GRID_YZ:
            assert rounds <= general.MAX_ROUNDS
        ctas = batch * -(-row // 128) * 4 * -(-chunks // rounds)
        if rounds > 1 and chunks <= general.MAX_GRID_YZ:
            assert ctas >= general.CTAS_PER_SM * sms, "rounds must not leave SMs without work"


def test_options_of():
    key = KernelKey(name="a", dtype="bfloat16", options=(("rht", True),), alignment=1)
    assert general.options_of(key) == {"rht": True}


def test_tiles_are_launched_as_blocks_are():
    assert host_quantize_tiles.prepare is host_quantize_blocks.prepare
