"""What the tables promise: a kernel for every option, keys that hold nothing of a call."""

from __future__ import annotations

import importlib
import inspect
import itertools

import pytest
import torch

from cute_cases import LAYOUTS, combinations, is_valid, matrix, valid
from fos_compile.kernels import formats
from fos_compile.kernels.cute.tables import DEFAULTS, NAMES, TABLES, lacks

ENTRIES = [(op, entry) for op, table in TABLES.items() for entry in table]
IDS = [f"{op}-{i}-{entry.name}" for i, (op, entry) in enumerate(ENTRIES)]


def fitting(op, dtype, options):
    return [entry for entry in TABLES[op] if not entry.refuses(NAMES[op], dtype, options)]


def quantizers(options, dtype=torch.bfloat16):
    return fitting("quantize", dtype, tuple(options.values()))


@pytest.mark.parametrize("op,entry", ENTRIES, ids=IDS)
def test_entries_are_complete(op, entry):
    assert tuple(entry.options) == NAMES[op] and all(entry.options.values())
    host = importlib.import_module(f"fos_compile.kernels.cute.host_{entry.name}")
    assert entry.prepare is host.prepare and callable(host.signature)
    taken = list(inspect.signature(entry.prepare).parameters)
    assert len(taken) == 4 and taken[:3] == ["kernel", "num_sms", "key"]


@pytest.mark.parametrize("op", TABLES)
def test_defaults_name_every_option(op):
    assert set(NAMES[op]) <= set(DEFAULTS[op])


@pytest.mark.parametrize("dtype", formats.DTYPES, ids=str)
def test_the_last_kernel_for_valid_options_reads_anything(dtype):
    for options in valid():
        entries = quantizers(options, dtype)
        assert entries, options
        assert not any(entries[-1].layout(matrix(layout, dtype)) for layout in LAYOUTS)
    for rotated in (TABLES["amax"], TABLES["dequantize"]):
        assert not any(rotated[-1].layout(matrix(layout, dtype)) for layout in LAYOUTS)


def test_invalid_options_have_no_kernel():
    invalid = [options for options in combinations() if not is_valid(options)]
    assert len(invalid) + len(valid()) == 400 and len(valid()) == 232
    assert not any(quantizers(options) for options in invalid)


def test_no_other_dtype_is_served():
    options = dict.fromkeys(NAMES["quantize"])
    assert not quantizers(options | valid()[0], torch.float64)
    for op, entry in ENTRIES:
        reason = entry.refuses(NAMES[op], torch.complex64, ())
        assert reason.startswith("x must be ") and reason.endswith("got torch.complex64")


def test_the_fast_kernel_comes_first():
    names = {
        rule: [entry.name for entry in quantizers(valid()[0] | {"scale_rule": rule})]
        for rule in formats.SCALE_RULES
    }
    for rule, found in names.items():
        assert (found[0] == "quantize_filtered") is (rule in ("mse", "static_6"))
        assert found[-3:] == ["quantize_blocks"] * 3


def test_a_refusal_names_the_option():
    rows = TABLES["quantize"][0]
    options = valid()[0] | {"rounding": "stochastic"}
    reason = rows.refuses(NAMES["quantize"], torch.bfloat16, tuple(options.values()))
    assert reason == "rounding must be nearest, got stochastic"


def test_only_two_architectures_round_stochastically():
    hardware = ("nvfp4", "mse", "stochastic_hardware")
    for arch in ("sm_80", "sm_90a", "sm_120a"):
        assert lacks(hardware, arch) == (
            "rounding stochastic_hardware is cvt.rs, which exists on sm_100a and sm_103a only, "
            f"got {arch}"
        )
    assert not lacks(hardware, "sm_100a") and not lacks(hardware, "sm_103a")
    assert not lacks(tuple(valid()[0].values()), "sm_80")


def all_keys():
    for dtype in formats.DTYPES:
        for options in valid():
            for entry in quantizers(options, dtype):
                yield entry.key(dtype, tuple(options.values()))
        for entry in TABLES["amax"]:
            yield entry.key(dtype, (True,))
        for scaled in (False, True):
            for format in formats.FORMATS:
                options = (format, scaled, dtype)
                for entry in fitting("dequantize", torch.uint8, options):
                    yield entry.key(torch.uint8, options)
    for entry in TABLES["quantize_pair"]:
        for chosen in itertools.product(*entry.options.values()):
            yield entry.key(torch.bfloat16, chosen)


def test_keys_hold_static_options_only():
    """No number of any size, and not `transpose`: a transposed matrix is a view."""
    for key in all_keys():
        names = [name for name, _ in key.options]
        assert len(set(names)) == len(names) and "transpose" not in names
        assert all(type(value) in (str, bool) for _, value in key.options)
        assert key.dtype in ("bfloat16", "float16", "float32", "uint8")
        assert key.alignment in (1, 16)


def test_transpose_is_not_another_kernel():
    for options in valid():
        both = [
            {e.key(torch.bfloat16, tuple(o.values())) for e in quantizers(o)}
            for o in (options | {"transpose": False}, options | {"transpose": True})
        ]
        assert both[0] == both[1]


def test_every_key_compiles_one_kernel():
    """By hand: a key more is a second more for somebody."""
    count = {}
    for key in set(all_keys()):
        count[key.name] = count.get(key.name, 0) + 1
    assert count == {
        "quantize_filtered": 2 * 2 * 3,
        "quantize_staged": 2 * 2 * (2 + 3) + 2 * 2 * 2 * 3 * 3,
        "quantize_tiles": 5 * 5 * 2 * 3,
        "quantize_tiles_staged": 2 * 2 + 2,
        "quantize_blocks": (5 * 5 + 2 * 4) * 2 * 3 * 3,
        "amax_rotated": 3 * 3,
        "dequantize_blocks": 2 * 2 * 3,
    }
