"""Every kernel compiles for every architecture, without a GPU, and fits in its registers."""

from __future__ import annotations

import functools
import re
from itertools import product
from pathlib import Path

import pytest
import torch

import cubins
from cute_cases import covering, valid

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is installed on Linux only")

from fos_compile.kernels import formats
from fos_compile.kernels.cute import (
    build,
    conversions,
    host_quantize_filtered,
    host_quantize_staged,
    host_quantize_tiles_staged,
)
from fos_compile.kernels.cute.cache import KernelCache
from fos_compile.kernels.cute.tables import NAMES, TABLES, lacks

ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a")
SPILLED = {"sm_80": 24, "sm_89": 24, "sm_120a": 8}
"""Bytes that may be in memory where nobody chose the number of registers: a few numbers, stored and
loaded once. None elsewhere."""


def keys_of(op, dtypes, options):
    """Those of every kernel that serves these options."""
    for dtype, chosen in product(dtypes, options):
        for entry in TABLES[op]:
            if not entry.refuses(NAMES[op], dtype, chosen):
                yield entry.key(dtype, chosen)


def every_key():
    """The full product, each once."""
    quantizers = [tuple(options.values()) for options in valid()]
    decoders = list(product(formats.FORMATS, (False, True), formats.DTYPES))
    found = [
        *keys_of("quantize", formats.DTYPES, quantizers),
        *keys_of("amax", formats.DTYPES, [(True,)]),
        *keys_of("dequantize", (torch.uint8,), decoders),
    ]
    for entry in TABLES["quantize_pair"]:
        found += [entry.key(torch.bfloat16, each) for each in product(*entry.options.values())]
    return list(dict.fromkeys(found))


def label(key):
    return "-".join([key.name, key.dtype, *(str(value) for _, value in key.options)])


EVERY = {label(key): key for key in every_key()}


def representative():
    """A few with every choice of every option of every kernel."""
    for name in dict.fromkeys(key.name for key in EVERY.values()):
        own = [found for found, key in EVERY.items() if key.name == name]
        yield from covering(own, lambda found: choices(EVERY[found]), 1)


def choices(key):
    """What is chosen in a key."""
    return [("dtype of x", key.dtype), *key.options]


FEW = list(representative())


def on_every_arch(names):
    """Kernels with the architectures that have the instructions for their options."""
    for name, arch in product(names, ARCHS):
        if not lacks(tuple(dict(EVERY[name].options).values()), arch):
            yield pytest.param(name, arch, id=f"{name}-{arch}")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """(PTX, cubin) of a kernel for an architecture, compiled when first asked for."""

    @functools.lru_cache(maxsize=256)
    def made(name, arch):
        folder = tmp_path_factory.mktemp("dump")
        extra = f"--keep-ptx --keep-cubin --dump-dir {folder}"
        compiled = build.compiled(EVERY[name], arch, extra)
        return compiled.__ptx__, compiled.__cubin__

    return made


def every(options, name):
    """All values of an option: a pair has two of some."""
    return {value for full, value in options.items() if full.partition("_")[0] == name}


def expected_instructions(key, arch):
    """Parts of the PTX that show the hardware at work, and those that must not be there."""
    options = dict(key.options)
    yes, no = set(), {".local", "div.full", "div.approx", "sqrt.", "tex."}
    quantizes = key.name.startswith("quantize")
    encodes = quantizes and options["format"] == "nvfp4"
    decodes = key.name == "dequantize_blocks" and options["format"] == "nvfp4"
    with conversions.target(arch):
        fp8, e2m1, f32x2 = (
            has() for has in (conversions.has_fp8, conversions.has_e2m1, conversions.has_f32x2)
        )
    (yes if encodes and fp8 else no).add("cvt.rn.satfinite.e4m3x2.f32")
    (yes if (encodes or decodes) and fp8 else no).add("cvt.rn.f16x2.e4m3x2")
    roundings = every(options, "rounding") if quantizes else set()
    (yes if roundings - {"nearest"} else no).add("mul.hi.u32")  # Philox
    staged = key.name.endswith("_staged")
    if options.get("vector"):
        yes.add("cp.async.cg.shared.global" if staged else "ld.global.L1::evict_first.v4.b32")
    rotates = any(every(options, "rht")) or key.name == "amax_rotated"
    if rotates:
        rounded = {"bfloat16": "cvt.rn.bf16.f32", "float16": "cvt.rn.f16.f32"}
        yes |= {rounded[key.dtype]} if key.dtype in rounded else set()
        if staged or key.name == "quantize_filtered":  # rounds in pairs
            yes = yes - set(rounded.values()) | {"cvt.rn.bf16x2.f32"}
    if key.name == "amax_rotated":
        yes |= {"redux.sync.max.u32", "red.global.max.u32"}
    if key.name.startswith("quantize_tiles"):
        yes.add("shfl.sync.bfly.b32")
    if key.name == "quantize_tiles_staged" and options.get("by_column", True):
        older = arch in ("sm_80", "sm_89")
        (no if older else yes).add("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16")
    if key.name == "dequantize_blocks":
        (yes if options["scaled"] else no).add("div.rn.f32")
        packed = {"bfloat16": "cvt.rn.bf16x2.f32", "float16": "cvt.rn.f16x2.f32"}
        yes |= {packed[options["dtype"]]} if options["dtype"] in packed else set()
        yes.add("st.global.v4.b32")
    (yes if e2m1 and "nearest" in roundings else no).add("cvt.rn.satfinite.e2m1x2.f32")
    by_hardware = "stochastic_hardware" in roundings
    (yes if by_hardware else no).add("cvt.rs.satfinite.e2m1x4.f32")
    (no if by_hardware else set()).add("cvt.rn.f32.u32")  # of bytes to offsets
    if not f32x2:
        no.add(".f32x2")
    elif rotates and key.name != "quantize_tiles":  # whose columns lie across threads
        yes |= {"add.rn.f32x2", "sub.rn.f32x2", "mul.rn.f32x2"}
    return yes, no


def check(name, arch, artifacts):
    key = EVERY[name]
    ptx, cubin = artifacts(name, arch)
    assert re.search(rf"^\.target {arch}\b", ptx, re.MULTILINE)
    yes, no = expected_instructions(key, arch)
    assert not [part for part in yes if part not in ptx]
    assert not [part for part in no if part in ptx]
    threads = int(re.search(r"^\.reqntid (\d+)", ptx, re.MULTILINE)[1])
    ctas = re.search(r"^\.minnctapersm (\d+)", ptx, re.MULTILINE)
    vector = bool(dict(key.options).get("vector"))
    promised = {
        "quantize_filtered": host_quantize_filtered.ctas_per_sm(vector),
        "quantize_staged": host_quantize_staged.CTAS_PER_SM,
        "quantize_tiles_staged": host_quantize_tiles_staged.CTAS_PER_SM,
    }.get(key.name, 1)
    assert (int(ctas[1]) if ctas else 1) == promised
    found = cubins.attributes(cubin)
    frames = found[cubins.FRAME] + found[cubins.STACK]
    assert max(frames) <= SPILLED.get(arch, 0), "a frame is a spill"
    # Registers are handed out to warps in units of 8 a thread.
    assert 16 <= max(found[cubins.REGISTERS]) <= min(255, 65536 // (threads * promised) // 8 * 8)


@pytest.mark.parametrize("name,arch", on_every_arch(FEW))
def test_fits_in_its_registers_and_converts_in_hardware(artifacts, name, arch):
    check(name, arch, artifacts)


@pytest.mark.slow
@pytest.mark.parametrize("name,arch", on_every_arch(EVERY))
def test_every_option_fits_in_its_registers(artifacts, name, arch):
    check(name, arch, artifacts)


def key_of_rows(rule):
    options = ("nvfp4", rule, "nearest", "1d", False, False)
    return TABLES["quantize"][0].key(torch.bfloat16, options)


def test_cached_without_a_driver(tmp_path):
    """The whole way: compile, keep, and load again what was kept."""
    compiled = []

    def compile(key, arch):
        compiled.append(arch)
        return build.object_file(key, arch)

    def new():
        return KernelCache(
            compile=compile, load=build.load, folder=lambda: tmp_path, environment=lambda: ""
        )

    key = key_of_rows("static_6")
    new().get(key, "sm_90a")
    kernel = new().get(key, "sm_90a")
    assert compiled == ["sm_90a"]
    assert [Path(p).name.startswith("quantize_filtered-sm_90a-") for p in tmp_path.iterdir()] == [
        True
    ]
    # Not a device tensor: checked by the code that was loaded, before any call of the driver.
    x = torch.empty(8, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="device_type=cuda"):
        TABLES["quantize"][0].launch(kernel, 132, key, x, torch.ones(()), None, 0)


LAUNCHES = {
    "quantize": lambda x: (x, torch.ones(()), torch.ones(1, dtype=torch.int64), 3),
    "amax": lambda x: (x,),
    "dequantize": lambda x: (x, torch.zeros(512), torch.ones(()), 60, 1.0, torch.float16),
}
OPTIONS = {
    "quantize": ("mxfp4", "static_4", "stochastic", "1d", True, False),
    "amax": (True,),
    "dequantize": ("nvfp4", True, torch.float16),
}


@pytest.mark.parametrize("op", LAUNCHES)
@pytest.mark.parametrize("shape", [(8, 64), (2, 8, 64)])
def test_host_sides_call_what_they_compile(op, shape):
    """The number, order and types of arguments: the compiled code looks at x last of all."""
    dtype = torch.uint8 if op == "dequantize" else torch.float16
    x = torch.empty(shape, dtype=dtype)
    for entry in TABLES[op]:
        if entry.refuses(NAMES[op], dtype, OPTIONS[op]) or entry.layout(x):
            continue
        key = entry.key(dtype, OPTIONS[op])
        kernel = build.load(key, build.object_file(key, "sm_90a"))
        with pytest.raises(ValueError, match="device_type=cuda"):
            entry.launch(kernel, 132, key, *LAUNCHES[op](x))


def test_an_unknown_architecture_is_an_error():
    with pytest.raises(Exception, match="sm_999a"):
        build.object_file(key_of_rows("static_6"), "sm_999a")
