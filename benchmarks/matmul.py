"""Every way to multiply in FP4, side by side: `python -m fos_compile bench matmul` as a script.

Without --md and --csv it writes benchmarks/results/matmul.{md,csv}.
"""

from __future__ import annotations

import sys

import harness
from fos_compile.cli import app


def arguments(given: list[str]) -> list[str]:
    """Those of the command, with places for results where none are given."""
    words = {each.split("=")[0] for each in given}
    for option in ("md", "csv"):
        if f"--{option}" not in words:
            given = [*given, f"--{option}", str(harness.RESULTS / f"matmul.{option}")]
    return ["bench", "matmul", *given]


if __name__ == "__main__":
    app(arguments(sys.argv[1:]))
