"""The command line: it works from anywhere, and says what is wrong without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from fos_compile.cli import app

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands change sys.path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("FOS_RECIPE", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})


@pytest.mark.parametrize("safe", ["1", ""], ids=["safe path", "current folder first"])
def test_explain_in_the_checkout(safe):
    """Its folder kernels/ must not be what transformers finds under that name."""
    done = subprocess.run(
        [sys.executable, "-m", "fos_compile", "explain", "--recipe", "inference"],
        cwd=ROOT,
        env=os.environ | {"PYTHONSAFEPATH": safe},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "model.layers.0.mlp.down_proj" in done.stdout and "lm_head" in done.stdout


def test_explain_finds_a_module_in_the_current_folder(tmp_path, monkeypatch):
    source = "import torch\ndef build():\n    return torch.nn.ReLU(), (torch.ones(2),)\n"
    (tmp_path / "fos_cli_example.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    result = run("explain", "fos_cli_example:build")
    assert result.exit_code == 0 and "0 of 0 matmuls" in result.output


def test_the_checkout_itself_is_never_searched(monkeypatch):
    monkeypatch.chdir(ROOT)
    sys.path[:] = ["", str(ROOT), *sys.path]
    result = run("explain", "no_such_module:build")
    assert "No module named" in result.output
    assert ROOT not in [Path(entry).resolve() for entry in sys.path]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["explain", "no_colon"], "TARGET must be MODULE:FUNCTION, got 'no_colon'"),
        (["explain", ":foo"], "TARGET must be MODULE:FUNCTION, got ':foo'"),
        (["explain", "os:"], "TARGET must be MODULE:FUNCTION, got 'os:'"),
        (["explain", "os:sep"], "TARGET must name a function, got 'os:sep', of type str"),
        (["explain", "os:no"], "TARGET must name a function, got 'os:no'"),
        (["explain", "os:getcwd"], "'os:getcwd' must return (model, inputs)"),
        (["explain", "--recipe", "bogus"], "one of inference, training, nvfp4"),
        (["demo", "--device", "foo"], "--device must be one of cpu"),
        (["demo", "--device", "meta"], "--device must be one of cpu"),
        (["demo", "--device", "mps"], "--device must be one of cpu"),
        (["demo", "--device", "cuda:99"], "--device must be one of cpu"),
        (["demo", "--out", __file__], "--out must be a folder"),
    ],
    ids=" ".join,
)
def test_bad_arguments_name_the_valid_ones(arguments, message):
    result = run(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert message in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU machine the device is valid")
def test_a_device_that_is_not_there_is_refused():
    assert "got 'cuda'" in run("demo", "--device", "cuda").output


def test_a_bad_environment_is_named(monkeypatch):
    monkeypatch.setenv("FOS_RECIPE", "bogus")
    result = run("explain")
    assert result.exit_code == 2 and "FOS_RECIPE must be one of inference" in result.output
