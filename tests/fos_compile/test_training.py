"""``train_step``: dice, schedules, errors, and what a training loop does around it."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import pytest
import torch
from models import MLP, bf16, tokens_of
from torch import Tensor, nn

import fos_compile
from fos_compile.kernels.errors import InvalidArgument
from fos_compile.training import NothingQuantized, TrainStep

EAGER: dict[str, Any] = {"compiler": "eager", "strict": True}


def forward_backward(model: nn.Module, x: Tensor) -> Tensor:
    loss = model(x).float().square().mean()
    loss.backward()
    return loss.detach()


def with_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model(x).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def step_of(function: Any = forward_backward, **options: Any) -> Any:
    return fos_compile.train_step(**{**EAGER, **options})(function)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(model: nn.Module, step: Any) -> Tensor:
    model.zero_grad()
    step(model, tokens_of())
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_every_step_rolls_fresh_dice_that_follow_manual_seed():
    model, step = bf16(MLP()), step_of()
    torch.manual_seed(3)
    first = [gradient(model, step) for _ in range(3)]
    assert len({tuple(g.tolist()) for g in first}) == 3
    torch.manual_seed(3)
    assert all(torch.equal(gradient(model, step), g) for g in first)
    torch.manual_seed(4)
    assert not torch.equal(gradient(model, step), first[0])


def test_dice_stay_unbiased_about_the_nearest_gradient():
    """The mean over steps approaches one value: rolling again is not another function."""
    model, step = bf16(MLP()), step_of()
    draws = torch.stack([gradient(model, step).double() for _ in range(16)])
    plain = gradient(model, step_of(recipe="bf16")).double()
    one = (draws[0] - plain).norm()
    mean = (draws.mean(0) - plain).norm()
    assert mean < one


def test_nearest_rounding_draws_nothing():
    model, step = bf16(MLP()), step_of(recipe="inference")
    before = torch.get_rng_state()
    assert torch.equal(gradient(model, step), gradient(model, step))
    assert torch.equal(torch.get_rng_state(), before)


def run(steps: int, *, stop: int | None = None, **options: Any) -> tuple[Tensor, Any]:
    """Weights after ``steps``; with ``stop`` through saved and restored state halfway."""
    torch.compiler.reset()
    torch.manual_seed(11)
    model = bf16(MLP())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    step = step_of(**options)
    for index in range(steps):
        if index == stop:
            saved = step.state_dict()
            torch.rand(100)
            step = step_of(**options)
            step.load_state_dict(saved)
        optimizer.zero_grad()
        step(model, tokens_of())
        optimizer.step()
    return weights(model), step


def test_resumed_run_takes_the_same_trajectory():
    options = {"high_precision_steps": (1, 1), "total_steps": 5}
    straight, _ = run(5, **options)
    resumed, step = run(5, stop=2, **options)
    assert torch.equal(straight, resumed)
    assert step.steps == 5


RNG = torch.Generator().manual_seed(5).get_state()
SAVED = {"steps": 7, "rng_cpu": RNG, "rng_cuda": []}


@pytest.mark.parametrize(
    "state, named",
    [
        ({"steps": 3}, "rng_cpu"),
        (None, "state must be a dict"),
        ({**SAVED, "steps": "x"}, r"state\['steps'\] must be a number of steps, got 'x'"),
        ({**SAVED, "steps": -1}, "steps"),
        ({**SAVED, "rng_cpu": None}, r"state\['rng_cpu'\].*got NoneType"),
        ({**SAVED, "rng_cpu": RNG[:10]}, "rng_cpu"),
        ({**SAVED, "rng_cpu": RNG.to("meta")}, "rng_cpu"),
        ({**SAVED, "rng_cuda": None}, "rng_cuda"),
    ],
    ids=str,
)
def test_load_state_dict_refuses_other_states_and_changes_nothing(state, named):
    step = step_of()
    before = torch.get_rng_state()
    with pytest.raises(InvalidArgument, match=named):
        step.load_state_dict(state)
    assert step.steps == 0 and torch.equal(torch.get_rng_state(), before)


def test_load_state_dict_takes_a_state_that_a_map_location_cast():
    step = step_of()
    step.load_state_dict({**SAVED, "rng_cpu": RNG.int()})
    assert step.steps == 7 and torch.equal(torch.get_rng_state(), RNG)


def test_training_with_an_optimizer_in_the_step_learns():
    model = bf16(MLP())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = step_of(with_optimizer)
    losses = [step(model, optimizer, tokens_of()).item() for _ in range(8)]
    assert losses[-1] < losses[0]
    assert {s.role for s in step.report.quantized} == {"fprop", "dgrad", "wgrad"}


def test_high_precision_steps_take_turns_without_recompiling():
    model = bf16(MLP())
    step = step_of(recipe="nvfp4", high_precision_steps=(1, 2), total_steps=6)
    reference = step_of(recipe="bf16")
    plain = gradient(model, reference)
    torch.manual_seed(1)
    is_plain = [torch.equal(gradient(model, step), plain) for _ in range(6)]
    assert is_plain == [True, False, False, False, True, True]
    quantized, high = step._quantized.backend.reports, step._plain.backend.reports
    assert [r.recipe for r in quantized if r.sites] == ["nvfp4"]
    assert [r.recipe for r in high if r.sites] == ["bf16"]
    assert step.report.recipe == "nvfp4" and len(step.report.quantized) == 5


def test_a_schedule_may_be_all_high_precision():
    step = step_of(high_precision_steps=(1, 1), total_steps=2)
    model = bf16(MLP())
    for _ in range(2):
        gradient(model, step)
    with pytest.raises(RuntimeError, match="call the step first"):
        _ = step.report


@pytest.mark.parametrize(
    "options, message",
    [
        ({"high_precision_steps": (1, 1)}, "total_steps must be given"),
        ({"high_precision_steps": (3, 3), "total_steps": 5}, "at most total_steps=5"),
        ({"high_precision_steps": (-1, 1), "total_steps": 5}, "two step counts"),
        ({"high_precision_steps": (1,), "total_steps": 5}, "two step counts"),
        ({"high_precision_steps": 5, "total_steps": 10}, "two step counts.*got 5"),
        ({"high_precision_steps": "ab", "total_steps": 10}, "two step counts.*got 'ab'"),
        ({"high_precision_steps": (0.1, 0.2), "total_steps": 10}, "two step counts"),
        ({"high_precision_steps": (1, 1), "total_steps": "10"}, "total_steps.*got '10'"),
        ({"total_steps": -3}, "total_steps must be a number of steps, got -3"),
        ({"skip": "lm_head"}, "skip must be a list of module-path globs, got 'lm_head'"),
        ({"skip": None}, "skip must be a list.*got None"),
        ({"fn": "training"}, r"fn must be a function, got 'training'; .*train_step\(recipe="),
        ({"recipe": "fp3"}, "inference, training, nvfp4"),
        ({"reciep": "training"}, "min_weight_dim"),
    ],
)
def test_bad_arguments_are_refused_when_decorating(options, message):
    with pytest.raises(InvalidArgument, match=message):
        fos_compile.train_step(**options)


def test_environment_names_the_default_recipe(monkeypatch):
    monkeypatch.setenv("FOS_RECIPE", "nvfp4")
    assert [step_of(**named)._quantized.recipe.name for named in ({}, {"recipe": "bf16"})] == [
        "nvfp4",
        "bf16",
    ]
    monkeypatch.delenv("FOS_RECIPE")
    assert step_of()._quantized.recipe.name == "training"


@pytest.mark.parametrize("skip", [["down"], (glob for glob in ["down"])], ids=["list", "iterator"])
def test_skip_leaves_modules_alone(skip):
    step = step_of(skip=skip)
    gradient(bf16(MLP()), step)
    assert {s.path for s in step.report.quantized} == {"up"}
    assert {s.reason_code for s in step.report.rejected} == {"skip"}


def test_nothing_quantized_says_why():
    step = step_of(skip=["*"])
    with pytest.raises(
        NothingQuantized, match=r"forward_backward.*5x module matches skip pattern '\*'"
    ):
        gradient(bf16(MLP()), step)


def in_a_loop(model: nn.Module, x: Tensor) -> None:
    for part in x.chunk(2):
        model(part).float().square().mean().backward()


def in_a_try(model: nn.Module, x: Tensor) -> None:
    try:
        model(x).float().square().mean().backward()
    finally:
        model.zero_grad()


@pytest.mark.parametrize("function", [in_a_loop, in_a_try, lambda model, x: x.sum()])
def test_nothing_captured_says_what_torch_compile_skips(function):
    """torch.nn's own frames are skipped too, so that nothing of a Sequential is captured there."""
    step = step_of(function, recipe="nvfp4")
    with pytest.raises(
        NothingQuantized, match=r"recipe 'nvfp4'.*captured none.*loop or a try.*function of its own"
    ):
        step(nn.Sequential(bf16(MLP()).up), tokens_of())


def test_bf16_is_a_baseline_and_no_error():
    model, step = bf16(MLP()), step_of(recipe="bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error", fos_compile.FosCompileWarning)
        got = gradient(model, step)
    assert torch.equal(got, gradient(model, step)) and not step.report.quantized
    assert step.report.recipe == "bf16"


def test_report_before_the_first_step_is_an_error():
    with pytest.raises(RuntimeError, match="call the step first"):
        _ = step_of().report


def test_decorates_with_and_without_arguments():
    bare = fos_compile.train_step(forward_backward)
    assert isinstance(bare, TrainStep) and bare.__name__ == "forward_backward"
    called = fos_compile.train_step()(forward_backward)
    assert isinstance(called, TrainStep) and called.__wrapped__ is forward_backward


class Trainer:
    def __init__(self) -> None:
        self.model = bf16(MLP())
        self.calls = 0

    @fos_compile.train_step(**EAGER, high_precision_steps=(1, 0), total_steps=3)
    def step(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.calls += 1
        loss = self.model(x).float().square().mean() * scale
        loss.backward()
        return loss.detach()


def test_decorates_a_method():
    trainer = Trainer()
    loss = trainer.step(tokens_of(), scale=2.0)
    assert loss.item() > 0 and trainer.calls == 1
    assert trainer.model.up.weight.grad is not None
    trainer.step(tokens_of())
    assert len(trainer.step.report.quantized) == 5 and trainer.step.steps == 2


def test_instances_count_their_own_steps_and_share_what_is_compiled():
    first, second = Trainer(), Trainer()
    for trainer in (first, second, first):
        trainer.step(tokens_of())
    graphs = len(Trainer.step._quantized.backend.reports)
    assert (first.step.steps, second.step.steps, Trainer.step.steps) == (2, 1, 0)
    second.step(tokens_of())
    assert len(Trainer.step._quantized.backend.reports) == graphs
    second.step.load_state_dict(first.step.state_dict() | {"steps": 9})
    assert (first.step.steps, second.step.steps) == (2, 9)
    bound = first.step
    del first, trainer
    assert bound(tokens_of()).item() > 0, "a bound step keeps its instance"


def test_counting_keeps_no_instance_alive():
    trainer, before = Trainer(), len(Trainer.step._of_instances)
    trainer.step.steps = 1
    gone = weakref.ref(trainer)
    assert len(Trainer.step._of_instances) == before + 1
    del trainer
    assert gone() is None and len(Trainer.step._of_instances) == before


def test_an_instance_that_cannot_be_referred_to_weakly_is_refused():
    class Slotted:
        __slots__ = ("model",)
        step = step_of()

    with pytest.raises(InvalidArgument, match="got Slotted; add '__weakref__'"):
        _ = Slotted().step


def test_two_micro_batches_before_the_optimizer():
    """Both halves are quantized: the gradient is that of two steps with the same dice."""
    model = bf16(MLP())
    halves = tokens_of().chunk(2)

    def accumulate(model: nn.Module, halves: tuple[Tensor, Tensor]) -> None:
        for half in halves:
            forward_backward(model, half)

    def gradients(step: Any, *batches: Any) -> Tensor:
        torch.manual_seed(3)
        model.zero_grad()
        for batch in batches:
            step(model, batch)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    got = gradients(step_of(accumulate), halves)
    assert torch.equal(got, gradients(step_of(), *halves))
    assert not torch.equal(got, gradients(step_of(recipe="bf16"), *halves))


@pytest.mark.parametrize("kind", ["AdamW", "SGD with a tensor"])
def test_a_changing_learning_rate_does_not_recompile_every_step(kind):
    """A float is symbolic from its second value on; SGD's is a constant of torch's own graph."""
    model = bf16(MLP())
    if kind == "AdamW":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda index: 1 / (index + 1))
    step = step_of(with_optimizer)
    counts, moved = [], []
    for _ in range(6):
        before = weights(model)
        step(model, optimizer, tokens_of())
        schedule.step()
        counts.append(len(step._quantized.backend.reports))
        moved.append(not torch.equal(before, weights(model)))
    assert counts[-1] == counts[1] and all(moved), counts
    assert len(step.report.quantized) == 5
