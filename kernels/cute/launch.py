"""Which kernel serves a call, and the call: tables from options to kernels, best first.

A kernel's host side (``host_<name>.py``) says which tensors it can read, how it is compiled
(`signature`) and how it is launched. The first call of a kernel on a device compares it with the
reference (`selftest`). After that nothing here synchronizes, reads a device value or copies to or
from the host; a kernel runs on torch's current stream of the device of its tensors, whichever
device is current (the TVM-FFI wrapper of the DSL sees to both), so launches can be captured in a
CUDA graph: the warm-up before a capture makes the first call.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels import target
from fos_compile.kernels.cute.cache import KERNELS
from fos_compile.kernels.cute.selftest import disagreement
from fos_compile.kernels.cute.tables import DEFAULTS, NAMES, TABLES, Entry, Options


class Candidate:
    """An entry of a table for one device and one set of options; compiled when first used."""

    def __init__(
        self, op: str, entry: Entry, dtype: torch.dtype, options: Options, index: int
    ) -> None:
        self.layout = entry.layout
        self.failure = ""
        self._op, self._entry, self._dtype = op, entry, dtype
        self._options, self._index = options, index
        self._launch: Callable[..., Any] | None = None

    def refuses(self, x: Tensor) -> str:
        """Why x cannot go to this kernel, or nothing."""
        return self.failure or self.layout(x)

    def launch(self) -> Callable[..., Any] | None:
        """The launch of the compiled kernel, or None if there is something wrong with it: said
        once, aloud. The first call compiles and compares with the reference, which waits for the
        device; while a graph is captured it may not, and the next implementation serves.
        """
        if self._launch is None and not self.failure:
            if torch.cuda.is_current_stream_capturing():
                return None
            device = torch.device("cuda", self._index)
            key = self._entry.key(self._dtype, self._options)
            try:
                kernel = KERNELS.get(key, target.arch(device))
            except Exception as error:
                self._give_up(f"{key.name} does not compile: {type(error).__name__}: {error}")
                return None
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
            launch = functools.partial(self._entry.launch, kernel, num_sms, key)
            wrong = disagreement(self._op, dict(key.options), self._dtype, launch, device)
            if wrong:
                self._give_up(f"{key.name} {wrong}")
                return None
            self._launch = launch
        return self._launch

    def _give_up(self, failure: str) -> None:
        self.failure = failure
        warnings.warn(f"{failure}; the next implementation serves", stacklevel=2)


Plan = tuple[Candidate, ...] | str
_PLANS: dict[tuple[str, Options, torch.dtype, int | None], Plan] = {}


def quantize(
    x: Tensor, amax: Tensor, seed: Tensor | None, options: Options, stream: int
) -> tuple[Tensor, Tensor] | None:
    """Values and scales by a device kernel, or None where none serves or an argument is wrong.

    Args:
        x: what `reason` says nothing against.
        amax: float32, one element, on the device of x.
        seed: int64, one element, on the device of x; unused for nearest.
        options: format, scale_rule, rounding, block, rht, transpose.
        stream: which dice.
    """
    if not _is_number(amax, torch.float32, x):
        return None
    if options[2] != "nearest" and (seed is None or not _is_number(seed, torch.int64, x)):
        return None
    view = x.mT if options[5] and x.dim() > 1 else x
    launch = _launcher("quantize", options, x.dtype, view)
    return None if launch is None else launch(view, amax, seed, stream)


def amax(x: Tensor, transpose: bool) -> Tensor | None:
    """Largest magnitude after the transform by a device kernel, or None where none serves."""
    view = x.mT if transpose and x.dim() > 1 else x
    launch = _launcher("amax", (True,), x.dtype, view)
    return None if launch is None else launch(view)


def dequantize(
    values: Tensor,
    scales: Tensor,
    amax: Tensor | None,
    cols: int,
    format: str,
    qs: float,
    dtype: torch.dtype,
) -> Tensor | None:
    """A matrix by a device kernel, or None where none serves; the buffers have been checked."""
    if amax is not None and not _is_number(amax, torch.float32, values):
        return None
    if scales.device != values.device or not scales.is_contiguous():
        return None
    options = (format, amax is not None, dtype)
    launch = _launcher("dequantize", options, values.dtype, values)
    return None if launch is None else launch(values, scales, amax, cols, qs, dtype)


def reason(op: str, x: Tensor, options: dict[str, Any]) -> str:
    """Why no device kernel serves an operator's call with a possibly fake x, or nothing.

    The decision of the call itself, except that a kernel may turn out not to compile.
    """
    given = {**DEFAULTS[op], **options}
    view = x.mT if given.get("transpose") and x.dim() > 1 else x
    plan = _plan(op, tuple(given[name] for name in NAMES[op]), x.dtype, x.device)
    if isinstance(plan, str):
        return plan
    reasons = [candidate.refuses(view) for candidate in plan]
    return "" if "" in reasons else reasons[-1]


def _is_number(number: Tensor, dtype: torch.dtype, x: Tensor) -> bool:
    return number.dtype is dtype and number.device == x.device and number.numel() == 1


def _launcher(
    op: str, options: Options, dtype: torch.dtype, view: Tensor
) -> Callable[..., Any] | None:
    """The launch of the best kernel that takes `view`."""
    plan = _plan(op, options, dtype, view.device)
    if isinstance(plan, str):
        return None
    for candidate in plan:
        if not candidate.refuses(view):
            launch = candidate.launch()
            if launch is not None:
                return launch
    return None


def _plan(op: str, options: Options, dtype: torch.dtype, device: torch.device) -> Plan:
    """Candidates for these options, or why there are none."""
    plan = _PLANS.get((op, options, dtype, device.index))
    return plan if plan is not None else _make_plan(op, options, dtype, device)


def _make_plan(op: str, options: Options, dtype: torch.dtype, device: torch.device) -> Plan:
    able = target.status(device)
    if not able:
        return able.reason
    index = torch.cuda.current_device() if device.index is None else device.index
    table = TABLES[op]
    refusals = [entry.refuses(NAMES[op], dtype, options) for entry in table]
    fit = tuple(
        Candidate(op, entry, dtype, options, index)
        for entry, refusal in zip(table, refusals, strict=True)
        if not refusal
    )
    if fit:
        return _PLANS.setdefault((op, options, dtype, index), fit)
    # Of the kernels for this format rather than of one for another.
    told = [refusal for refusal in refusals if not refusal.startswith("format ")]
    return _PLANS.setdefault((op, options, dtype, index), (told or refusals)[-1])
