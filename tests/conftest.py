"""Set-up shared by every test.

Helper modules (`numerics`, `graphs`, ...) live in tests/support, which is on `sys.path`; tests/
itself is not, because tests/fos_compile and tests/kernels would then be found as namespace
packages ahead of the installed ones.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch

from fos_compile.kernels.cpu import build
from fos_compile.kernels.op import Status

# `tests.emulator` is a package of its own; its parent stays off sys.path (above).
if "__path__" not in vars(sys.modules.setdefault("tests", types.ModuleType("tests"))):
    sys.modules["tests"].__path__ = [str(Path(__file__).parent)]

# Read at Inductor's first import; one compile worker a test process is enough on two cores, and
# a pool that outlives the test would distort the next one's timing.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """Start every test from the same generator state and an empty Dynamo cache."""
    torch.manual_seed(0)
    torch.compiler.reset()


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decompositions serve, as on a device without a kernel."""
    monkeypatch.setattr(build, "library", lambda: Status("off for this test"))
