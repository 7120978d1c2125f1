"""References compiled once per signature: how often they compile, and that the bits stay."""

from __future__ import annotations

import pytest
import torch
from models import needs_exact_inductor
from torch._dynamo.utils import counters

from fos_compile.kernels.outlined import MAX_STATIC_SHAPES, _Compiled
from fos_compile.kernels.quantize import QUANTIZE


def matrix(rows: int) -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).bfloat16()


@needs_exact_inductor
@pytest.mark.parametrize("dynamic", [False, True])
def test_shapes_share_a_compilation_where_sizes_are_symbolic(dynamic):
    call = _Compiled(QUANTIZE, 0 if dynamic else MAX_STATIC_SHAPES)
    counts = []
    with torch.no_grad():
        for rows in (18, 18, 33, 40, 33):
            x = matrix(rows)
            before = counters["stats"]["unique_graphs"]
            got = call(x, x.abs().amax().float(), scale_rule="static_6")
            counts.append(counters["stats"]["unique_graphs"] - before)
            want = QUANTIZE.reference(x, x.abs().amax().float(), scale_rule="static_6")
            assert all(map(torch.equal, got, want)), rows
    assert counts == ([1, 0, 0, 0, 0] if dynamic else [1, 0, 1, 1, 0])


def test_the_callers_state_does_not_split_the_cache():
    """Grad mode, autocast, inference tensors, a Parameter, and the state inside compiled code."""
    call, x = _Compiled(QUANTIZE, MAX_STATIC_SHAPES), matrix(20)
    amax = x.abs().amax().float()

    def run(x: torch.Tensor) -> None:
        call(x, amax, scale_rule="static_6")

    run(x)
    before = counters["stats"]["unique_graphs"]
    run(torch.nn.Parameter(x))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run(x)
    with torch._C._AutoDispatchBelowAutograd():
        run(x)
    with torch._C._ExcludeDispatchKeyGuard(
        torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
    ):
        run(x)
    assert counters["stats"]["unique_graphs"] == before
