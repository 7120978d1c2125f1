"""A compiled training step on a GPU, kernels and all; a CPU, which has the bits, is the judge.

The sum over k has no prescribed order, so outputs are compared within what that changes; behind a
first layer it also changes what a quantizer is given.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fos_compile.backend import Backend
from fos_compile.config import parse_options
from fos_compile.kernels import target
from fos_compile.passes import lower

CUDA = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(
    not target.status(CUDA), reason=f"needs a GPU: {target.status(CUDA)}"
)


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(256, 320), nn.SiLU(), nn.Linear(320, 128)).bfloat16()


def step(module, x, recipe, repeats=1, **options):
    """Output and gradients of the last of some equal steps, and the report."""
    torch.compiler.reset()
    backend = Backend(parse_options({"strict": True, "recipe": recipe, **options}))
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for _ in range(repeats):
        torch.manual_seed(5)
        module.zero_grad(set_to_none=True)
        out = compiled(x)
        out.backward(torch.ones_like(out) / 8)
    return [out.detach(), *(p.grad for p in module.parameters())], backend.report


def distance(a, b):
    """Relative, of two tensors."""
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm())


@needs_gpu
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_step_of_nearest_rounding(monkeypatch, mode):
    """The recipe with every rounding to nearest: forward and backward within 2% of the CPU's."""
    split = []
    unpack = lower._unpack
    monkeypatch.setattr(lower, "_unpack", lambda *given: split.append(given) or unpack(*given))
    x = torch.randn(192, 256).bfloat16()
    want, _ = step(model(), x, "inference")
    options = {} if mode is None else {"mode": mode, "repeats": 3}
    got, report = step(model().to(CUDA), x.to(CUDA), "inference", **options)
    assert len(report.quantized) == 2
    before_blackwell = torch.cuda.get_device_capability(CUDA) < (10, 0)
    assert bool(split) is before_blackwell
    # A sum in another order turns roundings to bf16, and those few roundings to FP4: 4 bits are off
    # by 10 to 20%.
    assert all(distance(a, b) < 0.02 for a, b in zip(got, want, strict=True))


@needs_gpu
def test_a_training_step():
    """Stochastic rounding has other dice in a process that draws another seed: nearer to bf16 than
    noise, and nearer to the CPU's step than 4 bits are to bf16."""
    x = torch.randn(256, 256).bfloat16()
    plain, _ = step(model(), x, "bf16")
    want, _ = step(model(), x, "training")
    got, report = step(model().to(CUDA), x.to(CUDA), "training")
    assert len(report.quantized) == 5
    for a, b, exact in zip(got, want, plain, strict=True):
        noise = distance(b, exact)
        assert 0.5 * noise <= distance(a, exact) <= 2 * noise + 0.01
