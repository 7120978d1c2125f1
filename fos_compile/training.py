"""``train_step``: a decorator that compiles a training step with quantized matmuls."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, overload

import torch
from torch._dynamo.utils import counters
from torch.utils.weak import WeakIdKeyDictionary

from fos_compile.backend import Backend
from fos_compile.config import BackendConfig, parse_options
from fos_compile.kernels.errors import InvalidArgument
from fos_compile.kernels.own_code import own_code
from fos_compile.passes.errors import warn
from fos_compile.passes.recipe import Recipe
from fos_compile.passes.report import Report
from fos_compile.recipes import BF16, TRAINING

P = ParamSpec("P")
R = TypeVar("R")


class NothingQuantized(RuntimeError):
    """A step ran, and none of its matmuls was quantized; the message says why for each."""


class TooManyVariants(RuntimeError):
    """A step ran in high precision, because Dynamo refused to compile it once more."""


@overload
def train_step(fn: Callable[P, R]) -> TrainStep[P, R]: ...


@overload
def train_step(
    *,
    recipe: str | Recipe | None = None,
    skip: Iterable[str] = (),
    high_precision_steps: tuple[int, int] | None = None,
    total_steps: int | None = None,
    dynamic: bool | None = None,
    **options: Any,
) -> Callable[[Callable[P, R]], TrainStep[P, R]]: ...


def train_step(
    fn: Callable[..., Any] | None = None,
    *,
    recipe: str | Recipe | None = None,
    skip: Iterable[str] = (),
    high_precision_steps: tuple[int, int] | None = None,
    total_steps: int | None = None,
    dynamic: bool | None = None,
    **options: Any,
) -> Any:
    """Compile a function that does forward, loss, backward and, if it likes, the optimizer step.

    Args:
        fn: the step. Dynamo breaks the graph once at ``loss.backward()``; what stands before and
            after it is compiled. A method works too: every instance counts its own steps.
        recipe: a recipe's name or a :class:`~fos_compile.Recipe`; ``"bf16"`` compiles without
            quantization, as a baseline. Default: that of ``FOS_RECIPE``, else ``"training"``.
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
        TooManyVariants: at the end of the step whose forward Dynamo refused to compile once more,
            so that it, or a part, ran in high precision. Later steps like it warn.
    """
    if fn is not None and not callable(fn):
        fix = "name the options: train_step(recipe=...)"
        raise InvalidArgument("train_step", "fn", "a function", repr(fn), fix)
    named = {} if recipe is None else {"recipe": recipe}
    config = parse_options({**options, **named, "skip": skip})
    schedule = _Schedule(high_precision_steps, total_steps)

    def decorate(function: Callable[..., Any]) -> TrainStep[..., Any]:
        if not callable(function):
            raise InvalidArgument("train_step", "fn", "a function", repr(function))
        return TrainStep(
            function, config.replaced(recipe=config.recipe or TRAINING), schedule, dynamic
        )

    return decorate if fn is None else decorate(fn)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class _Schedule:
    """Which steps of a run stay in high precision."""

    def __init__(self, edges: tuple[int, int] | None, total_steps: int | None) -> None:
        self.first, self.last, self.total = 0, 0, total_steps
        if total_steps is not None and not _is_count(total_steps):
            raise InvalidArgument(
                "train_step", "total_steps", "a number of steps", repr(total_steps)
            )
        if edges is None:
            return
        pair = isinstance(edges, (tuple, list)) and len(edges) == 2
        if not pair or not all(map(_is_count, edges)):
            raise InvalidArgument(
                "train_step", "high_precision_steps", "two step counts (first, last)", repr(edges)
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


class _Variant:
    """A step compiled under one config, on a code object of its own, with the reports of it."""

    def __init__(self, fn: Callable[..., Any], config: BackendConfig, dynamic: bool | None) -> None:
        assert config.recipe is not None
        self.recipe = config.recipe
        self.name = getattr(fn, "__qualname__", repr(fn))
        self.backend = Backend(config, fragment=True)
        self._compiled = torch.compile(own_code(fn), backend=self.backend, dynamic=dynamic)
        self._checked = not config.recipe.quantizes
        self._usual_runs = 0
        self._limited = self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ran, refused = self.backend.quantized_runs, _refused_compilations()
        result = self._compiled(*args, **kwargs)
        if not self._checked:
            self._check()
        if self.recipe.quantizes:
            hit = _refused_compilations() > refused
            self._watch(self.backend.quantized_runs - ran, hit=hit)
        return result

    def _watch(self, runs: int, *, hit: bool) -> None:
        """Beyond its limit Dynamo runs what it has compiled and the rest as it is. An optimizer may
        end up there (its learning rate is a constant to Dynamo), the forward must not."""
        self._limited = self._limited or hit
        if not self._limited:
            self._usual_runs = max(self._usual_runs, runs)
        elif runs < self._usual_runs and hit:
            raise self._too_many()
        elif runs < self._usual_runs and not self._warned:
            self._warned = True  # a step may also do less on purpose
            warn(str(self._too_many()))

    def _too_many(self) -> TooManyVariants:
        limit = torch._dynamo.config.recompile_limit
        return TooManyVariants(
            f"train_step: {self.name!r} must compile at most {limit} times, got one more, and ran "
            "a part in high precision; let sizes be symbolic (dynamic=None), use one step for "
            "several models, or raise torch._dynamo.config.recompile_limit"
        )

    def _check(self) -> None:
        report = self.backend.report if self.backend.reports else Report(recipe=self.recipe.name)
        if not report.quantized and not report.failure:
            reasons = "; ".join(f"{count}x {reason}" for reason, count in report.reasons().items())
            raise NothingQuantized(
                f"train_step: no matmul of {self.name!r} was quantized with recipe "
                f"{self.recipe.name!r}: {reasons or _NOTHING_CAPTURED}; "
                "the step itself ran in high precision"
            )
        self._checked = True


def _refused_compilations() -> int:
    """How often Dynamo met its recompile limit in this process."""
    reasons = counters["unimplemented"].items()
    return sum(count for reason, count in reasons if "recompile limit" in reason)


_NOTHING_CAPTURED = (
    "torch.compile captured none (it skips a function whose backward() sits in a loop or a try: "
    "put the forward and backward of one micro-batch in a function of its own)"
)


@dataclass(slots=True)
class _Progress:
    steps: int = 0


class TrainStep(Generic[P, R]):
    """A compiled training step; made by :func:`train_step`."""

    def __init__(
        self, fn: Callable[P, R], config: BackendConfig, schedule: _Schedule, dynamic: bool | None
    ) -> None:
        functools.update_wrapper(self, fn)
        self._schedule = schedule
        self._quantized = _Variant(fn, config, dynamic)
        self._plain = _Variant(fn, config.replaced(recipe=BF16), dynamic)
        self._progress = _Progress()
        self._of_instances = WeakIdKeyDictionary()
        self._self: tuple[Any, ...] = ()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run one step; compiles on the first call of a variant."""
        plain = self._schedule.high_precision(self.steps)
        result: R = (self._plain if plain else self._quantized)(*self._self, *args, **kwargs)
        self.steps += 1
        return result

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Bind like a function, so that a method can be a step.

        Instances share what is compiled, and with it the report; each counts its own steps.
        """
        if instance is None or self._self:
            return self
        try:
            progress = self._of_instances.setdefault(instance, _Progress())
        except TypeError as error:
            fix = "add '__weakref__' to its __slots__"
            kind = type(instance).__name__
            raise InvalidArgument("train_step", "self", "weakly referable", kind, fix) from error
        bound = copy.copy(self)
        bound._progress, bound._self = progress, (instance,)
        return bound

    @property
    def steps(self) -> int:
        """Calls so far; decides which steps ``high_precision_steps`` covers."""
        return self._progress.steps

    @steps.setter
    def steps(self, count: int) -> None:
        self._progress.steps = count

    @property
    def report(self) -> Report:
        """What happened to every matmul of the quantized step, forward and backward.

        Raises:
            RuntimeError: before the first quantized step, when nothing has been traced.
        """
        if not self._quantized.backend.reports:
            raise RuntimeError(
                "train_step: report needs a quantized step to have run; call the step first"
            )
        return self._quantized.backend.report

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
        if not isinstance(state, Mapping) or set(state) != expected:
            actual = sorted(map(str, state)) if isinstance(state, Mapping) else repr(state)
            raise InvalidArgument(
                "train_step", "state", f"a dict with keys {sorted(expected)}", actual
            )
        steps, saved = state["steps"], state["rng_cuda"]
        if not _is_count(steps):
            raise InvalidArgument("train_step", "state['steps']", "a number of steps", repr(steps))
        if not isinstance(saved, (list, tuple)):
            raise InvalidArgument("train_step", "state['rng_cuda']", "a list", repr(saved))
        cpu = _generator_state("rng_cpu", state["rng_cpu"], "cpu")
        cuda = [
            _generator_state("rng_cuda", each, f"cuda:{index}")
            for index, each in enumerate(saved if torch.cuda.is_available() else ())
        ]
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        self.steps = steps


def _generator_state(key: str, state: Any, device: str) -> torch.Tensor:
    """The state in the form that generators take; a map_location may have moved or cast it."""
    try:
        moved: torch.Tensor = state.to("cpu", torch.uint8)
        torch.Generator(device).set_state(moved)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise InvalidArgument(
            "train_step", f"state[{key!r}]", f"a generator state of {device}", type(state).__name__,
            str(error),
        ) from error  # fmt: skip
    return moved
