"""Which kernel serves a call, and the call: tables from options to kernels, best first.

A kernel's host side (``host_<name>.py``) says which tensors it can read, how it is compiled
(`signature`) and how it is launched (`prepare`). The first call of a kernel on a device compares it
with the reference (`selftest`). After that nothing here synchronizes, reads a device value or
copies to or from the host; a kernel runs on torch's current stream of the device of its tensors,
whichever device is current (the TVM-FFI wrapper of the DSL sees to both), so launches can be
captured in a CUDA graph: the warm-up before a capture makes the first call.

A call like an earlier one (options, dtype, device, shape, strides) finds its launch by one look-up:
the host side of a call is what small matrices wait for.
"""

import functools
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels import formats, target
from fos_compile.kernels.cute.cache import KERNELS
from fos_compile.kernels.cute.host_general import Launch
from fos_compile.kernels.cute.selftest import disagreement
from fos_compile.kernels.cute.tables import DEFAULTS, NAMES, TABLES, Entry, Options, lacks


class Candidate:
    """An entry of a table for one device and one set of options; compiled when first used."""

    def __init__(
        self, op: str, entry: Entry, dtype: torch.dtype, options: Options, index: int
    ) -> None:
        self.layout = entry.layout
        self.failure = ""
        self._op, self._entry, self._dtype = op, entry, dtype
        self._options, self._index = options, index
        self._prepare: Callable[[Tensor], Launch] | None = None

    def refuses(self, x: Tensor) -> str:
        """Why x cannot go to this kernel, or nothing."""
        return self.failure or self.layout(x)

    def prepare(self, x: Tensor) -> Launch | None:
        """The launch of the compiled kernel for matrices like x, or None if there is something
        wrong with it: said once, aloud. The first call compiles and compares with the reference,
        which waits for the device; while a graph is captured it may not, and the next
        implementation serves.
        """
        if self._prepare is None and not self.failure:
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
            self._prepare = functools.partial(self._entry.prepare, kernel, num_sms, key)
        return None if self._prepare is None else self._prepare(x)

    def _give_up(self, failure: str) -> None:
        self.failure = failure
        warnings.warn(f"{failure}; the next implementation serves", stacklevel=2)


Plan = tuple[Candidate, ...] | str
_PLANS: dict[tuple[str, Options, torch.dtype, int | None], Plan] = {}
MAX_READY = 4096
"""Launches that are kept; a program with more shapes than that has no steady state to wait for."""
_READY: dict[Hashable, Launch] = {}
"""By everything that they were prepared for."""


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
    device = x.device
    if not _is_number(amax, torch.float32, device):
        return None
    if options[2] != "nearest" and not _is_number(seed, torch.int64, device):
        return None
    like = (x.shape, x.stride(), x.dtype, device, options)
    launch = _READY.get(like)
    if launch is None:
        launch = _ready(like, *_find("quantize", options, _oriented(x, options[5])))
    return None if launch is None else launch(x, amax, seed, stream)


def quantize_pair(
    x: Tensor,
    amax_row: Tensor,
    amax_col: Tensor,
    seed: Tensor | None,
    options: Options,
    stream: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Values and scales of x and of x.mT by one or two device kernels, or None where not both
    are served or an argument is wrong.

    Args:
        x: what `reason` says nothing against.
        amax_row: float32, one element, on the device of x.
        amax_col: as amax_row.
        seed: int64, one element, on the device of x; unused if both roundings are nearest.
        options: format, scale_rule, block, rounding_row, rounding_col, rht_row, rht_col.
        stream: which dice; the columns have the next.
    """
    device = x.device
    if not (
        _is_number(amax_row, torch.float32, device) and _is_number(amax_col, torch.float32, device)
    ):
        return None
    has_dice = options[3] != "nearest" or options[4] != "nearest"
    if has_dice and not _is_number(seed, torch.int64, device):
        return None
    like = (x.shape, x.stride(), x.dtype, device, options)
    launch = _READY.get(like)
    if launch is None:
        launch = _ready(like, *_find_pair(x, options))
    return None if launch is None else launch(x, amax_row, amax_col, seed, stream)


def amax(x: Tensor, transpose: bool) -> Tensor | None:
    """Largest magnitude after the transform by a device kernel, or None where none serves."""
    like = (x.shape, x.stride(), x.dtype, x.device, transpose)
    launch = _READY.get(like)
    if launch is None:
        launch = _ready(like, *_find("amax", (True,), _oriented(x, transpose)))
    return None if launch is None else launch(x)


def dequantize(
    values: Tensor,
    scales: Tensor,
    amax: Tensor | None,
    rows: int,
    cols: int,
    format: str,
    qs: float,
    dtype: torch.dtype,
) -> Tensor | None:
    """A matrix by a device kernel, or None where none serves or an argument is wrong.

    Raises:
        InvalidArgument: the buffers do not fit each other.
    """
    device = values.device
    if amax is not None and not _is_number(amax, torch.float32, device):
        return None
    like = (
        (values.shape, values.stride(), values.dtype, device),
        (scales.shape, scales.stride(), scales.dtype, scales.device),
        (rows, cols, format, amax is None, dtype),
    )
    launch = _READY.get(like)
    if launch is None:
        options = (format, amax is not None, dtype)
        found = _find("dequantize", options, values)
        if found[0] is None or scales.device != device or not scales.is_contiguous():
            return None
        formats.check_buffers("dequantize", ("values", "scales"), values, scales, format)
        if rows != values.shape[-2] or not 0 <= cols <= 2 * values.shape[-1]:
            return None
        launch = _ready(like, *found)
    return None if launch is None else launch(values, scales, amax, cols, qs, dtype)


def reason(op: str, x: Tensor, options: dict[str, Any]) -> str:
    """Why no device kernel serves an operator's call with a possibly fake x, or nothing.

    The decision of the call itself, except that a kernel may turn out not to compile.
    """
    given = {**DEFAULTS[op], **options}
    view = _oriented(x, given.get("transpose", False))
    plan = _plan(op, tuple(given[name] for name in NAMES[op]), x.dtype, x.device)
    if isinstance(plan, str):
        return plan
    reasons = [candidate.refuses(view) for candidate in plan]
    return "" if "" in reasons else reasons[-1]


def _is_number(number: Tensor | None, dtype: torch.dtype, device: torch.device) -> bool:
    return (
        number is not None
        and number.dtype is dtype
        and number.device == device
        and number.numel() == 1
    )


def _oriented(x: Tensor, transpose: bool) -> Tensor:
    return x.mT if transpose and x.dim() > 1 else x


def _ready(like: Hashable, launch: Launch | None, is_final: bool) -> Launch | None:
    """The launch, for the next call like this one too if that one would find no other."""
    if launch is not None and is_final:
        if len(_READY) >= MAX_READY:
            _READY.clear()
        _READY[like] = launch
    return launch


def _find(op: str, options: Options, view: Tensor) -> tuple[Launch | None, bool]:
    """The launch of the best kernel that takes `view`, if any, and whether that is final: a better
    one may have to wait for the end of a capture.
    """
    plan, is_final = _plan(op, options, view.dtype, view.device), True
    if isinstance(plan, str):
        return None, True
    for candidate in plan:
        if not candidate.refuses(view):
            launch = candidate.prepare(view)
            if launch is not None:
                return launch, is_final
            is_final = is_final and bool(candidate.failure)
    return None, is_final


def _find_pair(x: Tensor, options: Options) -> tuple[Launch | None, bool]:
    """As `_find`: a kernel for the pair, else one for each orientation."""
    fused, is_final = _find("quantize_pair", options, x)
    if fused is not None:
        return fused, is_final
    format, rule, block, rounding_row, rounding_col, rht_row, rht_col = options
    row, row_final = _find("quantize", (format, rule, rounding_row, block, rht_row, False), x)
    if row is None:
        return None, is_final
    col, col_final = _find(
        "quantize", (format, rule, rounding_col, block, rht_col, True), _oriented(x, True)
    )
    if col is None:
        return None, is_final
    return _both(row, col), is_final and row_final and col_final


def _both(row: Launch, col: Launch) -> Launch:
    def launch(
        x: Tensor, amax_row: Tensor, amax_col: Tensor, seed: Tensor | None, stream: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *row(x, amax_row, seed, stream), *col(x, amax_col, seed, stream + 1)

    return launch


def _plan(op: str, options: Options, dtype: torch.dtype, device: torch.device) -> Plan:
    """Candidates for these options, or why there are none."""
    plan = _PLANS.get((op, options, dtype, device.index))
    return plan if plan is not None else _make_plan(op, options, dtype, device)


def _make_plan(op: str, options: Options, dtype: torch.dtype, device: torch.device) -> Plan:
    able = target.status(device)
    if not able:
        return able.reason
    index = torch.cuda.current_device() if device.index is None else device.index
    lacking = lacks(options, target.arch(device))
    if lacking:
        return _PLANS.setdefault((op, options, dtype, index), lacking)
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
    why = (told or refusals or ["no kernel"])[-1]
    return _PLANS.setdefault((op, options, dtype, index), why)
