"""Choice between 4 and 6: both candidates are rebuilt here, vectorized, from x and amax alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numerics import ratio_of_means, same_ratio_limit
from vectors import E2M1, E4M3, dice, nearest_even, oracle, row_major, run_quantize, unpack

import fos_compile.kernels  # noqa: F401, registers the operators

pytestmark = pytest.mark.usefixtures("implementation")

F = np.float32
ROWS, COLS = 96, 320
ROUNDINGS = ("nearest", *oracle.STOCHASTIC)
AMAX = 5.25
"""A static tensor maximum, so that blocks do not depend on one another."""


def _blocks(matrix: np.ndarray, block: str) -> np.ndarray:
    """[R, P] -> [num_blocks, 16 or 256] in row-major order of blocks and elements."""
    if block == "1d":
        return matrix.reshape(-1, 16)
    rows, cols = matrix.shape
    return matrix.reshape(rows // 16, 16, cols // 16, 16).transpose(0, 2, 1, 3).reshape(-1, 256)


def _block_scales(scales: torch.Tensor, block: str) -> np.ndarray:
    """One scale byte per block; the rows of a tile must agree."""
    rowwise = row_major(scales, ROWS, COLS // 16)
    if block == "1d":
        return rowwise.reshape(-1)
    tiles = rowwise.reshape(ROWS // 16, 16, -1)
    assert (tiles == tiles[:, :1]).all()
    return tiles[:, 0].reshape(-1)


def _sum(t: np.ndarray) -> np.ndarray:
    """The sum order of contract section 4 over the last axis."""
    if t.shape[-1] == 16:
        lanes = t[:, :8] + t[:, 8:]
    else:
        chunks = t.reshape(-1, 8, 4, 8)
        running = chunks[:, 0]
        for i in range(1, 8):
            running = running + chunks[:, i]
        lanes = running[:, 0]
        for i in range(1, 4):
            lanes = lanes + running[:, i]
    total = lanes[:, 0]
    for j in range(1, 8):
        total = total + lanes[:, j]
    assert total.dtype == F
    return total


def _steps(a: np.ndarray) -> np.ndarray:
    return np.where(a < 2, F(0.5), np.where(a < 4, F(1), F(2)))


def _realized(q, byte: np.ndarray, ax: np.ndarray, amax: F, opt, total=_sum) -> np.ndarray:
    t = np.abs(((q * E4M3[byte][:, None]) * amax) / opt.qs - ax)
    if opt.scale_rule == "abs_max":
        return t.max(-1)
    return total(t * t if opt.scale_rule == "mse" else t)


def _expected(a: np.ndarray, byte: np.ndarray, opt, total=_sum) -> np.ndarray:
    step, scale = _steps(a), E4M3[byte]
    lo = step * np.floor(a / step)
    down, up, over = a - lo, (lo + step) - a, a - F(6)
    inside, clipped, weight = {
        "mse": (down * up, over * over, scale * scale),
        "mae": ((down * up) * (F(2) / step), over, scale),
        "abs_max": (np.where(down == 0, F(0), np.maximum(down, up)), over, scale),
    }[opt.scale_rule]
    terms = np.where(a < 6, inside, clipped)
    error = terms.max(-1) if opt.scale_rule == "abs_max" else total(terms)
    return np.where(scale == 0, F(np.inf), error * weight)


def _candidate(ax: np.ndarray, factor: float, amax: F, u: np.ndarray | None, opt, total=_sum):
    """(scale bytes, rounded magnitudes, error) of one candidate of every block."""
    enc = opt.qs / amax
    s = (ax.max(-1) / opt.q) * enc
    byte = nearest_even(np.minimum(s * F(factor), F(448)), oracle.E4M3)
    scale = E4M3[byte]
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.minimum(F(1) / ((F(1) / enc) * scale), np.finfo(F).max)
        y = np.where(scale[:, None] == 0, F(0), ax * inverse[:, None])
    if u is None:
        q = E2M1[nearest_even(y, oracle.E2M1)]
    else:
        a = np.minimum(y, F(6))
        q = np.minimum(F(6), _steps(a) * np.floor(a / _steps(a) + u))
    if opt.rounding in oracle.EXPECTED:
        return byte, q, _expected(y, byte, opt, total)
    return byte, q, _realized(q, byte, ax, amax, opt, total)


def _data(dtype: torch.dtype) -> torch.Tensor:
    """Tiles of very different size: Gaussian with outliers, five sixths of a peak, zeros."""
    x = torch.randn(ROWS, COLS)
    x[::7, ::13] *= 6
    # Under the 6 candidate five sixths of the peak land on the tie 5, under the 4 candidate near 3.
    x[:, 160:] = torch.tensor([0.83, 0.84, -1.0])[torch.randint(3, (ROWS, 160))]
    x *= 2.0 ** torch.linspace(-14, 3, ROWS // 16).repeat_interleave(16)[:, None]
    x[5] = 0
    x[6] = 0.75
    x[32:48, 64:80] = 0
    return x.to(dtype)


@pytest.mark.parametrize("block", ["1d", "2d"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", oracle.FOUR_OVER_SIX)
def test_no_block_is_worse_than_its_6_candidate(rule, rounding, block):
    dtype = torch.bfloat16 if rounding == "nearest" else torch.float32
    x = _data(dtype)
    opt = oracle.Options(scale_rule=rule, rounding=rounding, block=block, seed=41, stream=2)
    amax = torch.ops.fos.amax(x)
    values, scales = run_quantize(x, amax, opt)
    u = None
    if rounding != "nearest":
        u = _blocks(dice(ROWS, COLS, opt.seed, opt.stream, rounding), block)
    ax = _blocks(x.float().abs().numpy(), block)
    byte6, q6, error6 = _candidate(ax, 1.0, F(amax), u, opt)
    byte4, q4, error4 = _candidate(ax, 1.5, F(amax), u, opt)

    chosen = _block_scales(scales, block)
    q = np.abs(_blocks(E2M1[unpack(values)], block))
    is_6, is_4 = chosen == byte6, chosen == byte4
    assert (is_6 | is_4).all()
    assert (q[is_6 & ~is_4] == q6[is_6 & ~is_4]).all()
    assert (q[is_4 & ~is_6] == q4[is_4 & ~is_6]).all()
    if rounding in ("nearest", "stochastic_realized"):
        # The error of what came out, not of what this file would have put out.
        error = _realized(q, chosen, ax, F(amax), opt)
    else:
        error = np.where(is_4 & ~is_6, error4, error6)
    assert (error <= error6).all()
    np.testing.assert_array_equal(is_4 & ~is_6, (error4 < error6) & (byte4 != byte6))
    assert (is_4 & ~is_6).any() and (is_6 & ~is_4).any()


@pytest.mark.parametrize("rule", ["static_6", "static_4"])
def test_static_rules_take_their_only_candidate(rule):
    x = _data(torch.bfloat16)
    opt = oracle.Options(scale_rule=rule)
    amax = torch.ops.fos.amax(x)
    values, scales = run_quantize(x, amax, opt)
    byte, q, _ = _candidate(x.float().abs().numpy().reshape(-1, 16), 1.0, F(amax), None, opt)
    np.testing.assert_array_equal(_block_scales(scales, "1d"), byte)
    np.testing.assert_array_equal(np.abs(E2M1[unpack(values)]).reshape(-1, 16), q)


def test_stochastic_choice_does_not_look_at_the_dice():
    x = _data(torch.float32)
    amax = torch.ops.fos.amax(x)
    for rounding in ("stochastic", "stochastic_hardware", "stochastic_realized"):
        blind = rounding != "stochastic_realized"
        opt = oracle.Options(rounding=rounding, seed=1)
        first = run_quantize(x, amax, opt)
        second = run_quantize(x, amax, replace(opt, seed=2))
        assert not torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1]) is blind


def _running(t: np.ndarray) -> np.ndarray:
    """The order of a plain loop, which the contract does not use."""
    return np.cumsum(t, -1, dtype=F)[:, -1]


def _takes_4(blocks: np.ndarray, opt, total=_sum) -> np.ndarray:
    error6 = _candidate(blocks, 1.0, F(AMAX), None, opt, total)[2]
    return _candidate(blocks, 1.5, F(AMAX), None, opt, total)[2] < error6


def _knife_edges(size: int, opt) -> np.ndarray:
    """Pairs of blocks one float32 apart: [2, n, size], the first takes 4, the second 6."""
    rng = np.random.RandomState(size)
    blocks = np.minimum(np.abs(rng.standard_normal((192, size))), 3.5).astype(F)
    blocks[:, 0] = rng.uniform(3.5, 5, len(blocks))

    def moved(value: np.ndarray) -> np.ndarray:
        out = blocks.copy()
        out[:, 1 : 1 + size // 8] = value[:, None]
        return out

    values = rng.uniform(0, 3.5, (48, len(blocks))).astype(F)
    taken = np.array([_takes_4(moved(value), opt) for value in values])
    column = np.arange(len(blocks))
    four, six = values[taken.argmax(0), column], values[taken.argmin(0), column]
    for _ in range(40):
        middle = (four + six) / F(2)
        picked = _takes_4(moved(middle), opt)
        four, six = np.where(picked, middle, four), np.where(picked, six, middle)
    mixed = taken.any(0) & ~taken.all(0)
    return np.stack([moved(four)[mixed], moved(six)[mixed]])


@pytest.mark.parametrize("size,block", [(16, "1d"), (256, "2d")])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("rule", ["mse", "mae"])
def test_order_of_the_sums_decides_between_neighbouring_floats(rule, rounding, size, block):
    opt = oracle.Options(scale_rule=rule, rounding=rounding, block=block, dtype="float32")
    blocks = _knife_edges(size, opt)
    assert blocks.shape[1] >= 16
    flat = blocks.reshape(-1, size)
    expected = np.repeat([True, False], len(flat) // 2)
    np.testing.assert_array_equal(_takes_4(flat, opt), expected)
    assert (_takes_4(flat, opt, _running) != expected).any()
    x = torch.from_numpy(flat.reshape(-1, 16))
    _, scales = run_quantize(x, torch.tensor(AMAX), opt)
    chosen = row_major(scales, len(x), 4)[:: size // 16, 0]
    byte6, byte4 = (_candidate(flat, f, F(AMAX), None, opt)[0] for f in (1.0, 1.5))
    assert (byte4 != byte6).all()
    np.testing.assert_array_equal(chosen, np.where(expected, byte4, byte6))


def _float64_errors(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared error per block of Gaussian blocks [n, 16] under (mse, static_6), all in float64."""
    peak = np.abs(z).max(-1)

    def error(qs: float, factor: float) -> np.ndarray:
        s = np.array(oracle.E4M3)[nearest_even(peak / 6 * (qs / AMAX) * factor, oracle.E4M3)]
        scale = (s * AMAX / qs)[:, None]
        q = np.array(oracle.E2M1)[nearest_even(np.abs(z) / scale, oracle.E2M1)]
        return ((q * scale - np.abs(z)) ** 2).sum(-1)

    return np.minimum(error(1536, 1.0), error(1536, 1.5)), error(2688, 1.0)


def _measured_errors(x: torch.Tensor, rule: str) -> np.ndarray:
    opt = oracle.Options(scale_rule=rule, dtype="float32")
    values, scales = run_quantize(x, torch.tensor(AMAX), opt)
    scale = E4M3[row_major(scales, x.shape[0], x.shape[1] // 16)].reshape(-1, 1)
    decoded = E2M1[unpack(values)].reshape(-1, 16).astype(np.float64) * scale * AMAX
    return ((decoded / float(opt.qs) - x.double().numpy().reshape(-1, 16)) ** 2).sum(-1)


def test_four_over_six_reduces_gaussian_error_by_the_expected_factor():
    """Both estimates of MSE(mse) / MSE(static_6) are means over independent blocks."""
    x = torch.randn(1024, 512)
    measured, spread = ratio_of_means(_measured_errors(x, "mse"), _measured_errors(x, "static_6"))
    z = np.random.RandomState(11).standard_normal((2**16, 16))
    predicted, uncertainty = ratio_of_means(*_float64_errors(z))
    limit = same_ratio_limit(spread, uncertainty)
    assert abs(measured - predicted) <= limit
    assert measured + limit < 1
