"""``doctor``: what it says is what the operators do."""

from __future__ import annotations

import io

import pytest

from fos_compile.doctor import devices, operators, print_doctor
from fos_compile.kernels import REGISTRY
from fos_compile.kernels.cpu import build


@pytest.fixture
def switched_off(monkeypatch):
    monkeypatch.setenv("FOS_CPU_KERNEL", "off")
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def test_claims_a_kernel_where_one_serves():
    rows = {row.operator: row for row in operators() if row.device == "cpu"}
    assert len(rows) == len(REGISTRY) and "fos::amax" not in rows
    for name in ("amax(rht=True)", "quantize", "quantize_pair", "dequantize", "scaled_mm"):
        row = rows[f"fos::{name}"]
        assert (row.implementation == "device kernel") is bool(build.status())
        assert row.reason == build.status().reason


def test_says_why_no_kernel_serves(switched_off):
    assert {row.reason for row in operators() if row.device == "cpu"} == {
        "cpu kernel switched off by FOS_CPU_KERNEL=off",
        "seed: drawn by torch's generator on cpu",
        "unpacked_mm: torch.mm and compiled code serve on cpu",
    }
    out = io.StringIO()
    print_doctor(out)
    assert "fos::quantize_pair" in out.getvalue()


def test_names_the_compiler_that_builds_the_kernel(monkeypatch):
    assert (build.compiler() or "no C++ compiler") in devices()["cpu"]
    monkeypatch.setenv("PATH", "")
    assert "no C++ compiler" in devices()["cpu"]
