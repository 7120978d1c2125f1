"""The loader of the published package, on a stand-in for it."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

import peer

FILES = {
    "PKG-INFO": "Metadata-Version: 2.4\nName: fouroversix\nVersion: 1.2.3\n",
    "src/fouroversix/__init__.py": "raise ImportError('needs an extension')",
    "src/fouroversix/utils.py": "ScaleRule = RoundStyle = str.upper",
    "src/fouroversix/quantize/__init__.py": "",
    "src/fouroversix/quantize/utils.py": "def get_rht_matrix(*, device): return 'H'",
    "src/fouroversix/kernels/__init__.py": "",
    "src/fouroversix/kernels/triton/__init__.py": "",
    "src/fouroversix/kernels/triton/ops.py": (
        "from fouroversix.utils import ScaleRule\n"
        "def quantize_to_fp4(*args, **options): return args, options, None"
    ),
}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """An unpacked source distribution, and a clean slate before and after."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def test_loads_below_the_package(path):
    assert peer.load(path).version == "1.2.3"


def test_loads_from_the_source_folder(path):
    assert peer.load(path / "src").version == "unknown"


def test_options_have_the_published_names(path):
    x = torch.ones(16, 16)
    (got, amax, had), options, _ = peer.load(path).call(
        x, None, scale_rule="mae", rounding="stochastic", block="2d", rht=True, transpose=True
    )
    assert got is x and amax is None and had == "H"
    assert options == {
        "scale_rule": "MAE",
        "round_style": "STOCHASTIC",
        "block_scale_2d": True,
        "transpose": True,
    }


def test_a_pair_is_two_calls(path):
    x = torch.ones(16, 16)
    row_args, row, _, col_args, col, _ = peer.load(path).pair(
        x, x.amax(), rounding_col="stochastic", rht_col=True, block="1d"
    )
    assert (row["transpose"], col["transpose"]) == (False, True)
    assert (row["round_style"], col["round_style"]) == ("NEAREST", "STOCHASTIC")
    assert (row_args[2], col_args[2]) == (None, "H")


def test_refuses_a_folder_without_it(tmp_path):
    with pytest.raises(peer.PeerError, match="unpack the sdist"):
        peer.load(tmp_path)


def test_refuses_without_triton(path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(peer.PeerError, match="triton"):
        peer.load(path)


def test_refuses_two_copies(path, tmp_path_factory):
    peer.load(path)
    other = tmp_path_factory.mktemp("other") / "fouroversix" / "kernels" / "triton"
    other.mkdir(parents=True)
    (other / "ops.py").touch()
    with pytest.raises(peer.PeerError, match="already imported"):
        peer.load(other.parents[2])


@pytest.mark.parametrize("major, expected", [(9, "software"), (10, "Blackwell")])
def test_says_which_branch_runs(monkeypatch, major, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert expected in peer.how(torch.device("cuda"))


def test_difference_is_a_share_of_bytes():
    ours = torch.arange(8, dtype=torch.uint8)
    theirs = ours.clone()
    theirs[3] = 9
    assert peer.difference(ours, theirs.view(torch.float8_e4m3fn)) == 1 / 8
    with pytest.raises(AssertionError):
        peer.difference(ours, theirs[1:])


def test_the_metadata_may_be_missing(tmp_path):
    assert peer.version(tmp_path) == "unknown"
