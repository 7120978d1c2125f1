"""The project's own kernels in the emulator, called as users call them on a GPU.

A :class:`Device` poses as the only CUDA device. What it is asked for goes the whole way: the tables
choose a kernel, its host side prepares a launch and allocates, the DSL compiles, and the compiled
host code launches. Only then is there no GPU, and the emulator runs the PTX.

``PYTHONPATH=tests/support python -m tests.emulator.own_kernels`` on a machine with a GPU, in the
root of the repository, records what that GPU makes of `CASES` in vectors/own_kernels.json.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import importlib.metadata
import itertools
import json
import tempfile
import types
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stand_ins
from cute_cases import LAYOUTS, OPTIONS
from fos_compile.kernels import AMAX, DEQUANTIZE, QUANTIZE, QUANTIZE_PAIR, cuda, formats, target
from fos_compile.kernels.cute import build, host_general, launch, selftest, tables
from fos_compile.kernels.cute.cache import KernelKey
from tests.emulator.emulate import Run, emulate
from tests.emulator.host import load
from tests.emulator.machine.program import Settings
from tests.emulator.ptx.parser import parse

IN_PLACE = frozenset({"amax_rotated"})
"""Kernels that add to what their output holds already."""
OPS: dict[str, tuple[Any, Callable[..., Any]]] = {
    "amax": (AMAX, cuda.cuda_amax),
    "quantize": (QUANTIZE, cuda.cuda_quantize),
    "quantize_pair": (QUANTIZE_PAIR, cuda.cuda_quantize_pair),
    "dequantize": (DEQUANTIZE, cuda.cuda_dequantize),
}
"""The operator, which has the reference, and its implementation for CUDA."""


@functools.lru_cache(maxsize=64)
def host(key: KernelKey, arch: str) -> Any:
    """Host code and PTX of a kernel as users get them."""
    with tempfile.TemporaryDirectory() as folder:
        # The assembler comes after the PTX, which it cannot change: -O0 saves a quarter of the time
        # to compile. --generate-line-info would name lines of the kernels, and costs half again.
        options = f"--keep-ptx --ptxas-options -O0 --dump-dir {folder}"
        return load(build.compiled(key, arch, options))


@dataclass
class Device:
    """A GPU of one architecture.

    `num_sms` decides how much work a CTA gets; `edit` changes the PTX before it runs.
    """

    arch: str
    settings: Settings = field(default_factory=Settings)
    num_sms: int = 132
    edit: Callable[[str], str] | None = None
    runs: list[tuple[KernelKey, Run]] = field(default_factory=list)
    """What ran, in order."""
    _given: dict[int, Tensor] = field(default_factory=dict)
    _allocated: dict[int, Tensor] = field(default_factory=dict)

    def call(self, op: str, *arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        """An operator of `fos` on CPU tensors, which are on this device while it runs."""
        before = len(self.runs)
        # A kernel that does not compile, or that the emulator cannot load, is a warning to users.
        caught = warnings.catch_warnings(action="error", category=UserWarning)
        with caught, self._installed(arguments), torch.no_grad():
            result = OPS[op][1](*arguments, **options)
        assert len(self.runs) > before, f"no kernel serves {op} with {options}"
        return result if isinstance(result, tuple) else (result,)

    def disagreement(self, op: str, entry: tables.Entry, key: KernelKey) -> str:
        """What `selftest` finds wrong with a kernel, as in a process that first uses it."""
        kernel = self.get(key, self.arch)

        def called(*arguments: Any) -> Any:
            with self._installed(arguments):
                return entry.launch(kernel, self.num_sms, key, *arguments)

        dtype, cpu = getattr(torch, key.dtype), torch.device("cpu")
        return selftest.disagreement(op, dict(key.options), dtype, called, cpu)

    def get(self, key: KernelKey, arch: str) -> Callable[..., None]:
        """In the place of the cache of compiled kernels: a function that launches one."""
        found = host(key, arch)
        if self.edit is not None:
            found = copy.copy(found)
            found.module = parse(self.edit("\n".join(found.module.lines)))

        def kernel(*arguments: Any) -> None:
            numbers = [a for a in arguments if isinstance(a, int)]
            given = [self._given[n] for n in numbers if n in self._given]
            outputs = [self._allocated[n] for n in numbers if n in self._allocated]
            if key.name in IN_PLACE:
                given, outputs = given + outputs, []
            # The filters store what they are not sure of, and then once more what is right.
            run = emulate(
                found, *arguments, outputs=outputs, memory=given, settings=self.settings,
                write_once=False,
            )  # fmt: skip
            self.runs.append((key, run))

        return kernel

    @contextlib.contextmanager
    def _installed(self, arguments: tuple[Any, ...]) -> Iterator[None]:
        tensors = [a for a in arguments if isinstance(a, Tensor) and a.numel()]
        self._given, self._allocated = {t.data_ptr(): t for t in tensors}, {}
        properties = types.SimpleNamespace(multi_processor_count=self.num_sms)
        with pytest.MonkeyPatch.context() as patch:
            stand_ins.install(patch)
            patch.setattr(launch, "KERNELS", self)
            patch.setattr(target, "arch", lambda _: self.arch)
            patch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
            patch.setattr(host_general, "empty_strided", self._empty_strided)
            yield

    def _empty_strided(self, device: torch.device) -> Callable[..., Tensor]:
        """In place of `host_general.empty_strided`: what host sides allocate is output."""

        def allocate(
            sizes: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
        ) -> Tensor:
            buffer = torch.empty_strided(sizes, strides, dtype=dtype, device=device)
            self._allocated[buffer.data_ptr()] = buffer
            return buffer

        return allocate


def every_key() -> dict[KernelKey, tuple[str, tables.Entry]]:
    """Every kernel, with its operator and an entry of the tables."""
    return {
        entry.key(dtype, options): (op, entry)
        for op, entries in tables.TABLES.items()
        for entry in entries
        for dtype in entry.dtypes
        for options in itertools.product(*entry.options.values())
    }


def has(arch: str, options: Iterable[Any]) -> bool:
    """Whether an architecture has the instructions for the values of some options."""
    return HARDWARE not in options or arch == "sm_100a"


# Cases --------------------------------------------------------------------------------------------

ARCHS = ("sm_90a", "sm_100a", "sm_120a")
HARDWARE = "stochastic_hardware"
ROWS = "rows"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of an operator, and the name of the kernel that serves it.

    `archs` are those that every run of the tests has it on. Numbers are of numpy's frozen stream.
    """

    kernel: str
    shape: tuple[int, ...]
    op: str = "quantize"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    view: str = ROWS
    num_sms: int = 132
    amax_col: float = 1.0
    """What the columns' amax is of the rows'."""
    archs: tuple[str, ...] = ARCHS[:1]

    def inputs(self) -> tuple[Any, ...]:
        """Arguments of the operator, on the CPU."""
        random = np.random.RandomState(
            zlib.crc32(f"{self.shape} {self.options} {self.dtype} {self.view}".encode())
        )
        if self.op == "dequantize":
            return self._buffers(random)
        x = random.standard_normal(self.shape)
        x *= 2.0 ** random.randint(-6, 7, (*self.shape[:-1], 1))
        x[random.random_sample(self.shape) < 0.05] *= -0.0
        matrix = LAYOUTS[self.view][1](torch.from_numpy(x.astype(np.float32)).to(self.dtype))
        if self.op == "amax":
            return matrix, True, self.options.get("transpose", False)
        amax = matrix.abs().max().float()
        amaxes = (amax,) if self.op == "quantize" else (amax, amax * self.amax_col)
        seed = torch.tensor([0, -(2**40) - sum(self.shape)])[1:]
        return matrix, *amaxes, seed

    def _buffers(self, random: np.random.RandomState) -> tuple[Any, ...]:
        rows, cols = self.shape
        format = self.options["format"]
        width = formats.padded_cols(cols, format) // 2
        values = random.randint(256, size=(rows, width)).astype(np.uint8)
        count = formats.scale_count(rows, 2 * width, format)
        # No NaN: its bits are the hardware's.
        scales = random.randint(0x7F if format == "nvfp4" else 0xFF, size=count).astype(np.uint8)
        amax = torch.tensor(3.0) if "qs" in self.options else None
        return torch.from_numpy(values), torch.from_numpy(scales), amax, rows, cols

    def keywords(self) -> dict[str, Any]:
        """Options of the operator by name."""
        return {} if self.op == "amax" else self.options

    def expected(self) -> tuple[Tensor, ...]:
        """By the reference."""
        result = OPS[self.op][0].reference(*self.inputs(), **self.keywords())
        return result if isinstance(result, tuple) else (result,)

    def run(self, device: Device) -> tuple[Tensor, ...]:
        """In the emulator."""
        device.num_sms = self.num_sms
        return device.call(self.op, *self.inputs(), **self.keywords())


def _filtered(shape: tuple[int, ...], view: str = ROWS, **more: Any) -> Case:
    return Case(kernel="quantize_filtered", shape=shape, view=view, **more)


def _quantize(kernel: str, shape: tuple[int, ...], options: str, **more: Any) -> Case:
    """`options`: some of format, rule, rounding, block, ``rht`` and ``transpose``, in words."""
    names = {
        word: name
        for name in ("format", "scale_rule", "rounding", "block")
        for word in OPTIONS[name]
    }
    flags = {"rht", "transpose"}
    chosen = {word: True for word in options.split() if word in flags}
    chosen |= {names[word]: word for word in options.split() if word not in flags}
    return Case(kernel=f"quantize_{kernel}", shape=shape, options=chosen, **more)


def _pair(kernel: str, shape: tuple[int, ...], **more: Any) -> Case:
    return Case(kernel=f"quantize_{kernel}", op="quantize_pair", shape=shape, **more)


def _dequantize(shape: tuple[int, ...], format: str, dtype: torch.dtype, **options: Any) -> Case:
    chosen = {"format": format, "dtype": dtype, **options}
    return Case(kernel="dequantize_blocks", op="dequantize", shape=shape, options=chosen)


F16, F32 = torch.float16, torch.float32
DICE = {"rounding_row": "stochastic", "rounding_col": "stochastic"}
UNBIASED = {"rounding_row": "stochastic_unbiased", "rounding_col": "stochastic_unbiased"}
RHT = {"rht_row": True, "rht_col": True}
CASES = {
    "filtered": _filtered((150, 136), archs=ARCHS),
    "filtered, rounds": _filtered((24, 1032), num_sms=1),
    "filtered, column after column": _quantize(
        "filtered", (83, 37), "static_6 rht transpose", archs=ARCHS
    ),
    "filtered, narrow slice": _filtered((33, 71), "narrow slice", num_sms=1),
    "filtered, batch inside": _filtered((30, 2, 72), "batch inside"),
    "filtered, one row for all": _filtered((1, 96), "one for all"),
    "filtered, misaligned": _filtered((20, 64), "misaligned"),
    "rows": _quantize("staged", (40, 200), "stochastic rht", archs=ARCHS[:2]),
    "rows, unbiased": _quantize("staged", (2, 30, 72), "static_6 stochastic_unbiased"),
    "columns": _quantize("staged", (72, 136), "transpose", archs=ARCHS[:2]),
    "pair": _pair("staged", (136, 152), archs=ARCHS),
    "pair, rotated dice": _pair(
        "staged", (40, 88), options={"scale_rule": "static_6", **DICE, **RHT}, amax_col=1.25,
        archs=ARCHS[:2],
    ),
    "pair, unbiased": _pair("staged", (2, 24, 72), options=UNBIASED),
    "tiles, pair": _pair("tiles_staged", (150, 136), options={"block": "2d"}, archs=ARCHS),
    "tiles, pair, two amaxes": _pair(
        "tiles_staged", (40, 88), options={"scale_rule": "static_6", "block": "2d"}, amax_col=1.25
    ),
    "tiles, rows": _quantize(
        "tiles_staged", (33, 72), "static_6 2d", view="slice", archs=ARCHS[:2]
    ),
    "tiles, columns": _quantize("tiles_staged", (80, 40), "2d transpose", archs=ARCHS[:2]),
    "tiles, ragged": _quantize("tiles", (37, 83), "2d", num_sms=1, archs=ARCHS),
    "tiles, rotated dice": _quantize("tiles", (3, 40, 21), "2d mae stochastic rht", dtype=F16),
    "tiles, realized": _quantize(
        "tiles", (40, 64), "2d abs_max stochastic_realized", dtype=F32, archs=ARCHS[:2]
    ),
    "tiles, unbiased": _quantize("tiles", (2, 17, 72), "2d static_6 stochastic_unbiased"),
    "tiles, static_4": _quantize(
        "tiles", (19, 70), "2d static_4", view="every second", archs=ARCHS[:2]
    ),
    "blocks": _quantize("blocks", (33, 200), "mse", dtype=F16, num_sms=1, archs=ARCHS),
    "blocks, unbiased": _quantize("blocks", (150, 72), "abs_max stochastic_unbiased"),
    "blocks, mxfp4, rotated columns": _quantize(
        "blocks", (75, 140), "mxfp4 static_6 stochastic rht transpose", dtype=F16,
        archs=ARCHS[:2],
    ),
    "blocks, realized": _quantize(
        "blocks", (2, 33, 72), "mae stochastic_realized", dtype=F32, archs=ARCHS[:2]
    ),
    "blocks, mxfp4": _quantize(
        "blocks", (19, 70), "mxfp4 static_4", view="every second", archs=ARCHS[:2]
    ),
    "amax": Case(kernel="amax_rotated", op="amax", shape=(150, 136), archs=ARCHS),
    "amax, columns": Case(
        kernel="amax_rotated", op="amax", shape=(75, 140), options={"transpose": True}, dtype=F16,
        archs=ARCHS[:2],
    ),
    "amax, batch": Case(
        kernel="amax_rotated", op="amax", shape=(2, 17, 71), dtype=F32, num_sms=1
    ),
    "dequantize": _dequantize((40, 88), "nvfp4", torch.bfloat16),
    "dequantize, scaled": _dequantize((37, 101), "nvfp4", F32, qs=1536.0),
    "dequantize, mxfp4": _dequantize((130, 70), "mxfp4", F16, qs=1536.0),
    "blocks, hardware dice": _quantize(
        "blocks", (33, 72), f"{HARDWARE} transpose", archs=ARCHS[1:2]
    ),
    "tiles, hardware dice": _quantize(
        "tiles", (37, 83), f"2d static_6 {HARDWARE}", archs=ARCHS[1:2]
    ),
}  # fmt: skip


# What a GPU makes of them -------------------------------------------------------------------------

RECORD = Path(__file__).with_name("vectors") / "own_kernels.json"


def digest(tensors: Iterable[Any]) -> str:
    """Of shapes, dtypes and bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            found.update(f"{list(tensor.shape)} {tensor.dtype}".encode())
            found.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def record() -> dict[str, Any]:
    """What the operators give on the GPU that is here."""
    device = torch.device("cuda", 0)
    cases = {}
    for name, case in CASES.items():
        if not has(target.arch(device), case.options.values()):
            continue
        given = [a.to(device) if isinstance(a, Tensor) else a for a in case.inputs()]
        operator, keywords = OPS[case.op][0], case.keywords()
        assert operator.supports(*given, **keywords), f"{name}: no kernel serves it"
        result = getattr(torch.ops.fos, case.op)(*given, **keywords)
        outputs = result if isinstance(result, tuple) else (result,)
        cases[name] = {"inputs": digest(case.inputs()), "outputs": digest(outputs)}
    return {
        "device": torch.cuda.get_device_name(device),
        "arch": target.arch(device),
        "torch": torch.__version__,
        "cutlass_dsl": importlib.metadata.version("nvidia-cutlass-dsl"),
        "cases": cases,
    }


if __name__ == "__main__":
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(record(), indent=2) + "\n")
