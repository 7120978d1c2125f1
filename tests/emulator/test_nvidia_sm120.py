"""Rung 8's authority: NVIDIA's own sm_120 GEMMs, which are examples in NVIDIA/cutlass only.

The environment variable CUTLASS_REPOSITORY names a checkout; without it nothing runs here, and
results/nvidia_sm120.md says what did. CI has a kernel of ours instead: test_block_scaled_sm120.py.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")

from tests.emulator import operators
from tests.emulator.emulate import emulate
from tests.emulator.host import load
from tests.emulator.machine.engine import MODES
from tests.emulator.machine.program import Settings

_EXAMPLES = "examples/python/CuTeDSL/cute/blackwell_geforce/kernel/blockscaled_gemm"
_REPOSITORY = os.environ.get("CUTLASS_REPOSITORY", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(_REPOSITORY, _EXAMPLES).is_dir() or not _REPOSITORY,
        reason="CUTLASS_REPOSITORY names no checkout of NVIDIA/cutlass",
    ),
]


@functools.cache
def host(schedule, clusters=2):
    import cutlass
    from cutlass import cute
    from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

    sys.path.insert(0, str(Path(_REPOSITORY, _EXAMPLES)))  # they import each other from there
    module = importlib.import_module(f"dense_blockscaled_gemm_persistent_{schedule}")
    kernel = module.Sm120BlockScaledGemmKernel(
        cutlass.Float32, operators.BLOCK, (128, 128, 128), (128, 128)
    )

    def matrix(dtype, divisibility):
        shape = (cute.sym_int32(), cute.sym_int32(divisibility=divisibility), cute.sym_int32())
        return make_fake_compact_tensor(dtype, shape, stride_order=(1, 0, 2), assumed_align=16)

    def scales():
        return make_fake_tensor(cutlass.Float8E4M3FN, (cute.sym_int32(),), (1,), assumed_align=16)

    a, b = (matrix(cutlass.Float4E2M1FN, 32) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        compiled = cute.compile(
            kernel, a, b, scales(), scales(), matrix(cutlass.BFloat16, 8), clusters,
            make_fake_stream(),
            options=f"--gpu-arch sm_120a --keep-ptx --generate-line-info --dump-dir {folder}",
        )  # fmt: skip
    return load(compiled)


@pytest.mark.parametrize("scheduling", ["round_robin", "random"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "sizes", [(128, 128, 64), (200, 136, 288), (128, 128, 1312), (136, 72, 320, 3)], ids=str
)
@pytest.mark.parametrize("schedule", ["cooperative", "pingpong"])
def test_nvidia_sm120(schedule, sizes, mode, scheduling):
    case = operators.problem(*sizes)
    m, n, _, batch = case.sizes
    out = torch.empty(batch, m, n, dtype=torch.bfloat16)
    a, b, c = (tensor.permute(1, 2, 0) for tensor in (case.a, case.b, out))
    emulate(
        host(schedule), a, b, case.sfa.view(-1), case.sfb.view(-1), c,
        outputs=[out], settings=Settings(mode=mode, schedule=scheduling, seed=1),
    )  # fmt: skip
    assert case.errors(out).max().item() <= 1
