"""Building and loading the C++ kernel: whatever the cache holds, it is built again or given up."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fos_compile
from fos_compile.kernels import AMAX, QUANTIZE
from fos_compile.kernels.cpu import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A cache folder with a kernel in it."""
    root = tmp_path_factory.mktemp("good")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOS_CACHE_DIR", str(root))
        patch.delenv("FOS_CPU_KERNEL", raising=False)
        build.library.cache_clear()
        assert build.status()
    build.library.cache_clear()
    return root


@pytest.fixture
def cached(good, tmp_path, monkeypatch) -> Path:
    """The kernel in a cache of this test's own, not loaded yet."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("FOS_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FOS_CPU_KERNEL", raising=False)
    build.library.cache_clear()
    yield next(tmp_path.rglob("*.so"))
    build.library.cache_clear()


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def _replace_by_another_library(path: Path) -> None:
    source = path.with_suffix(".cpp")
    source.write_text('extern "C" int nothing() { return 1; }')
    subprocess.run([build.compiler(), "-shared", "-fPIC", "-o", str(path), str(source)], check=True)


BREAKS = {
    "truncated": _truncate,
    "empty": lambda path: path.write_bytes(b""),
    "another library": _replace_by_another_library,
    "no digest": lambda path: path.with_suffix(".sha256").unlink(),
    "another digest": lambda path: path.with_suffix(".sha256").write_text("0" * 64),
}


def test_a_good_file_is_not_built_again(cached, monkeypatch):
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert build.status()


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_file_is_built_again_at_once(how, cached):
    whole = cached.read_bytes()
    BREAKS[how](cached)
    assert build.status() and cached.read_bytes() == whole
    assert {path.suffix for path in cached.parent.iterdir()} <= {".so", ".sha256", ".cpp"}


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _digest_of_another_library(path: Path) -> None:
    _replace_by_another_library(path)
    path.with_suffix(".sha256").write_text(build._digest(path))


def _never_builds(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(build, "_build", lambda *_: "no space")


@pytest.mark.parametrize(
    "how, patch",
    [
        (_directory, lambda _: None),
        (_truncate, _never_builds),
        (_digest_of_another_library, _never_builds),
        (lambda _: None, lambda p: p.setattr(build, "_key", lambda _: 1 / 0)),
        (lambda _: None, lambda p: p.setenv("FOS_CACHE_DIR", "/dev/null")),
        (lambda _: None, lambda p: p.setattr(Path, "read_bytes", _denied)),
    ],
    ids=["directory", "truncated", "no symbols", "no key", "no folder", "unreadable"],
)
def test_without_a_way_out_there_is_a_reason_and_the_reference(how, patch, cached, monkeypatch):
    x = torch.randn(5, 70)
    want = QUANTIZE.reference(x, AMAX.reference(x))
    how(cached)
    patch(monkeypatch)
    assert not build.status() and build.status().reason
    got = fos_compile.quantize(x)
    assert torch.equal(got.values, want[0]) and torch.equal(got.scales, want[1])
    assert not list(cached.parent.glob("tmp*"))


def _denied(path: Path) -> bytes:
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize("switch", ["0", "false", "No", "OFF"])
def test_words_that_switch_the_kernel_off(switch, cached, monkeypatch):
    monkeypatch.setenv("FOS_CPU_KERNEL", switch)
    assert build.status().reason == f"cpu kernel switched off by FOS_CPU_KERNEL={switch}"


def test_the_compiler_of_the_environment_comes_first(monkeypatch):
    monkeypatch.setenv("CXX", "sh")
    assert build.compiler() == shutil.which("sh")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.compiler() != shutil.which("sh")
    monkeypatch.setenv("PATH", "")
    assert build.compiler() is None
