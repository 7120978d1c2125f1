"""Stochastic rounding: distribution, dice, and independence of how the work is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numerics import agreement_limit, hardware_bias_limit, rounding_bias_limit
from vectors import E2M1, dice, row_major, unpack

import fos_compile.kernels  # noqa: F401, registers the operators

pytestmark = pytest.mark.usefixtures("implementation")

BINADES = {0.5: (0.0, 2.0), 1.0: (2.0, 4.0), 2.0: (4.0, 6.0)}
HARDWARE = "stochastic_hardware"
STOCHASTIC = ("stochastic", "stochastic_realized", "stochastic_unbiased", HARDWARE)
both = pytest.mark.parametrize("rounding", ["stochastic", HARDWARE])
ROWS, COLS, SEED, STREAM = 512, 1024, -0x5DEECE66D, 6


def _quantize(
    x, seed=SEED, stream=STREAM, amax=6.0, rounding="stochastic", rule="static_6", **more
):
    seeds = torch.tensor([seed], dtype=torch.int64)
    return torch.ops.fos.quantize(
        x,
        torch.tensor(amax),
        seeds,
        scale_rule=rule,
        rounding=rounding,
        stream=stream,
        **more,
    )


def _rounded(a: np.ndarray, **options) -> tuple[np.ndarray, np.ndarray]:
    """Rounded magnitudes of y = a, and which elements were free (one in 16 pins the scale).

    A six in each block and a static amax of 6 make every scale 448 and y = |x| exactly.
    """
    x = torch.from_numpy(a.astype(np.float32))
    x[:, ::16] = 6.0
    values, scales = _quantize(x, **options)
    assert (row_major(scales, x.shape[0], x.shape[1] // 16) == 0x7E).all()
    free = np.ones(a.shape, bool)
    free[:, ::16] = False
    return E2M1[unpack(values)], free


@pytest.mark.parametrize("step", BINADES)
def test_bias_is_at_most_a_512th_of_a_step(step):
    low, high = BINADES[step]
    # Sixteen positions a step, apart from the dice's own grid of 1/256; one a row.
    fractions = (np.arange(16) * 16 + 0.37) / 256
    points = (np.arange(low, high, step)[:, None] + step * fractions).ravel().astype(np.float32)
    a = np.repeat(np.resize(points, ROWS)[:, None], COLS, axis=1)
    rounded, free = _rounded(a)
    error = ((rounded.astype(np.float64) - a) / step)[free].reshape(ROWS, -1)
    assert abs(error.mean()) <= rounding_bias_limit(error.size)
    for value in points:
        rows = error[a[:, 0] == value]
        assert abs(rows.mean()) <= rounding_bias_limit(rows.size), value
    assert np.abs(error).max() <= 1 and error.std() > 0


@both
@pytest.mark.parametrize("step", BINADES)
def test_every_roll_is_the_formula_of_the_contract(step, rounding):
    low, high = BINADES[step]
    a = np.random.RandomState(3).uniform(low, high, (256, COLS)).astype(np.float32)
    rounded, free = _rounded(a, rounding=rounding)
    u = dice(*a.shape, SEED, STREAM, rounding)
    expected = np.minimum(6, step * np.floor(a / np.float32(step) + u))
    np.testing.assert_array_equal(rounded[free], expected[free])


@pytest.mark.parametrize("step", BINADES)
def test_hardware_rounds_up_from_exactly_where_the_dice_say(step):
    """Not from one float32 below, whose sum with the dice float32 cannot hold."""
    low = BINADES[step][0]
    edge = (low + step * (1 - dice(256, COLS, SEED, STREAM, HARDWARE))).astype(np.float32)
    up, free = _rounded(edge, rounding=HARDWARE)
    down, _ = _rounded(np.nextafter(edge, np.float32(0)), rounding=HARDWARE)
    assert (up[free] == low + step).all() and (down[free] == low).all()


@pytest.mark.parametrize("step", BINADES)
def test_hardware_is_unbiased_over_seeds_for_each_of_the_four_operands(step):
    seeds, shape = 48, (64, 256)
    a = np.random.RandomState(7).uniform(*BINADES[step], shape).astype(np.float32)
    error = np.zeros(shape)
    for i in range(seeds):
        rounded, free = _rounded(a, seed=(i - 5) * 0x3779B97F4A7C15, rounding=HARDWARE)
        error += (rounded.astype(np.float64) - a) / step / seeds
    for place in range(4):
        own = error[:, place::4][free[:, place::4]]
        # Those of one place have words of their own.
        assert abs(own.mean()) <= hardware_bias_limit(own.size * seeds)
        assert own.std() > 0


@both
def test_grid_points_and_saturated_values_never_move(rounding):
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 7, 100], np.float32)
    a = np.tile(grid, (64, COLS))[:, :COLS]
    rounded, free = _rounded(a, rounding=rounding)
    np.testing.assert_array_equal(rounded[free], np.minimum(a, 6)[free])


@pytest.mark.parametrize(
    "changed",
    [{"seed": SEED + 1}, {"seed": SEED + 2**32}, {"seed": -SEED}, {"stream": 7}],
    ids=["seed", "seed_high_word", "sign", "stream"],
)
def test_other_dice_are_independent(changed):
    a = np.full((256, COLS), 2.5, np.float32)
    first, free = _rounded(a)
    second, _ = _rounded(a, **changed)
    share = (first == second)[free].mean()
    assert abs(share - 0.5) <= agreement_limit(free.sum())


def test_rows_groups_and_elements_roll_apart():
    a = np.full((256, COLS), 2.5, np.float32)
    up = _rounded(a)[0] == 3
    for first, second in (
        (up[:-1, 1:16], up[1:, 1:16]),
        (up[:, 1:16], up[:, 17:32]),
        (up[:, 1::16], up[:, 2::16]),
        (up[:, 1::16], up[:, 5::16]),
    ):
        assert abs((first == second).mean() - 0.5) <= agreement_limit(first.size)


def test_same_arguments_same_bits():
    x = torch.randn(40, 96)
    first, again = _quantize(x), _quantize(x)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


TILINGS = [(rule, rounding, block) for rule in ("mse", "static_6")
           for rounding in STOCHASTIC for block in ("1d", "2d")]  # fmt: skip


@pytest.mark.parametrize("rule,rounding,block", TILINGS)
class TestTiling:
    """The codes depend on the element's place in the matrix, not on how the matrix is handed in."""

    ROWS, COLS = 96, 112

    def _run(self, x, rule, rounding, block, **more):
        values, scales = _quantize(x, amax=4.0, rule=rule, rounding=rounding, block=block, **more)
        rows = x.shape[-1] if more.get("transpose") else x.shape[-2]
        codes = unpack(values)
        flat = codes.reshape(-1, codes.shape[-1])
        groups = codes.shape[-1] // 16
        return flat, row_major(scales, rows, groups).reshape(-1, groups)

    def _same(self, first, second):
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])

    def test_batches(self, rule, rounding, block):
        x = torch.randn(self.ROWS, self.COLS).bfloat16()
        whole = self._run(x, rule, rounding, block)
        for batch in (1, 2, 3, 6):
            part = self._run(x.view(batch, -1, self.COLS), rule, rounding, block)
            self._same(whole, part)

    def test_leading_rows(self, rule, rounding, block):
        x = torch.randn(self.ROWS, self.COLS).bfloat16()
        codes, scales = self._run(x, rule, rounding, block)
        for rows in (16, 64):
            self._same((codes[:rows], scales[:rows]), self._run(x[:rows], rule, rounding, block))

    def test_explicit_padding(self, rule, rounding, block):
        x = torch.randn(self.ROWS, self.COLS).bfloat16()
        wide = torch.nn.functional.pad(x, (0, 128 - self.COLS))
        self._same(self._run(x, rule, rounding, block), self._run(wide, rule, rounding, block))

    def test_storage(self, rule, rounding, block):
        x = torch.randn(self.ROWS, self.COLS).bfloat16()
        whole = self._run(x, rule, rounding, block)
        strided = torch.randn(self.ROWS, 2, self.COLS, 3).bfloat16()[:, 1, :, 2].copy_(x)
        assert not strided.is_contiguous()
        self._same(whole, self._run(strided, rule, rounding, block))
        self._same(whole, self._run(x.t().contiguous().t(), rule, rounding, block))
        turned = self._run(x.t().contiguous(), rule, rounding, block, transpose=True)
        self._same(whole, turned)


@pytest.mark.parametrize("rounding", ["stochastic", "stochastic_realized", HARDWARE])
def test_mxfp4_rolls_one_call_per_16_columns(rounding):
    # A six in each block of 32 makes the scale 1, so that y = |x|.
    a = np.random.RandomState(4).uniform(0, 6, (64, 256)).astype(np.float32)
    a[:, ::32] = 6
    values, scales = _quantize(torch.from_numpy(a), rounding=rounding, format="mxfp4")
    assert (row_major(scales, 64, 8) == 127).all()
    step = np.where(a < 2, 0.5, np.where(a < 4, 1, 2)).astype(np.float32)
    expected = np.minimum(6, step * np.floor(a / step + dice(64, 256, SEED, STREAM, rounding)))
    np.testing.assert_array_equal(E2M1[unpack(values)], expected)
