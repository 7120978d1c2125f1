"""A kernel for both orientations: when it serves, and what serves where it does not."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import stand_ins
from cute_cases import matrix
from fos_compile.kernels import QUANTIZE_PAIR, cuda
from fos_compile.kernels.cute import launch, selftest, tables
from fos_compile.kernels.errors import InvalidArgument

CPU = torch.device("cpu")
SEED = torch.tensor([-(2**40) + 3])
AMAX_ROW, AMAX_COL = torch.tensor(3.0), torch.tensor(7.0)
DICE = {"rounding_row": "stochastic", "rounding_col": "stochastic_unbiased", "rht_col": True}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "quantize_pair", (stand_ins.pair_entry(),))
    return stand_ins.install(monkeypatch)


def check(x, *amaxes, seed=SEED, **options):
    """A call against its definition."""
    amaxes = amaxes or (AMAX_ROW, AMAX_COL)
    actual = cuda.cuda_quantize_pair(x, *amaxes, seed, **options)
    expected = QUANTIZE_PAIR.reference(x, *amaxes, seed, **options)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("name", ["rows", "slice", "misaligned", "batch", "batch of tiles"])
@pytest.mark.parametrize("options", [{}, {"block": "2d"}, {**DICE, "stream": 8}], ids=str)
def test_one_launch_for_both(kernels, name, options):
    for _ in range(2):
        check(matrix(name, torch.bfloat16), **options)
    assert kernels.names() == ["pair"] * 2 and len(kernels.compiled) == 1


@pytest.mark.parametrize(
    "name,dtype,options",
    [
        ("ragged", torch.bfloat16, {}),
        ("mT", torch.bfloat16, {}),
        ("rows", torch.float16, {}),
        ("rows", torch.bfloat16, {"format": "mxfp4", "scale_rule": "static_6"}),
    ],
)
def test_two_launches_where_it_cannot(kernels, name, dtype, options):
    for _ in range(2):
        check(matrix(name, dtype), **options, rounding_col="stochastic", rht_row=True, stream=2)
    names = kernels.names()
    assert len(names) == 4 and "pair" not in names


def test_options_that_a_kernel_does_not_take(kernels, monkeypatch):
    entry = stand_ins.pair_entry(block=("1d",), rht_row=(False,))
    monkeypatch.setitem(tables.TABLES, "quantize_pair", (entry,))
    x = matrix("rows", torch.bfloat16)
    check(x, block="2d")
    check(x, rht_row=True)
    assert "pair" not in kernels.names()
    check(x)
    assert len(kernels.launched) == 5 and kernels.names()[4:] == ["pair"]
    assert launch.reason("quantize_pair", x, {"block": "2d"}) == "block must be 1d, got 2d"


def test_a_table_may_be_empty(kernels, monkeypatch):
    monkeypatch.setitem(tables.TABLES, "quantize_pair", ())
    check(matrix("rows", torch.bfloat16))
    assert len(kernels.launched) == 2
    assert launch.reason("quantize_pair", matrix("rows", torch.bfloat16), {}) == "no kernel"


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 128, 64), (2, 5, 0)])
def test_empty_matrices(kernels, shape):
    check(torch.empty(shape, dtype=torch.bfloat16))
    assert not kernels.launched


def test_one_orientation_may_be_left_to_the_reference(kernels, monkeypatch):
    """More batches than a grid holds, and single kernels that do not compile."""
    check(matrix("rows", torch.bfloat16)[:1, :16].expand(65536, 1, 16), scale_rule="static_4")
    assert not kernels.launched
    good = kernels.get
    monkeypatch.setattr(
        kernels, "get", lambda k, a: good(k, a) if dict(k.options).get("rht") else 1 / 0
    )
    with pytest.warns(UserWarning, match="does not compile"):
        check(matrix("ragged", torch.bfloat16), rht_row=True)
    assert kernels.names() == ["quantize_filtered"]


def test_nearest_needs_no_seed(kernels):
    check(matrix("rows", torch.bfloat16), seed=None)
    check(matrix("rows", torch.bfloat16), seed=torch.ones(2, device="meta"))
    assert kernels.names() == ["pair"] * 2


WRONG = [
    ((AMAX_ROW.double(), AMAX_COL, SEED), "amax must be torch.float32"),
    ((AMAX_ROW, AMAX_COL.expand(2), SEED), "amax must be torch.float32 with one element"),
    ((AMAX_ROW, AMAX_COL.to("meta"), SEED), "amax must be on cpu"),
    ((AMAX_ROW, AMAX_COL, None), "seed must be an int64 tensor"),
    ((AMAX_ROW, AMAX_COL, SEED.float()), "seed must be torch.int64"),
    ((AMAX_ROW, AMAX_COL, SEED.to("meta")), "seed must be on cpu"),
]


@pytest.mark.parametrize("arguments,message", WRONG)
@pytest.mark.parametrize("side", ["rounding_row", "rounding_col"])
def test_wrong_arguments_are_named(kernels, arguments, message, side):
    """After a good call too."""
    x = matrix("rows", torch.bfloat16)
    check(x, **{side: "stochastic"})
    with pytest.raises(InvalidArgument, match=message):
        cuda.cuda_quantize_pair(x, *arguments, **{side: "stochastic"})
    assert "pair" not in kernels.names()[1:]


def test_supports_either_way(monkeypatch):
    with FakeTensorMode():
        x = torch.empty(64, 128, dtype=torch.bfloat16, device="cuda")
        numbers = torch.empty((), device="cuda"), torch.empty((), device="cuda")
        assert QUANTIZE_PAIR.supports(x, *numbers, scale_rule="mae", stream=2)
        monkeypatch.setattr(launch, "_PLANS", {})
        monkeypatch.setitem(tables.TABLES, "quantize", ())
        assert QUANTIZE_PAIR.supports(x, *numbers, scale_rule="mae", rht_col=True)
        status = QUANTIZE_PAIR.supports(x.mT, *numbers)
        assert status.reason == "quantize_pair: quantize: no kernel; the decomposition serves"


def test_symbolic_sizes_are_not_guarded_on():
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:
        sizes = [DimDynamic.DYNAMIC, DimDynamic.STATIC]
        x = mode.from_tensor(
            torch.empty(20, 64, dtype=torch.bfloat16),
            symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes),
        )
        assert launch.reason("quantize_pair", x, {}) == ""
        assert launch.reason("quantize_pair", x.mT, {})
    assert not env.guards


def run(monkeypatch, spoil=lambda outputs: None, swap=False, **options):
    """What the self-test says of a pair kernel."""
    kernels = stand_ins.Kernels()
    entry = stand_ins.pair_entry()
    given = {**tables.DEFAULTS["quantize_pair"], **options}
    key = entry.key(torch.bfloat16, tuple(given[n] for n in tables.NAMES["quantize_pair"]))
    good = functools.partial(entry.launch, kernels.get(key, "sm_90a"), 132, key)

    def call(x, amax_row, amax_col, seed, stream):
        amaxes = (amax_col, amax_row) if swap else (amax_row, amax_col)
        outputs = good(x, *amaxes, seed, stream)
        spoil(outputs)
        return outputs

    return selftest.disagreement("quantize_pair", dict(key.options), torch.bfloat16, call, CPU)


@pytest.mark.parametrize("options", [{}, DICE, {"block": "2d", "rht_row": True}], ids=str)
def test_the_comparison_passes_a_good_kernel(monkeypatch, options):
    assert run(monkeypatch, **options) == ""


OUTPUTS = ["values", "scales", "values of the columns", "scales of the columns"]


@pytest.mark.parametrize("index,name", list(enumerate(OUTPUTS)))
def test_the_comparison_sees_one_wrong_bit(monkeypatch, index, name):
    wrong = run(monkeypatch, lambda outputs: outputs[index].view(-1)[11].bitwise_xor_(1), **DICE)
    assert wrong.startswith("differs from the reference in 1 of ") and wrong.endswith(f" {name}")


def test_the_comparison_sees_swapped_amaxes(monkeypatch):
    assert "differs from the reference" in run(monkeypatch, swap=True, rht_col=True)


def test_a_pair_kernel_that_differs_is_not_used(kernels, monkeypatch):
    monkeypatch.setattr(launch, "disagreement", lambda op, *_: "is wrong" * (op != "quantize"))
    x = matrix("rows", torch.bfloat16)
    with pytest.warns(UserWarning, match="pair is wrong; the next implementation serves"):
        check(x)
    check(x)
    assert len(kernels.launched) == 4 and "pair" not in kernels.names()
    assert launch.reason("quantize_pair", x, {}) == "pair is wrong"
