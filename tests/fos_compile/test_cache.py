"""Compile caches: found again by another process, never for another configuration."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import MLP, bf16, tokens_of
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fos_compile import report_cache
from fos_compile.backend import Backend, GraphPasses
from fos_compile.config import BackendConfig, parse_options
from fos_compile.kernels.cpu import build
from fos_compile.kernels.op import Status
from fos_compile.passes.recipe import OperandSpec, Recipe
from fos_compile.passes.report import Report

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from fos_compile.backend import Backend
from fos_compile.config import parse_options

torch.manual_seed(0)
model = torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16)
x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
backend = Backend(parse_options({"strict": True}))
y = torch.compile(model, backend=backend)(x)
y.sum().backward()
report = backend.report
print(json.dumps({
    "counters": dict(counters["aot_autograd"]),
    "inductor": dict(counters["inductor"]),
    "rows": report.rows(),
    "summary": report.summary(),
    "bits": [t.view(torch.int16).tolist() for t in (y.detach(), x.grad, model.weight.grad)],
}))
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters.clear()
    return tmp_path


def hits() -> int:
    return counters["aot_autograd"]["autograd_cache_hit"]


def infer(model: nn.Module, **options: Any) -> tuple[Tensor, Backend]:
    torch.compiler.reset()
    backend = Backend(parse_options({"strict": True, **options}))
    with torch.no_grad():
        return torch.compile(model, backend=backend)(tokens_of()), backend


def test_a_fresh_process_finds_graph_and_report(tmp_path):
    def run() -> dict[str, Any]:
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "PYTHONSAFEPATH": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=environment,
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first, second = run(), run()
    assert first["counters"].get("autograd_cache_hit", 0) == 0
    assert first["counters"]["autograd_cache_saved"] == 1
    assert second["counters"]["autograd_cache_hit"] == 1
    assert second["counters"].get("autograd_cache_miss", 0) == 0
    for same in ("rows", "summary", "bits"):
        assert first[same] == second[same], same
    assert "3 of 3 matmuls quantized" in first["summary"]


def test_the_same_configuration_hits_and_keeps_its_report(cache):
    model = bf16(MLP(64, 64))
    first, cold = infer(model)
    assert hits() == 0
    second, warm = infer(model)
    assert hits() == 1
    assert torch.equal(first, second)
    assert warm.report.rows() == cold.report.rows()
    assert warm.report.quantizations == cold.report.quantizations > 0


def test_a_lost_report_is_made_again(cache):
    model = bf16(MLP(64, 64))
    _, cold = infer(model)
    (path,) = (cache / "fos_compile" / "reports").glob("*.json")
    for damage in ("", "{}", '{"recipe": "x", "sites": 3, "passes": []}', "[1]", "[]"):
        path.write_text(damage)
        _, warm = infer(model)
        assert warm.report.rows() == cold.report.rows(), damage
    assert hits() == 5


def test_a_report_survives_the_disk(cache):
    _, backend = infer(bf16(MLP(64, 64)), compiler="eager", skip=["nothing"])
    assert not (cache / "fos_compile").exists()  # without Inductor there is no hit to come
    assert backend.report.unused
    report_cache.save("key", backend.report)
    assert report_cache.load("key") == backend.report
    assert report_cache.load("another") is None


def test_a_report_that_cannot_be_written_leaves_no_file(cache, monkeypatch):
    def full(*args: Any) -> None:
        raise OSError("no space left")

    for module, name in ((json, "dump"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            report_cache.save("key", Report(recipe="r"))
        assert report_cache.load("key") is None
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_written_loses_only_the_report(cache):
    (cache / "fos_compile").write_text("a file where the folder should be")
    _, backend = infer(bf16(MLP(64, 64)))
    assert len(backend.report.quantized) == 2


BASE = OperandSpec(scale_rule="static_6")


def recipe(**changes: Any) -> Recipe:
    weight = dataclasses.replace(BASE, **changes)
    activation = dataclasses.replace(weight, block="1d")
    return Recipe(name="same", fprop_activation=activation, fprop_weight=weight)


VARIANTS: dict[str, dict[str, Any]] = {
    "base": {"recipe": recipe()},
    "scale_rule": {"recipe": recipe(scale_rule="mse")},
    "block": {"recipe": recipe(block="2d")},
    "rht": {"recipe": recipe(rht=True)},
    "format": {"recipe": recipe(format="mxfp4")},
    "rounding": {"recipe": recipe(rounding="stochastic")},
    "one operand": {"recipe": Recipe(name="same", fprop_weight=BASE)},
    "skip": {"recipe": recipe(), "skip": ["down"]},
    "override": {"recipe": recipe(), "overrides": {"down": "bf16"}},
    "none": {"recipe": "bf16"},
}


def test_no_variant_gets_the_graph_of_another(cache):
    """Recipes of one name: only the changed field tells them apart; each equals its eager run."""
    model = bf16(MLP(64, 64))
    want, seen = {}, {}
    for name, options in VARIANTS.items():
        torch.manual_seed(5)
        want[name], _ = infer(model, **options, compiler="eager")
    for name, options in VARIANTS.items():
        torch.manual_seed(5)
        seen[name], _ = infer(model, **options)
        assert torch.equal(seen[name], want[name]), name
    assert hits() == 0
    # Skipping a module and overriding it by bf16 is the same computation.
    assert torch.equal(seen.pop("override"), seen["skip"])
    assert len({tuple(out.flatten().tolist()) for out in seen.values()}) == len(seen)


class Nameless(nn.Module):
    """Two products in modules without parameters: Dynamo's code shows neither path."""

    class Product(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return x @ w

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = self.Product(), self.Product()

    def forward(self, x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return self.second(self.first(x, w), v)


def test_skip_of_a_module_without_parameters_is_not_stale(cache):
    x = tokens_of()[0]
    w, v = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(1)).bfloat16()

    def run(*skip: str, compiler: str = "inductor") -> Tensor:
        torch.compiler.reset()
        options = {"skip": list(skip), "compiler": compiler, "strict": True}
        with torch.no_grad():
            return torch.compile(Nameless(), backend="fouroversix", options=options)(x, w, v)

    outs = {skip: run(*skip) for skip in ((), ("first",), ("second",))}
    assert hits() == 0
    for skip, out in outs.items():
        assert torch.equal(out, run(*skip, compiler="eager")), skip
    assert len({tuple(out.flatten().tolist()) for out in outs.values()}) == 3


@pytest.mark.filterwarnings("ignore:fouroversix quantized nothing")
def test_a_renamed_module_is_decided_anew(cache):
    """Same code, same parameters, another path: a skip pattern may match now."""

    class Wrapper(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name
            self.add_module(name, Nameless.Product())

        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return getattr(self, self.name)(x, w)

    x, w = tokens_of()[0], torch.randn(64, 64).bfloat16()
    outs = []
    for name in ("body", "lm_head"):
        torch.compiler.reset()
        with torch.no_grad():
            backend = Backend(parse_options({"strict": True}))
            outs.append(torch.compile(Wrapper(name), backend=backend)(x, w))
    assert not torch.equal(outs[0], outs[1]) and torch.equal(outs[1], x @ w)


def test_parameters_and_activations_do_not_share_a_graph(cache):
    """A batched product with a parameter is quantized, one of two activations is not."""
    x = tokens_of()
    w = torch.randn(2, 64, 64).bfloat16()
    outs = []
    for weight in (w, nn.Parameter(w)):
        torch.compiler.reset()
        backend = Backend(parse_options({"strict": True}), fragment=True)
        with torch.no_grad():
            outs.append(torch.compile(torch.bmm, backend=backend)(x, weight))
    assert torch.equal(outs[0], torch.bmm(x, w)) and not torch.equal(outs[0], outs[1])


def test_a_buffer_keeps_its_part_when_a_lost_report_is_made_again(cache):
    """What Dynamo knows about inputs is not in the graph that is copied for it."""
    model = nn.Module()
    model.register_buffer("w", torch.randn(2, 64, 64).bfloat16())
    rows = []
    for _ in range(2):
        torch.compiler.reset()
        backend = Backend(parse_options({"strict": True}), fragment=True)
        with torch.no_grad():
            torch.compile(lambda x: torch.bmm(x, model.w), backend=backend)(tokens_of())
        rows.append(backend.report.rows())
        for path in (cache / "fos_compile" / "reports").glob("*.json"):
            path.unlink()
    assert hits() == 1 and rows[0] == rows[1] and len(backend.report.quantized) == 1


def test_a_kernel_that_appears_changes_the_key(monkeypatch):
    gm = torch.fx.symbolic_trace(MLP())
    keys = set()
    for status in (Status("no compiler"), Status("switched off")):
        monkeypatch.setattr(build, "library", lambda status=status: status)
        keys.add(GraphPasses(BackendConfig(), gm, [tokens_of()]).uuid)
    assert len(keys) == 2
