"""Whether CuTe kernels can run, with the reason why not, and what they are compiled for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fos_compile.kernels import amax, target
from fos_compile.kernels.op import no_kernel

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """A machine with one H100, as far as torch can tell."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.delenv(target.SWITCH, raising=False)
    monkeypatch.setattr(target, "_installed", lambda module: True)
    target.reset()
    yield
    target.reset()


def test_a_hopper_can():
    assert target.status(CUDA)
    assert target.status(torch.device("cuda"))


def test_other_devices_cannot():
    assert target.status(torch.device("cpu")).reason == ("CuTe kernels need a CUDA device, got cpu")


def test_without_a_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver" in target.status(CUDA).reason


def test_a_rocm_build_is_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CUDA build" in target.status(CUDA).reason


@pytest.mark.parametrize(
    "module,package", [("cutlass", "nvidia-cutlass-dsl"), ("tvm_ffi", "apache-tvm-ffi")]
)
def test_a_missing_library_is_named(monkeypatch, module, package):
    monkeypatch.setattr(target, "_installed", lambda name: name != module)
    assert target.status(CUDA).reason == f"{package} is not installed"


def test_a_library_that_may_not_be_imported_is_missing(monkeypatch):
    monkeypatch.undo()
    assert not target._installed("no_such_library")
    monkeypatch.setitem(sys.modules, "cutlass", None)
    assert not target._installed("cutlass")


def test_older_devices_cannot(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert target.status(CUDA).reason == "CuTe kernels need compute capability 8.0, got 7.5"


@pytest.mark.parametrize("switch", ["0", "off"])
def test_switched_off(monkeypatch, switch):
    monkeypatch.setenv(target.SWITCH, switch)
    assert target.status(CUDA).reason == f"CuTe kernels switched off by FOS_CUTE_KERNELS={switch}"
    assert "FOS_CUTE_KERNELS" in no_kernel("amax", CUDA).reason


def test_an_operator_without_a_kernel_says_so():
    assert no_kernel("amax", CUDA).reason == (
        "amax: no device kernel for cuda; the decomposition serves"
    )
    assert not amax.supports(torch.empty(4, 4, device="meta"))


@pytest.mark.parametrize(
    "capability,arch",
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((10, 3), "sm_103a"),
        ((12, 0), "sm_120a"),
    ],
)
def test_arch(monkeypatch, capability, arch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    assert target.arch(CUDA) == arch == target.arch(torch.device("cuda"))


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("FOS_CACHE_DIR", str(tmp_path))
    assert target.cache_dir("cute") == tmp_path / "fos_compile" / "cute"
    monkeypatch.delenv("FOS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert target.cache_dir("cpu") == tmp_path / "xdg" / "fos_compile" / "cpu"


def test_asking_imports_neither_library():
    program = """
import sys, torch
from fos_compile.kernels import QUANTIZE, target

torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
torch.cuda.get_device_capability = lambda index: (9, 0)
device = torch.device("cuda", 0)
target.status(device)
assert not [m for m in sys.modules if m.startswith("fos_compile.kernels.cute")]
x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
QUANTIZE.supports(x, torch.empty((), device="meta"))
from fos_compile.kernels.cute import launch
assert launch.TABLES
assert "cutlass" not in sys.modules and "tvm_ffi" not in sys.modules
"""
    environment = {k: v for k, v in os.environ.items() if k != target.SWITCH}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
