"""``train_step`` and Dynamo's limit of compilations: what it must not stop and must not hide."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import MLP, bf16, tokens_of
from torch import Tensor, nn

import fos_compile
from fos_compile.passes.errors import FosCompileWarning
from fos_compile.training import TooManyVariants


def forward_backward(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(x).float().square().mean()
    loss.backward()
    return loss.detach()


def step_of(function: Any = forward_backward, **options: Any) -> Any:
    return fos_compile.train_step(compiler="eager", strict=True, **options)(function)


def test_every_step_of_a_factory_is_quantized():
    """All functions of one factory share a code object, which Dynamo compiles 8 times."""

    def make() -> tuple[nn.Module, Any]:
        model = bf16(MLP())

        def step(x: Tensor) -> None:
            model(x).float().square().mean().backward()

        return step_of(step, high_precision_steps=(1, 0), total_steps=2)

    for _ in range(9):
        step = make()
        step(tokens_of())
        step(tokens_of())
        assert len(step.report.quantized) == 5


def test_beyond_the_recompile_limit_a_step_is_refused():
    model, step = bf16(MLP()), step_of(dynamic=False)
    with pytest.raises(
        TooManyVariants, match=r"'forward_backward' must compile at most 8 times.*dynamic=None"
    ):
        for length in range(2, 12):
            step(model, tokens_of(length=length))
    assert step.steps == 8
    for length in range(2, 10):  # what has been compiled goes on
        step(model, tokens_of(length=length))
    with pytest.warns(FosCompileWarning, match="ran a part in high precision"):
        step(model, tokens_of(length=12))


def test_a_step_of_which_a_part_is_refused_is_refused():
    """The forward breaks in two, and the second half is compiled for every scale."""
    model = bf16(MLP())

    def step(x: Tensor, scale: float) -> None:
        h = model(x)
        torch._dynamo.graph_break()
        (model(h) * scale).float().square().mean().backward()

    step = step_of(step, dynamic=False)
    with pytest.raises(TooManyVariants):
        for count in range(12):
            step(tokens_of(), 1.0 + count)


def test_a_step_that_does_less_on_purpose_is_none_of_ours():
    model, optimizer_only = bf16(MLP()), []

    def step(x: Tensor) -> None:
        if not optimizer_only:
            model(x).float().square().mean().backward()

    step = step_of(step)
    step(tokens_of())
    optimizer_only.append(True)
    step(tokens_of())
    assert step.steps == 2


def test_an_optimizer_behind_a_break_is_not_quantized():
    """Arithmetic on what was a gradient before the break, with state that the graph is given."""
    model = bf16(MLP())
    state = torch.randn(64, 64).bfloat16()

    def step(x: Tensor) -> Tensor:
        model(x).float().square().mean().backward()
        gradient = model.up.weight.grad[:64, :64]
        gradient.float().norm().item()
        return state @ gradient

    step = step_of(step)
    step(tokens_of())
    assert len(step.report.quantized) == 5


def test_an_optimizer_beyond_the_recompile_limit_does_not_stop_training():
    """A scheduled float learning rate: Dynamo compiles 8 of them and runs the rest as they are."""
    torch.manual_seed(0)
    model = bf16(MLP())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def forward_backward_step(x: Tensor) -> None:
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step = step_of(forward_backward_step)
    before = [p.detach().clone() for p in model.parameters()]
    for count in range(12):
        optimizer.param_groups[0]["lr"] = 0.1 / (count + 1)
        step(tokens_of())
    assert step.steps == 12 and step._quantized.backend.quantized_runs == 12
    assert not any(map(torch.equal, before, model.parameters()))
