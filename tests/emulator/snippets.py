"""For tests: PTX by hand without host code, and host code that is linked once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.emulator.host import Host, load
from tests.emulator.launch import Launch
from tests.emulator.machine.global_memory import GlobalMemory, Range
from tests.emulator.machine.program import Program, Settings
from tests.emulator.ptx.parser import parse

_HEAD = ".version 8.8\n.target {}\n.address_size 64\n"
_REGISTERS = (
    ".reg .pred p<64>; .reg .b8 b<64>; .reg .b16 h<64>; .reg .b32 r<256>; .reg .b64 rd<64>;"
)
_CTA = 256


@functools.cache
def host(compile_: Callable[..., Any], *options: Any) -> Host:
    """A kernel of kernels/, linked once for all tests of a process."""
    return load(compile_(*options))


def module(body: str, params: int = 0, target: str = "sm_100a", top: str = "") -> str:
    """A file whose entry `snippet` has `body`, with addresses in g0, g1, ...

    Registers are p0, ... (predicates), b0, ... (8 bits), h0, ... (16), r0, ... (32), rd0, ... (64).
    `top` stands before the entry.
    """
    declared = ", ".join(f".param .u64 a{i}" for i in range(params))
    loads = "\n".join(f".reg .b64 g{i}; ld.param.u64 g{i}, [a{i}];" for i in range(params))
    entry = f".visible .entry snippet({declared})\n{{\n{_REGISTERS}\n{loads}\n{body}\nret;\n}}\n"
    return f"{_HEAD.format(target)}{top}\n{entry}"


def execute(
    body: str,
    *arrays: np.ndarray,
    outputs: int = 0,
    threads: int = 32,
    ctas: int = 1,
    cluster: int = 1,
    shared: int = 0,
    target: str = "sm_100a",
    top: str = "",
    settings: Settings | None = None,
) -> list[Range]:
    """Run a body with the addresses of contiguous arrays in g0, g1, ...; the arrays' memory.

    The last `outputs` arrays start undefined.
    """
    space, ranges = GlobalMemory(), []
    for index, array in enumerate(arrays):
        output = index >= len(arrays) - outputs
        owned = np.ones(array.nbytes, bool)
        ranges.append(space.add(f"g{index}", array.ctypes.data, owned, output=output))
    params = tuple(array.ctypes.data.to_bytes(8, "little") for array in arrays)
    sizes = (ctas, 1, 1), (threads, 1, 1), (cluster, 1, 1)
    launch = Launch("snippet", *sizes, shared, params)
    program = Program(parse(module(body, len(arrays), target, top)), launch, space)
    program.run(settings or Settings())
    return ranges


def by_lane(
    code: str, inputs: Sequence[np.ndarray], results: Sequence[Any], **options: Any
) -> list[np.ndarray]:
    """Each lane's results of `code`, which computes d0, d1, ... from a lane's inputs x0, x1, ...

    All are [n] arrays of unsigned integers or bool, which are predicates; `results` are dtypes.
    """
    values, _ = by_lane_defined(code, inputs, results, **options)
    return values


def by_lane_defined(
    code: str, inputs: Sequence[np.ndarray], results: Sequence[Any], **options: Any
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """As `by_lane`, and which elements of the results are defined."""
    count = len(inputs[0])
    threads = min(-(-count // 32) * 32, _CTA)
    ctas = -(-count // threads)
    total = threads * ctas
    arrays = [_padded(x, total) for x in inputs]
    outs = [np.zeros(total, np.uint8 if t is bool else t) for t in results]
    lines = [
        f"mov.u32 r255, %tid.x; mov.u32 r254, %ctaid.x; mad.lo.u32 r255, r254, {threads}, r255;"
    ]
    lines += [_load(i, x.dtype) for i, x in enumerate(inputs)]
    lines += [f".reg .{_kind(t)} d{i};" for i, t in enumerate(results)]
    lines.append(code)
    lines += [_store(i, i + len(inputs), t) for i, t in enumerate(results)]
    ranges = execute(
        "\n".join(lines), *arrays, *outs, outputs=len(outs), threads=threads, ctas=ctas, **options
    )[len(inputs) :]
    known = [r.defined.reshape(total, -1).all(1)[:count] for r in ranges]
    values = [
        out[:count].astype(bool) if t is bool else out[:count]
        for out, t in zip(outs, results, strict=True)
    ]
    return values, known


def _padded(x: np.ndarray, total: int) -> np.ndarray:
    x = x.astype(np.uint8) if x.dtype == bool else x
    return np.ascontiguousarray(np.resize(x, total))


def _kind(dtype: Any) -> str:
    return "pred" if np.dtype(dtype) == bool else f"b{8 * np.dtype(dtype).itemsize}"


def _load(index: int, dtype: np.dtype) -> str:
    size = dtype.itemsize
    at = f"mul.wide.u32 rd63, r255, {size}; add.s64 rd63, g{index}, rd63;"
    declared = f".reg .{_kind(dtype)} x{index};"
    if dtype.kind == "b":
        return f"{declared} {at} ld.global.u8 h63, [rd63]; setp.ne.u16 x{index}, h63, 0;"
    return f"{declared} {at} ld.global.b{8 * size} x{index}, [rd63];"


def _store(index: int, at: int, dtype: Any) -> str:
    size = np.dtype(dtype).itemsize
    place = f"mul.wide.u32 rd63, r255, {size}; add.s64 rd63, g{at}, rd63;"
    if np.dtype(dtype) == bool:
        return f"selp.u16 h63, 1, 0, d{index}; {place} st.global.u8 [rd63], h63;"
    return f"{place} st.global.b{8 * size} [rd63], d{index};"
