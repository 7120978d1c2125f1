"""`python -m fos_compile` is the command line."""

from __future__ import annotations

import os

# Read when torch loads its OpenMP runtime. Idle threads sleep instead of spinning; on two cores
# that is worth a factor of two.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from fos_compile.cli import app

app()
