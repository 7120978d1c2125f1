"""Autotuning with a fake timer: the fastest is kept, found again, and never trusted blindly."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fos_compile.kernels.cute import cache, matmul_tiles, matmul_tuning
from fos_compile.kernels.cute.matmul_tuning import Problem, lookup, tune

DEVICE = "a GPU, 10.0, 180 GiB, CUDA 13000"
PROBLEM = Problem(
    m=512, n=768, k=1024, format="nvfp4", dtype=torch.bfloat16, arch="sm_100a", num_sms=148
)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FOS_CACHE_DIR", str(tmp_path))
    lookup.cache_clear()
    yield
    lookup.cache_clear()


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(matmul_tuning, "device_name", lambda device: DEVICE)


def chosen():
    return matmul_tiles.choose(
        512, 768, 1024, format="nvfp4", dtype=torch.bfloat16, arch="sm_100a", num_sms=148
    )


def preferring(wanted):
    return lambda choice: 1e-6 if choice == wanted else 2e-6


def third():
    return PROBLEM.best(3)[2]


def path():
    return matmul_tuning._path(matmul_tuning._identity(PROBLEM, DEVICE))


def test_the_fastest_is_kept_and_chosen(on_a_gpu):
    model = chosen()
    won = tune(PROBLEM, preferring(third()), device=DEVICE)
    assert won.choice == third() != model
    assert won.seconds == 1e-6 and len(won.timed) == matmul_tuning.NEAR
    assert won.timed[0][0] == model
    lookup.cache_clear()  # as another process
    assert chosen() == third()


def test_only_candidates_are_timed():
    asked = []
    tune(PROBLEM, lambda choice: asked.append(choice) or 1e-6, device=DEVICE, count=4)
    assert asked == list(PROBLEM.best(4))


def test_without_tuning_the_model_decides(on_a_gpu, tmp_path):
    assert chosen() == PROBLEM.best(1)[0]
    assert not list(tmp_path.rglob("matmul-*")), "choosing must not write"


@pytest.mark.parametrize("other", ["", "another GPU", DEVICE.replace("13000", "13010")])
def test_a_winner_is_of_one_device(other):
    tune(PROBLEM, preferring(third()), device=DEVICE)
    assert lookup(PROBLEM, DEVICE) == third()
    assert lookup(PROBLEM, other) is None


def test_a_winner_is_of_one_version_of_the_code(monkeypatch):
    tune(PROBLEM, preferring(third()), device=DEVICE)
    lookup.cache_clear()
    monkeypatch.setattr(cache, "environment", lambda: "other sources")
    assert lookup(PROBLEM, DEVICE) is None


@pytest.mark.parametrize("damage", [b"", b"nonsense", "cut", "flipped"])
def test_a_broken_entry_is_none(damage):
    tune(PROBLEM, preferring(third()), device=DEVICE)
    whole = path().read_bytes()
    broken = {"cut": whole[:-1], "flipped": whole[:-1] + bytes([whole[-1] ^ 1])}
    path().write_bytes(broken.get(damage, damage))
    assert lookup(PROBLEM, DEVICE) is None
    tune(PROBLEM, preferring(third()), device=DEVICE)
    assert lookup(PROBLEM, DEVICE) == third()


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"{}",
        b"\xff",
        b'{"tile": 5}',
        json.dumps({"tile": [128, 96], "cluster": [1, 1], "swap": False, "split": 1}).encode(),
        json.dumps({"tile": [128, 64], "cluster": [1, 1], "swap": False, "split": 3}).encode(),
    ],
)
def test_a_whole_entry_of_something_else_is_none(content):
    identity = matmul_tuning._identity(PROBLEM, DEVICE)
    cache.write_entry(path(), identity, content)
    assert lookup(PROBLEM, DEVICE) is None


def test_choices_that_fail_are_passed_over():
    slow, raises, nan, negative = PROBLEM.best(4)

    def timer(choice):
        if choice == raises:
            raise RuntimeError("no such tile here")
        return {nan: math.nan, negative: -1.0}.get(choice, 5.0)

    won = tune(PROBLEM, timer, device=DEVICE, count=4)
    assert won.choice == slow
    assert [isinstance(each, str) for _, each in won.timed] == [False, True, True, True]


def test_nothing_works():
    def timer(choice):
        raise RuntimeError("the driver is gone")

    with pytest.raises(RuntimeError, match="the driver is gone"):
        tune(PROBLEM, timer, device=DEVICE)
    assert lookup(PROBLEM, DEVICE) is None


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FOS_CACHE_DIR", str(tmp_path / "file"))
    assert tune(PROBLEM, preferring(third()), device=DEVICE).choice == third()
    assert lookup(PROBLEM, DEVICE) is None


def test_the_name_of_a_gpu(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "NVIDIA B200", 10, 0, 180 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    matmul_tuning._device_name.cache_clear()
    assert matmul_tuning.device_name(torch.device("cuda", 7)).startswith("NVIDIA B200, 10.0, 180")
    matmul_tuning._device_name.cache_clear()


def test_a_cpu_has_no_name():
    assert matmul_tuning.device_name(torch.device("cpu")) == ""
