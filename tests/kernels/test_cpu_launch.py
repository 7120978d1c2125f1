"""What the launcher hands to the C++ kernel, and what memory the kernel takes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from fos_compile.kernels.cpu import build
from fos_compile.kernels.cpu.launch import cpu_unscaled
from fos_compile.kernels.errors import InvalidArgument

pytestmark = pytest.mark.skipif(not build.status(), reason=str(build.status()))


def test_a_short_buffer_never_reaches_the_kernel():
    values, scales = torch.zeros(18, 64, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(InvalidArgument, match="1024 bytes, got 8"):
        cpu_unscaled(values, scales, "nvfp4")


def test_one_long_row_takes_the_memory_of_one_row():
    """4 bytes an element of buffer, not the 128 of the 32 rows that a task may have."""
    program = """
        import resource, torch
        import fos_compile.kernels

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        x, before = torch.ones(1, 1 << 22, dtype=torch.bfloat16), peak()
        amax = torch.ops.fos.amax(x, True)
        torch.ops.fos.quantize(x, amax)
        assert peak() - before < 16 * x.numel(), (peak() - before) / x.numel()
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
