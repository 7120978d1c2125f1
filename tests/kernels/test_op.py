"""Every registered operator is complete, and the checks that say so can fail."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from fos_compile.kernels.cpu import build
from fos_compile.kernels.op import REGISTRY, Op

CONTRACT = Path(__file__).resolve().parents[2] / "docs" / "contract.md"
NAMES = ("amax", "quantize", "quantize_pair", "dequantize", "scaled_mm", "seed", "unpacked_mm")
EXAMPLES = [(name, i) for name, op in REGISTRY.items() for i in range(len(op.example_inputs()))]


def _normal(schema: str) -> str:
    """A schema without what torch's printer and a page may spell differently."""
    return re.sub(r"\s+", " ", schema.replace('"', "'")).replace("fos::", "").strip()


def _contract_schemas() -> dict[str, str]:
    block = CONTRACT.read_text().split("```")[1]
    lines = [line for line in block.splitlines() if "->" in line]
    return {line.split("(")[0]: str(torch._C.parse_schema(f"fos::{line}")) for line in lines}


def _metadata(outputs):
    return [(tuple(t.shape), t.stride(), t.dtype) for t in pytree.tree_leaves(outputs)]


def missing_pieces(op: Op) -> list[str]:
    """What `op` lacks to be an operator of this library; empty when complete."""
    if not isinstance(op.name, str) or not hasattr(torch.ops.fos, op.name):
        return ["registration"]
    missing = []
    actual = str(getattr(torch.ops.fos, op.name).default._schema)
    if not op.schema or str(torch._C.parse_schema(f"fos::{op.name}{op.schema}")) != actual:
        missing.append("schema")
    if _normal(_contract_schemas().get(op.name, "")) != _normal(actual):
        missing.append("contract")
    missing += [
        piece
        for piece in ("reference", "fake", "supports", "cost", "example_inputs")
        if not callable(getattr(op, piece)) or not (getattr(op, piece).__doc__ or "").strip()
    ]
    if not isinstance(op.inlinable, bool):
        missing.append("inlinable")
    if missing:
        return missing
    examples = op.example_inputs()
    if not examples:
        return ["example_inputs"]
    return sorted({piece for args, kwargs in examples for piece in _wrong(op, args, kwargs)})


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def _wrong(op: Op, args, kwargs) -> list[str]:
    """Pieces that answer wrongly for one example."""
    wrong = []
    torch.manual_seed(0)
    outputs = getattr(torch.ops.fos, op.name)(*args, **kwargs)
    torch.manual_seed(0)
    reference = op.reference(*args, **kwargs)
    pairs = zip(pytree.tree_leaves(outputs), pytree.tree_leaves(reference), strict=True)
    if not all(_same(a, b) for a, b in pairs):
        wrong.append("reference")
    with FakeTensorMode() as mode:
        fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
        if _metadata(op.fake(*fakes[0], **fakes[1])) != _metadata(outputs):
            wrong.append("fake")
    status = op.supports(*args, **kwargs)
    if getattr(status, "reason", None) is None or bool(status) is bool(status.reason):
        wrong.append("supports")
    numbers = op.cost(*args, **kwargs)
    if len(numbers) != 2 or not all(isinstance(n, int) and n >= 0 for n in numbers):
        wrong.append("cost")
    return wrong


def test_registry_holds_the_operators_of_the_contract():
    assert set(REGISTRY) == set(NAMES) == set(_contract_schemas())
    assert all(name == op.name for name, op in REGISTRY.items())
    assert [name for name, op in REGISTRY.items() if not op.inlinable] == ["seed"]


@pytest.mark.parametrize("name", NAMES)
def test_operator_is_complete(name):
    assert missing_pieces(REGISTRY[name]) == []


def _undocumented(*args, **kwargs):
    raise AssertionError("an undocumented piece is reported before it is called")


def _answer(value):
    def piece(*args, **kwargs):
        """Always the same answer."""
        return value

    return piece


INCOMPLETE = {
    "registration": {"name": "no_such_operator"},
    "schema": {"schema": "(Tensor x, Tensor amax) -> Tensor"},
    "reference": {"reference": _answer((torch.zeros(1), torch.zeros(1)))},
    "fake": {"fake": _answer((torch.zeros(1), torch.zeros(1)))},
    "supports": {"supports": _answer(True)},
    "cost": {"cost": _answer((1.5, -1))},
    "example_inputs": {"example_inputs": _answer([])},
    "inlinable": {"inlinable": None},
}


@pytest.mark.parametrize("piece", sorted(INCOMPLETE))
def test_a_wrong_piece_is_found(piece):
    assert missing_pieces(replace(REGISTRY["quantize"], **INCOMPLETE[piece])) == [piece]


@pytest.mark.parametrize("piece", ["reference", "fake", "supports", "cost", "example_inputs"])
@pytest.mark.parametrize("value", [None, _undocumented], ids=["none", "undocumented"])
def test_an_absent_piece_is_found(piece, value):
    assert missing_pieces(replace(REGISTRY["quantize"], **{piece: value})) == [piece]


def test_a_page_that_disagrees_is_found(monkeypatch):
    page = _contract_schemas() | {"quantize": "fos::quantize(Tensor x) -> Tensor"}
    monkeypatch.setitem(globals(), "_contract_schemas", lambda: page)
    assert missing_pieces(REGISTRY["quantize"]) == ["contract"]


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_frozen(name):
    with pytest.raises(FrozenInstanceError):
        REGISTRY[name].name = "other"


@pytest.mark.parametrize("name", NAMES)
def test_reason_names_the_operator_and_the_device(name):
    args, kwargs = REGISTRY[name].example_inputs()[0]
    args = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), args)
    kwargs = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), kwargs)
    status = REGISTRY[name].supports(*args, **kwargs)
    assert not status
    assert name in status.reason and "meta" in status.reason


@pytest.mark.parametrize("name", NAMES)
def test_without_a_cpu_kernel_there_is_a_reason(name, monkeypatch):
    monkeypatch.setenv("FOS_CPU_KERNEL", "0")
    build.library.cache_clear()
    try:
        args, kwargs = REGISTRY[name].example_inputs()[0]
        status = REGISTRY[name].supports(*args, **kwargs)
        assert not status and status.reason
    finally:
        build.library.cache_clear()


@pytest.mark.parametrize("name", ["amax", "quantize", "quantize_pair"])
def test_reason_names_a_dtype_that_cannot_be_quantized(name):
    op = REGISTRY[name]
    (x, *rest), kwargs = op.example_inputs()[0]
    status = op.supports(x.double(), *rest, **kwargs)
    assert not status and "float64" in status.reason


@pytest.mark.parametrize("name,index", EXAMPLES)
def test_opcheck(name, index):
    args, kwargs = REGISTRY[name].example_inputs()[index]
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # Drawing twice gives two seeds, so only the deterministic operators can be compared so.
    utils += ["test_aot_dispatch_dynamic", "test_aot_dispatch_static"] * (name != "seed")
    result = torch.library.opcheck(
        getattr(torch.ops.fos, name).default, args, kwargs, test_utils=utils
    )
    assert set(result.values()) == {"SUCCESS"}


def test_costs_count_what_is_moved():
    x, amax = torch.empty(128, 256, dtype=torch.bfloat16), torch.ones(())
    values, scales = 128 * 128, 128 * 16
    quantize, pair = REGISTRY["quantize"], REGISTRY["quantize_pair"]
    one = quantize.cost(x, amax)
    assert one[0] == x.numel() * 2 + values + scales
    both = pair.cost(x, amax, amax)
    assert both[0] == x.numel() * 2 + 2 * (values + scales)
    assert both[1] == 2 * one[1] > 0
    assert quantize.cost(x, amax, scale_rule="static_6")[1] < one[1]
    args, kwargs = REGISTRY["scaled_mm"].example_inputs()[0]
    moved, flops = REGISTRY["scaled_mm"].cost(*args, **kwargs)
    assert flops == 2 * kwargs["m"] * kwargs["n"] * kwargs["k"]
    buffers = sum(t.numel() for t in (*args[:2], *args[4:6]))
    assert moved == buffers + kwargs["m"] * kwargs["n"] * kwargs["out_dtype"].itemsize
