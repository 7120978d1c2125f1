"""Launches that are kept: found again by what they were prepared for, and by nothing else."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref

import pytest
import torch

import stand_ins
from cute_cases import matrix
from fos_compile.kernels import AMAX, DEQUANTIZE, QUANTIZE, QUANTIZE_PAIR, cuda
from fos_compile.kernels.cute import launch, tables
from fos_compile.kernels.errors import InvalidArgument

SEED = torch.tensor([99])
AMAX_ = torch.tensor(3.0)


@pytest.fixture
def prepared(monkeypatch):
    """(op, layout) of everything that is prepared."""
    calls = []

    def watch(op, entry):
        def prepare(kernel, num_sms, key, x):
            calls.append((op, tuple(x.shape), x.stride()))
            return entry.prepare(kernel, num_sms, key, x)

        return dataclasses.replace(entry, prepare=prepare)

    for op, table in tables.TABLES.items():
        monkeypatch.setitem(tables.TABLES, op, tuple(watch(op, entry) for entry in table))
    return calls


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    return stand_ins.install(monkeypatch)


def same(actual, expected):
    assert all(map(torch.equal, actual, expected))


def quantize(x, amax=AMAX_, seed=SEED, **options):
    same(cuda.cuda_quantize(x, amax, seed, **options), QUANTIZE.reference(x, amax, seed, **options))


def test_calls_alike_are_prepared_once(prepared):
    """Other numbers, dice, addresses: the same launch."""
    for i in range(3):
        x = torch.randn(20, 72).bfloat16()
        quantize(x, AMAX_ + i, SEED + i, rounding="stochastic", stream=i)
    assert len(prepared) == 1
    for _ in range(2):
        same([cuda.cuda_amax(x, True)], [AMAX.reference(x, True)])
    assert len(prepared) == 2
    buffers = QUANTIZE.reference(x, AMAX_)
    for qs in (1.0, 1536.0):
        arguments = (*buffers, AMAX_, 20, 72)
        actual = cuda.cuda_dequantize(*arguments, qs=qs, dtype=torch.float16)
        same([actual], [DEQUANTIZE.reference(*arguments, qs=qs, dtype=torch.float16)])
    assert len(prepared) == 3


def test_a_pair_is_prepared_once(prepared):
    x = torch.randn(20, 72).half()
    for i in range(3):
        arguments = (x, AMAX_ + i, AMAX_ - i / 2, SEED)
        options = {"rounding_col": "stochastic", "stream": i}
        same(
            cuda.cuda_quantize_pair(*arguments, **options),
            QUANTIZE_PAIR.reference(*arguments, **options),
        )
    assert [op for op, *_ in prepared] == ["quantize"] * 2


OTHER = {
    "shape": (lambda x: x[:19], {}),
    "strides": (lambda x: x.mT.contiguous().mT, {}),
    "batch": (lambda x: x.unsqueeze(0), {}),
    "dtype": (lambda x: x.half(), {}),
    "orientation": (lambda x: x, {"transpose": True}),
    "rule": (lambda x: x, {"scale_rule": "static_6"}),
    "rounding": (lambda x: x, {"rounding": "stochastic"}),
    "transform": (lambda x: x, {"rht": True}),
}


@pytest.mark.parametrize("case", OTHER)
def test_calls_that_differ_are_not_alike(prepared, case):
    x = torch.randn(20, 72).bfloat16()
    change, options = OTHER[case]
    for _ in range(2):
        quantize(x)
        quantize(change(x), **options)
    assert len(prepared) == 2


def test_amax_of_other_orientations_is_another_launch(prepared):
    x = torch.randn(24, 24).bfloat16()
    for transpose in (False, True, False, True):
        same([cuda.cuda_amax(x, True, transpose)], [AMAX.reference(x, True, transpose)])
    assert len(prepared) == 2


def test_every_argument_of_a_decoding_counts(prepared):
    buffers = QUANTIZE.reference(torch.randn(20, 72), AMAX_)
    for amax in (None, AMAX_):
        for dtype in (torch.float16, torch.float32):
            arguments = (*buffers, amax, 20, 72)
            for _ in range(2):
                actual = cuda.cuda_dequantize(*arguments, qs=1536.0, dtype=dtype)
                same([actual], [DEQUANTIZE.reference(*arguments, qs=1536.0, dtype=dtype)])
                assert actual.dtype == dtype
    assert len(prepared) == 4


def test_a_misaligned_matrix_like_an_aligned_one(prepared):
    x = torch.empty(20 * 64 + 1, dtype=torch.bfloat16).normal_()
    for view in (x[:-1], x[1:], x[:-1]):
        quantize(view.view(20, 64))
    assert len(prepared) == 1


@pytest.mark.parametrize(
    "amax,seed,message",
    [
        (AMAX_.double(), SEED, "amax must be torch.float32"),
        (AMAX_.expand(2), SEED, "amax must be torch.float32 with one element"),
        (AMAX_.to("meta"), SEED, "amax must be on cpu"),
        (AMAX_, None, "seed must be an int64 tensor"),
        (AMAX_, SEED.to("meta"), "seed must be on cpu"),
    ],
)
def test_wrong_numbers_after_a_good_call_are_named(kernels, amax, seed, message):
    x = matrix("rows", torch.bfloat16)
    quantize(x, rounding="stochastic")
    with pytest.raises(InvalidArgument, match=message):
        cuda.cuda_quantize(x, amax, seed, rounding="stochastic")
    assert len(kernels.launched) == 1


@pytest.mark.parametrize("name,value", [("rows", 19), ("cols", 129), ("scales", None)])
def test_wrong_buffers_after_a_good_call_are_named(kernels, name, value):
    values, scales = QUANTIZE.reference(torch.randn(20, 72), AMAX_)
    given = {"values": values, "scales": scales, "amax": None, "rows": 20, "cols": 72}
    cuda.cuda_dequantize(**given, dtype=torch.float32)
    given[name] = scales[:512] if name == "scales" else value
    with pytest.raises(InvalidArgument, match=f"{name} must"):
        cuda.cuda_dequantize(**given, dtype=torch.float32)
    assert len(kernels.launched) == 1


def test_what_serves_during_a_capture_does_not_stay(kernels, monkeypatch):
    """The fast kernel has not been compared yet; a general one serves until it has."""
    x = matrix("rows", torch.bfloat16)
    options = ("nvfp4", "mse", "nearest", "1d", False, False)
    general = launch._plan("quantize", options, x.dtype, x.device)[-1]
    assert general.prepare(x) is not None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    quantize(x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    quantize(x)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    quantize(x)
    first, *later = kernels.names()
    assert first != "quantize_filtered" and later == ["quantize_filtered"] * 2


def test_two_launches_during_a_capture_do_not_stay(kernels, monkeypatch):
    """Both single kernels have been compared, that for the pair has not."""
    monkeypatch.setitem(tables.TABLES, "quantize_pair", (stand_ins.pair_entry(),))
    x = matrix("rows", torch.bfloat16)
    quantize(x)
    quantize(x, transpose=True)
    for is_capturing in (True, False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda on=is_capturing: on)
        same(
            cuda.cuda_quantize_pair(x, AMAX_, AMAX_ + 1),
            QUANTIZE_PAIR.reference(x, AMAX_, AMAX_ + 1),
        )
    names = kernels.names()[2:]
    assert len(names) == 4 and names[2:] == ["pair"] * 2 and "pair" not in names[:2]


def test_other_shapes_of_a_compared_kernel_are_prepared_during_a_capture(kernels, monkeypatch):
    quantize(torch.randn(20, 72).bfloat16())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    quantize(torch.randn(40, 72).bfloat16())
    assert kernels.names() == ["quantize_filtered"] * 2


def test_no_more_are_kept_than_the_limit(prepared, monkeypatch):
    monkeypatch.setattr(launch, "MAX_READY", 4)
    for rows in range(1, 12):
        quantize(torch.randn(rows, 64).bfloat16())
        assert len(launch._READY) <= 4
    quantize(torch.randn(11, 64).bfloat16())
    assert len(prepared) == 11


class Memory(bytearray):
    """Can be watched."""


@pytest.mark.parametrize("transpose", [False, True])
def test_nothing_of_a_call_is_kept_alive(transpose):
    memory = Memory(20 * 72 * 2)
    watched = weakref.ref(memory)
    x = torch.frombuffer(memory, dtype=torch.bfloat16).view(20, 72)
    quantize(x, transpose=transpose)
    same([cuda.cuda_amax(x, True, transpose)], [torch.zeros(())])
    cuda.cuda_quantize_pair(x, AMAX_, AMAX_)
    del x, memory
    gc.collect()
    assert watched() is None


def test_threads_may_make_first_calls_at_once():
    shapes = [(rows, 64) for rows in range(1, 9)]
    expected = {s: QUANTIZE.reference(torch.ones(s).bfloat16(), AMAX_) for s in shapes}
    wrong, start = [], threading.Barrier(8)

    def work(shift):
        start.wait()
        for shape in (shapes[shift:] + shapes[:shift]) * 3:
            actual = cuda.cuda_quantize(torch.ones(shape).bfloat16(), AMAX_)
            if not all(map(torch.equal, actual, expected[shape])):
                wrong.append(shape)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
