"""`cvt.rs` of the compiled kernels gives the bits of the reference and of the scalar oracle.

Which random bits the instruction takes for which element is the emulator's `_RS_BITS`, the oracle's
`HARDWARE_BITS` and `philox.hardware_dice`: three transcriptions of one probe, written apart. That a
Blackwell agrees with the probe is not shown here.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is installed on Linux only")

import vectors

from cute_cases import SPECIAL, padded_storage
from fos_compile.kernels import QUANTIZE
from tests.emulator import formats
from tests.emulator.own_kernels import Device, host

ARCHS = ("sm_100a", "sm_103a")
HARDWARE = "stochastic_hardware"
INSTRUCTION = "cvt.rs.satfinite.e2m1x4.f32"
SEED, STREAM = -(2**40) - 77, 2**31 + 9


def options(**changed):
    given = {"rounding": HARDWARE, "seed": SEED, "stream": STREAM, **changed}
    return vectors.oracle.Options(**given)


CASES = {
    "rows": ((9, 72), options()),
    "columns rotated": ((40, 21), options(scale_rule="mae", rht=True, transpose=True)),
    "float32": ((5, 130), options(dtype="float32", scale_rule="abs_max")),
    "float32 columns": ((37, 9), options(dtype="float32", scale_rule="static_4", transpose=True)),
    "float16 rotated": ((3, 64), options(dtype="float16", scale_rule="static_6", rht=True)),
    "batch": ((2, 5, 40), options()),
    "tiles": ((19, 40), options(block="2d")),
    "tiles of columns rotated": (
        (33, 18),
        options(dtype="float32", block="2d", scale_rule="static_6", rht=True, transpose=True),
    ),
    "batch of tiles": ((2, 17, 24), options(dtype="float16", block="2d", scale_rule="mae")),
    "mxfp4": ((9, 140), options(format="mxfp4", scale_rule="static_6")),
    "mxfp4 rotated": (
        (2, 33, 10),
        options(dtype="float16", format="mxfp4", scale_rule="static_4", rht=True, transpose=True),
    ),
}


def numbers(shape, opt):
    """Of many magnitudes, with zeros of both signs and some too small for any dice."""
    random = np.random.RandomState(sum(shape))
    x = random.standard_normal(shape) * 2.0 ** random.randint(-6, 7, (*shape[:-1], 1))
    x[random.random_sample(shape) < 0.1] *= -0.0
    x[..., 0, ::3] *= 1e-6
    return torch.from_numpy(vectors.oracle.round_to(x.astype(np.float32), opt.dtype)).to(
        getattr(torch, opt.dtype)
    )


def run(device, x, amax, opt):
    """Of the operator as a GPU would serve it."""
    seed, keywords = vectors.seed_tensor(opt), vectors.quantize_options(opt)
    found = device.call("quantize", x, amax, seed, **keywords)
    assert [key.name for key, _ in device.runs] == [
        "quantize_tiles" if opt.block == "2d" else "quantize_blocks"
    ]
    return found


def equal(actual, expected):
    return all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", CASES)
def test_bits_of_the_reference_and_of_the_oracle(name, arch):
    shape, opt = CASES[name]
    x = numbers(shape, opt)
    x = padded_storage(x, 1, 2) if name == "float32" else x
    amax = torch.ops.fos.amax(x, opt.rht, opt.transpose)
    device = Device(arch)
    found = run(device, x, amax, opt)
    seed, keywords = vectors.seed_tensor(opt), vectors.quantize_options(opt)
    assert equal(found, QUANTIZE.reference(x, amax, seed, **keywords))
    assert equal(found, vectors.oracle_quantize(x, amax, opt))
    key, _ = device.runs[0]
    converts = [line for line in host(key, arch).module.lines if "cvt.r" in line]
    assert any(INSTRUCTION in line for line in converts)
    assert not any("e2m1x2" in line for line in converts)


@pytest.mark.parametrize("block", ["1d", "2d"])
@pytest.mark.parametrize("special", SPECIAL)
def test_numbers_that_need_care(special, block):
    opt = options(dtype="float32", block=block)
    change, amax = SPECIAL[special]
    x = change(numbers((18, 72), opt))
    amax = torch.ops.fos.amax(x) if amax is None else torch.tensor(amax)
    found = run(Device("sm_100a"), x, amax, opt)
    keywords = vectors.quantize_options(opt)
    assert equal(found, QUANTIZE.reference(x, amax, vectors.seed_tensor(opt), **keywords))


@pytest.mark.parametrize(("low", "step"), [(0.0, 0.5), (1.5, 0.5), (2.0, 1.0), (4.0, 2.0)])
def test_the_instruction_turns_where_the_dice_say(low, step):
    """A static amax of 6 and a six in each block make y = |x|."""
    opt = options(dtype="float32", scale_rule="static_6")
    u = vectors.dice(8, 64, SEED, STREAM, HARDWARE)
    edge = (low + step * (1 - u)).astype(np.float32)
    free = np.ones(edge.shape, bool)
    free[:, ::16] = False
    for x, rounded in ((edge, low + step), (np.nextafter(edge, np.float32(0)), low)):
        given = torch.from_numpy(np.where(free, x, np.float32(6)))
        values, scales = run(Device("sm_100a"), given, torch.tensor(6.0), opt)
        assert (vectors.row_major(scales, 8, 4) == 0x7E).all()
        assert (vectors.E2M1[vectors.unpack(values)][free] == rounded).all()


def test_the_oracle_has_the_bits_of_the_emulator():
    assert formats._RS_BITS["e2m1"] == tuple(map(list, vectors.oracle.HARDWARE_BITS[::-1]))


CONVERSION = re.compile(rf"({re.escape(INSTRUCTION)}\s+\S+, {{)([^}}]*)(}},)")


def operands_reversed(ptx):
    return CONVERSION.sub(lambda m: m[1] + ", ".join(m[2].split(", ")[::-1]) + m[3], ptx)


def inner_operands_swapped(ptx):
    def swapped(match):
        a, b, e, f = match[2].split(", ")
        return match[1] + ", ".join((a, e, b, f)) + match[3]

    return CONVERSION.sub(swapped, ptx)


@pytest.mark.parametrize("block", ["1d", "2d"])
@pytest.mark.parametrize("edit", [operands_reversed, inner_operands_swapped])
def test_another_order_of_operands_is_seen(edit, block):
    opt = dataclasses.replace(options(), block=block)
    x = numbers((5, 64), opt)
    amax = torch.ops.fos.amax(x)
    wrong = run(Device("sm_100a", edit=edit), x, amax, opt)
    right = run(Device("sm_100a"), x, amax, opt)
    assert torch.equal(wrong[1], right[1]) and not torch.equal(wrong[0], right[0])
