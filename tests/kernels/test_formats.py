from __future__ import annotations

import numpy as np
import pytest
import torch
from vectors import E2M1, E4M3, E8M0, nearest_even, oracle, row_major, unpack

from fos_compile.kernels import formats

pytestmark = pytest.mark.usefixtures("implementation")

FINITE = np.arange(0x7F80, dtype=np.int32)
"""Every bfloat16 pattern of a finite magnitude."""


def _bf16(patterns: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(patterns.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def _static(x: torch.Tensor, amax: float, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes [R, P] and row-major scale bytes under a static amax."""
    values, scales = torch.ops.fos.quantize(x, torch.tensor(amax), scale_rule=rule)
    codes = unpack(values)
    return codes, row_major(scales, x.shape[0], codes.shape[1] // 16)


@pytest.mark.parametrize("sign", [0, 0x8000], ids=["positive", "negative"])
def test_every_finite_bfloat16_rounds_to_nearest_even_e2m1(sign):
    # A six in each block and a static amax of 6 give E = 448 and scale 448, so that y = |x|.
    pad = -len(FINITE) % 60
    patterns = np.pad(FINITE, (0, pad)) | sign
    x = torch.full((len(patterns) // 60, 64), 6.0, dtype=torch.bfloat16)
    x.view(-1, 4, 16)[..., :15] = _bf16(patterns).view(-1, 4, 15)
    codes, scales = _static(x, 6.0, "static_6")
    magnitude = x.double().abs().numpy()
    expected = nearest_even(magnitude, oracle.E2M1) | np.where(x.double().numpy() < 0, 8, 0)
    assert (scales == 0x7E).all()
    np.testing.assert_array_equal(codes, expected)
    assert set(np.unique(expected)) == (set(range(9, 16)) | {0, 7, 8} if sign else set(range(8)))


def test_every_non_finite_bfloat16_empties_its_block_alone():
    patterns = np.array([p for p in range(0x10000) if p & 0x7F80 == 0x7F80])
    x = torch.ones(len(patterns), 64, dtype=torch.bfloat16)
    x[:, 21] = _bf16(patterns)
    codes, scales = _static(x, 6.0, "static_6")
    assert (scales[:, 1] == 0x7F).all() and (codes[:, 16:32] == 0).all()
    assert (scales[:, [0, 2, 3]] == scales[0, 0]).all() and scales[0, 0] not in (0, 0x7F)
    assert (codes[:, :16] == codes[0, 0]).all() and codes[0, 0] != 0


def test_every_finite_bfloat16_rounds_to_nearest_even_e4m3():
    # amax 1792 gives E = 1 under static_4, so the scale is e4m3(blockmax / 4): exact in float32.
    x = torch.zeros(len(FINITE) // 4, 4, 16, dtype=torch.bfloat16)
    x[:, :, 5] = _bf16(FINITE).view(-1, 4)
    x[:, :, 9] = -x[:, :, 5]
    codes, scales = _static(x.view(-1, 64), 1792.0, "static_4")
    expected = nearest_even(x[:, :, 5].double().numpy() / 4, oracle.E4M3)
    np.testing.assert_array_equal(scales, expected)
    assert set(np.unique(expected)) == set(range(127))
    assert (codes.reshape(-1, 4, 16)[scales == 0] == 0).all()


@pytest.mark.parametrize("grid", ["e2m1", "e4m3"])
def test_float32_next_to_every_tie(grid):
    points = np.array(getattr(oracle, grid.upper()), np.float64)
    ties = ((points[1:] + points[:-1]) / 2).astype(np.float32)
    up, down = np.float32(np.inf), np.float32(0)
    values = np.concatenate([ties, np.nextafter(ties, up), np.nextafter(ties, down)])
    expected = nearest_even(values, points)
    rows = -(-len(values) // 4)
    x = np.zeros((rows * 4, 16), np.float32)
    if grid == "e2m1":
        x[: len(values), 0], x[:, 1] = values, 6
        codes, _ = _static(torch.from_numpy(x.reshape(rows, 64)), 6.0, "static_6")
        got = codes.reshape(-1, 16)[: len(values), 0]
    else:
        x[: len(values), 0] = values * np.float32(4)
        _, scales = _static(torch.from_numpy(x.reshape(rows, 64)), 1792.0, "static_4")
        got = scales.reshape(-1)[: len(values)]
    np.testing.assert_array_equal(got, expected)


def test_conversions_of_the_formats_module_over_all_magnitudes():
    values = _bf16(FINITE).float()
    wide = values.numpy().astype(np.float64)
    for rounded, grid in (
        (formats.round_e2m1(values), oracle.E2M1),
        (formats.round_e4m3(values), oracle.E4M3),
    ):
        np.testing.assert_array_equal(rounded.numpy(), np.array(grid)[nearest_even(wide, grid)])
    # E8M0 ends at 2^127, and the contract rounds every subnormal up to byte 1.
    byte = formats.encode_e8m0(values[values <= 2.0**127]).numpy()
    exponent = np.ceil(np.log2(np.maximum(wide[: len(byte)], 2.0**-126)))
    np.testing.assert_array_equal(byte, np.where(wide[: len(byte)] == 0, 0, exponent + 127))


def test_scale_bytes_decode_and_encode():
    every = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(formats.decode_e4m3(every).numpy(), E4M3)
    np.testing.assert_array_equal(formats.decode_e8m0(every).numpy(), E8M0)
    np.testing.assert_array_equal(formats.encode_e4m3(torch.from_numpy(E4M3[:127])), range(127))
    np.testing.assert_array_equal(formats.encode_e8m0(torch.from_numpy(E8M0[1:255])), range(1, 255))
    decoded = formats.decode_e2m1(torch.arange(16, dtype=torch.int32)).numpy()
    np.testing.assert_array_equal(decoded, E2M1)
    assert np.signbit(decoded[8]) and not np.signbit(decoded[0])
    np.testing.assert_array_equal(formats.encode_e2m1(torch.from_numpy(E2M1[:8])), range(8))


@pytest.mark.parametrize("rows,groups", [(0, 4), (1, 4), (128, 4), (129, 8), (300, 12)])
def test_blocked_layout_is_the_formula_of_the_contract(rows, groups):
    scales = torch.randint(0, 256, (rows, groups), dtype=torch.uint8)
    blocked = formats.to_blocked(scales)
    np.testing.assert_array_equal(blocked.numpy(), oracle.block_layout(scales.numpy()))
    assert torch.equal(formats.from_blocked(blocked, rows, groups), scales)
    assert torch.equal(formats.to_blocked(scales.expand(2, -1, -1)), blocked.expand(2, -1))


@pytest.mark.parametrize("rounding", formats.ROUNDINGS)
@pytest.mark.parametrize("rule", formats.SCALE_RULES)
def test_constants_are_those_of_the_oracle(rule, rounding):
    options = oracle.Options(scale_rule=rule, rounding=rounding)
    assert formats.qs_of("nvfp4", rule, rounding) == float(options.qs)
    assert formats.value_max(rule, rounding) == float(options.q)
    assert formats.qs_of("mxfp4", "static_6", "nearest") == 1.0
