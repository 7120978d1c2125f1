"""The operators against the known answers, and the known answers against their oracle."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load
from vectors import (
    Case,
    dice,
    goldens,
    make,
    oracle,
    philox_answers,
    read,
    run_quantize,
    vectors,
)

import fos_compile.kernels  # noqa: F401, registers the operators

pytestmark = pytest.mark.usefixtures("implementation")


def _assert_codes(case: Case) -> None:
    values, scales = run_quantize(case.x, case.amax, case.options)
    assert torch.equal(scales, case.scales)
    assert torch.equal(values, case.values)


def test_there_are_96_goldens():
    assert len(goldens()) == 96


@pytest.mark.parametrize("name", goldens())
def test_golden(name):
    case = goldens()[name]
    if case.options.format == "nvfp4":
        amax = torch.ops.fos.amax(case.x, case.options.rht, case.options.transpose)
        assert torch.equal(amax, case.amax)
    _assert_codes(case)


@pytest.mark.parametrize("name", vectors())
def test_vector_codes(name):
    _assert_codes(vectors()[name])


@pytest.mark.parametrize(
    "name",
    [n for n, c in vectors().items() if not c.static_amax and c.options.format == "nvfp4"],
)
def test_vector_amax(name):
    case = vectors()[name]
    amax = torch.ops.fos.amax(case.x, case.options.rht, case.options.transpose)
    assert amax.shape == () and amax.dtype == torch.float32
    np.testing.assert_array_equal(amax, case.amax)


@pytest.mark.parametrize("name", vectors())
def test_vector_dequantized(name):
    case = vectors()[name]
    out = torch.ops.fos.dequantize(
        case.values,
        case.scales,
        case.amax,
        *case.dequantized.shape[-2:],
        format=case.options.format,
        qs=float(case.options.qs),
        dtype=torch.float32,
    )
    np.testing.assert_array_equal(out.numpy(), case.dequantized.numpy())


def test_committed_vectors_are_what_the_oracle_computes():
    with np.errstate(all="ignore"):
        data = make.build()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    stored, metadata = read("vectors.safetensors")
    assert json.loads(header["__metadata__"]["about"]) == metadata["about"]
    rebuilt = load(data)
    assert rebuilt.keys() == stored.keys()
    for key, tensor in rebuilt.items():
        assert tensor.dtype == stored[key].dtype, key
        np.testing.assert_array_equal(tensor.float(), stored[key].float(), err_msg=key)


def test_oracle_reproduces_goldens_sample():
    for name in list(goldens())[::8]:
        case = goldens()[name]
        values, scales = oracle.quantize(
            case.x.float().numpy(), np.float32(case.amax), case.options
        )
        np.testing.assert_array_equal(values, case.values.numpy())
        np.testing.assert_array_equal(oracle.block_layout(scales), case.scales.numpy())


@pytest.mark.parametrize("counter,key,words", philox_answers())
def test_philox_known_answers(counter, key, words):
    assert oracle.philox(tuple(counter), tuple(key)) == words


def test_all_dice_at_once_are_the_oracles():
    for seed, stream in ((0, 0), (-3, 7), (2**40 + 1, 12)):
        for rounding in ("stochastic", "stochastic_hardware"):
            options = oracle.Options(rounding=rounding, seed=seed, stream=stream)
            scalar = [list(map(float, oracle.group_dice(g, options))) for g in range(12)]
            np.testing.assert_array_equal(
                dice(3, 64, seed, stream, rounding), np.array(scalar).reshape(3, 64)
            )


@pytest.mark.parametrize("bit", range(32))
def test_every_bit_of_a_word_serves_two_elements(bit):
    """Their highest bits are those at 23, 0, 31 and 8; the first two read two bytes, the others
    the other two, from either end."""
    offsets = [oracle.hardware_offset(1 << bit, i) for i in range(4)]
    near, far = sorted(offsets[:2]), sorted(offsets[2:])
    assert sorted((any(near), any(far))) == [False, True]
    low, high = near if any(near) else far
    assert low * high == Fraction(1, 2**17)
    first = {23: 0, 0: 1, 31: 2, 8: 3}.get(bit)
    assert [i for i in range(4) if offsets[i] == Fraction(1, 2)] == [first] * (first is not None)
