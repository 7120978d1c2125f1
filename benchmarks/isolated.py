"""Measurements in a process of their own, with cold caches and an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_MARK = "result: "


def measured(
    script: str, arguments: Mapping[str, Any], *, env: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run `script --worker ARGUMENTS` without any cached compilation; return what it reports.

    Raises:
        RuntimeError: the process failed; the message ends with its last words.
    """
    here = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    with tempfile.TemporaryDirectory(prefix="fos-bench-") as scratch:
        caches = {
            "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
            "TRITON_CACHE_DIR": f"{scratch}/triton",
            "PYTHONPATH": path,
        }
        done = subprocess.run(
            [sys.executable, "-W", "ignore", script, "--worker", json.dumps(dict(arguments))],
            env={**os.environ, **caches, **(env or {})},
            capture_output=True,
            text=True,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not lines:
        raise RuntimeError(f"{Path(script).name} {dict(arguments)} failed: {done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix(_MARK))


def report(result: Mapping[str, Any]) -> None:
    """Print what `measured` returns in the parent process."""
    print(_MARK + json.dumps(dict(result)), flush=True)
