"""``train_step``: a decorator that compiles a training step with quantized matmuls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch

from fos_compile.backend import Backend
from fos_compile.config import BackendConfig, parse_options
from fos_compile.kernels.errors import InvalidArgument
from fos_compile.passes.recipe import Recipe
from fos_compile.passes.report import Report, merge
from fos_compile.recipes import BF16

P = ParamSpec("P")
R = TypeVar("R")


class NothingQuantized(RuntimeError):
    """A step ran, and none of its matmuls was quantized; the message says why for each."""


@overload
def train_step(fn: Callable[P, R]) -> TrainStep[P, R]: ...


@overload
def train_step(
    *,
    recipe: str | Recipe = "training",
    skip: Iterable[str] = (),
    high_precision_steps: tuple[int, int] | None = None,
    total_steps: int | None = None,
    dynamic: bool | None = None,
    **options: Any,
) -> Callable[[Callable[P, R]], TrainStep[P, R]]: ...


def train_step(
    fn: Callable[..., Any] | None = None,
    *,
    recipe: str | Recipe = "training",
    skip: Iterable[str] = (),
    high_precision_steps: tuple[int, int] | None = None,
    total_steps: int | None = None,
    dynamic: bool | None = None,
    **options: Any,
) -> Any:
    """Compile a function that does forward, loss, backward and, if it likes, the optimizer step.

    Args:
        fn: the step. Dynamo breaks the graph once at ``loss.backward()``; what stands before and
            after it is compiled.
        recipe: a recipe's name or a :class:`~fos_compile.Recipe`; ``"bf16"`` compiles without
            quantization, as a baseline.
        skip: globs of module paths to leave in high precision, besides heads and routers.
        high_precision_steps: ``(first, last)``, numbers of steps at the beginning and the end of
            training that run with recipe ``bf16``. A second compiled variant, no recompilation.
        total_steps: length of the training run in calls; required by ``high_precision_steps``.
        dynamic: as in ``torch.compile``.
        options: further fields of :class:`~fos_compile.BackendConfig`.

    Returns:
        A :class:`TrainStep`: called like ``fn``, with ``report``, ``steps``, ``state_dict`` and
        ``load_state_dict``. Every call draws a fresh seed for stochastic rounding from torch's
        default generator of the device, so ``torch.manual_seed`` makes a run repeatable.

    Raises:
        InvalidArgument: unknown option or recipe, or ``high_precision_steps`` without a length.
        NothingQuantized: at the end of the first quantized step, if no matmul was quantized.
    """
    config = parse_options({**options, "recipe": recipe, "skip": tuple(skip)})
    schedule = _Schedule(high_precision_steps, total_steps)

    def decorate(function: Callable[..., Any]) -> TrainStep[..., Any]:
        return TrainStep(function, config, schedule, dynamic)

    return decorate if fn is None else decorate(fn)


class _Schedule:
    """Which steps of a run stay in high precision."""

    def __init__(self, edges: tuple[int, int] | None, total_steps: int | None) -> None:
        self.first, self.last, self.total = 0, 0, total_steps
        if edges is None:
            return
        if len(edges) != 2 or min(edges) < 0:
            raise InvalidArgument(
                "train_step", "high_precision_steps", "two step counts (first, last)", edges
            )
        self.first, self.last = edges
        if total_steps is None:
            raise InvalidArgument(
                "train_step", "total_steps", "given with high_precision_steps", None,
                "pass the number of calls of the training run",
            )  # fmt: skip
        if self.first + self.last > total_steps:
            raise InvalidArgument(
                "train_step", "high_precision_steps", f"at most total_steps={total_steps}", edges
            )

    def high_precision(self, step: int) -> bool:
        return step < self.first or (
            self.total is not None and self.last > 0 and step >= self.total - self.last
        )


class TrainStep(Generic[P, R]):
    """A compiled training step; made by :func:`train_step`."""

    def __init__(
        self, fn: Callable[P, R], config: BackendConfig, schedule: _Schedule, dynamic: bool | None
    ) -> None:
        functools.update_wrapper(self, fn)
        self.name = getattr(fn, "__qualname__", repr(fn))
        self.steps = 0
        """Calls so far; decides which steps ``high_precision_steps`` covers."""
        self._schedule = schedule
        self._backend = Backend(config, fragment=True)
        self._compiled = torch.compile(fn, backend=self._backend, dynamic=dynamic)
        self._plain_backend = Backend(config.replaced(recipe=BF16), fragment=True)
        self._plain = torch.compile(fn, backend=self._plain_backend, dynamic=dynamic)
        self._checked = config.recipe is not None and not config.recipe.quantizes

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one step; compiles on the first call of a variant."""
        if self._schedule.high_precision(self.steps):
            result = self._plain(*args, **kwargs)
        else:
            result = self._compiled(*args, **kwargs)
            if not self._checked:
                self._check()
        self.steps += 1
        return result

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind like a function, so that a method can be a step."""
        return self if instance is None else functools.partial(self, instance)

    def _check(self) -> None:
        report = merge(self._backend.reports)
        if not report.quantized and not report.failure:
            reasons = "; ".join(f"{count}x {reason}" for reason, count in report.reasons().items())
            raise NothingQuantized(
                f"train_step: no matmul of {self.name!r} was quantized with recipe "
                f"{report.recipe!r}: {reasons or 'torch.compile captured none'}; "
                "the step itself ran in high precision"
            )
        self._checked = True

    @property
    def report(self) -> Report:
        """What happened to every matmul of the quantized step, forward and backward.

        Raises:
            RuntimeError: before the first quantized step, when nothing has been traced.
        """
        if not self._backend.reports:
            raise RuntimeError(
                "train_step: report needs a quantized step to have run; call the step first"
            )
        return self._backend.report

    def state_dict(self) -> dict[str, Any]:
        """Step count and the states of torch's default generators, which the dice come from."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {"steps": self.steps, "rng_cpu": torch.get_rng_state(), "rng_cuda": cuda}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where :meth:`state_dict` was taken: same dice, same place in the schedule.

        Raises:
            InvalidArgument: ``state`` is not from :meth:`state_dict`; nothing is changed.
        """
        expected = {"steps", "rng_cpu", "rng_cuda"}
        if set(state) != expected:
            raise InvalidArgument(
                "train_step", "state", f"a dict with keys {sorted(expected)}", sorted(state)
            )
        self.steps = int(state["steps"])
        torch.set_rng_state(state["rng_cpu"])
        if state["rng_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng_cuda"])
