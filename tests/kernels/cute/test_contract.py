"""`contract`, the arithmetic of the general kernels, on the numpy model of PTX: the right bits."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
import torch

import ptx_model
from fos_compile.kernels import formats

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is for Linux only")
from fos_compile.kernels.cute import contract, conversions, dequantize_blocks, hadamard, random_bits

SEED, STREAM = -1234567890123456789, 5
ROUND_TO = {
    torch.bfloat16: ptx_model.to_bfloat16,
    torch.float16: ptx_model.to_float16,
    torch.float32: lambda a: a,
}


@pytest.fixture(autouse=True)
def model(monkeypatch, request):
    ptx_model.install(monkeypatch, contract, hadamard, random_bits, dequantize_blocks)
    arch = getattr(request, "param", "sm_90a")
    with np.errstate(all="ignore"), conversions.target(arch):
        yield


every_way = pytest.mark.parametrize("model", ["sm_80", "sm_90a", "sm_100a"], indirect=True)
"""E4M3 and E2M1 by arithmetic, E4M3 by an instruction, both by instructions."""


def options():
    """Every combination of options that the kernels serve."""
    for fmt, rule, rounding, block, rht in itertools.product(
        formats.FORMATS, formats.SCALE_RULES, formats.ROUNDINGS, formats.BLOCKS, (False, True)
    ):
        adaptive_or_2d = rule in formats.ADAPTIVE_RULES or block == "2d"
        if fmt == "mxfp4" and (adaptive_or_2d or rounding == "stochastic_unbiased"):
            continue
        yield contract.Rules(fmt, rule, rounding, block), rht


def inputs(dtype):
    """(x, amax or None): magnitudes of all sizes, ties, special values, static and extreme amax."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp(2 * torch.randn(40, 1, generator=generator))
    x = (torch.randn(40, 200, generator=generator) * spread).to(dtype)
    x[0, :40], x[1, 3] = 0.0, -0.0
    yield x, None
    yield x, 0.5
    ties = (torch.randint(-48, 49, (32, 128), generator=generator) / 8).to(dtype)
    yield ties, 6.0
    special = x.clone()
    special[2, 5], special[3, 7] = float("nan"), float("inf")
    yield special, 3.0
    yield special, None
    small = torch.randn(16, 64, generator=generator) / 6
    for exponent in (-120, -116, -110, -60, 100, 126):
        if dtype is not torch.float16:
            yield (small * 2.0**exponent).to(dtype), 2.0**exponent
    yield (small * 1e-39).to(dtype), None
    # Scales down to the smallest beside an amax whose inverse they overflow, and zeros to multiply.
    if dtype is not torch.float16:
        fading = small * torch.exp2(-116 - torch.arange(16.0)).unsqueeze(-1)
        fading[:, ::5] = 0.0
        yield fading.to(dtype), 2.0**-116


def words_of(index):
    index = index.astype(np.uint64)
    return index.astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)


def dice(rules, groups):
    if rules.rounding == "nearest":
        return None
    seed = words_of(np.asarray(SEED % 2**64))
    words = random_bits.philox(
        random_bits.keys_of(seed), words_of(groups), np.full(groups.shape, STREAM, np.uint32)
    )
    if rules.rounding == contract.HARDWARE:
        return words
    return random_bits.offsets(contract.transpose_bits(words, 8) if rules.block == "2d" else words)


def by_rows(x, amax, rules, rht, by):
    """Values and row-major scales of 1D blocks: an entry a block."""
    width = formats.WIDTH[rules.format]
    rows, padded = x.shape[0], formats.padded_cols(x.shape[1], rules.format)
    blocks = torch.nn.functional.pad(x, (0, padded - x.shape[1])).float().numpy().reshape(-1, width)
    values = [blocks[:, i] for i in range(width)]
    if rht:
        starts = range(0, width, 16)
        values = [v for i in starts for v in hadamard.rotate(values[i : i + 16], ROUND_TO[x.dtype])]
    first = np.arange(len(blocks)) * (width // 16)
    offsets = None
    if rules.rounding != "nearest":
        offsets = [u for i in range(width // 16) for u in dice(rules, first + i)]
    tensor = contract.tensor_of(np.full(len(blocks), amax, np.float32), rules.qs)
    words, scale = contract.quantize(values, tensor, rules, offsets, by)
    packed = np.ascontiguousarray(np.stack(words, -1).astype(np.uint32)).view(np.uint8)
    return packed.reshape(rows, padded // 2), np.asarray(scale).reshape(rows, -1)


def by_tiles(x, amax, rules, rht):
    """The same of 2D blocks: the last axis is a warp with two tiles side by side."""
    rows, padded = x.shape[0], formats.padded_cols(x.shape[1], "nvfp4")
    tall = -(-rows // 16) * 16
    pad = torch.nn.functional.pad(x, (0, padded - x.shape[1], 0, tall - rows)).float().numpy()
    warps = pad.reshape(tall // 16, 16, padded // 32, 32)
    values = [np.ascontiguousarray(warps[:, row]) for row in range(16)]
    if rht:
        values = hadamard.rotate_across(values, ROUND_TO[x.dtype])
    lane = np.arange(32)
    row = np.arange(tall // 16)[:, None, None] * 16 + (lane & 15)
    groups = row * (padded // 16) + np.arange(padded // 32)[None, :, None] * 2 + (lane >> 4)
    tensor = contract.tensor_of(np.full(values[0].shape, amax, np.float32), rules.qs)
    words, scale = contract.quantize(values, tensor, rules, dice(rules, groups))
    if rules.rounding != contract.HARDWARE:
        words = contract.transpose_bits(words, 4)
    words = np.stack(words, -1).astype(np.uint32)
    shape = (tall // 16, padded // 32, 2, 16)
    packed = np.ascontiguousarray(words).view(np.uint8).reshape(*shape, 8)
    packed = packed.transpose(0, 3, 1, 2, 4).reshape(tall, padded // 2)[:rows]
    return packed, np.asarray(scale).reshape(shape).transpose(0, 3, 1, 2).reshape(tall, -1)[:rows]


def mismatches(dtype, divisions="IEEE"):
    """Options and amax of every comparison with the reference that fails."""
    by = getattr(contract, divisions)
    for (rules, rht), (x, given) in itertools.product(options(), inputs(dtype)):
        amax = torch.ops.fos.amax(x, rht) if given is None else torch.tensor(given)
        least, most = contract.MIDRANGE_AMAX
        midrange = least <= amax.item() <= most and rules.format == "nvfp4"
        if divisions == "MIDRANGE" and not (midrange and rules.block == "1d"):
            continue
        want, want_scales = torch.ops.fos.quantize(
            x, amax, torch.tensor([SEED]), stream=STREAM, rht=rht, **rules._asdict()
        )
        if rules.block == "2d":
            got, scales = by_tiles(x, float(amax), rules, rht)
        else:
            got, scales = by_rows(x, float(amax), rules, rht, by)
        wanted = formats.from_blocked(want_scales, x.shape[0], scales.shape[1])
        if not (np.array_equal(scales, wanted.numpy()) and np.array_equal(got, want.numpy())):
            yield rules, rht, given


@every_way
@pytest.mark.parametrize("dtype", formats.DTYPES, ids=str)
@pytest.mark.parametrize("divisions", ["IEEE", "MIDRANGE"])
def test_every_option_gives_the_bits_of_the_reference(model, dtype, divisions):
    assert not list(mismatches(dtype, divisions))


def ties_away(y):
    step, inverse = contract._steps(ptx_model.minimum(y, 6.0))
    whole = np.floor(np.minimum(y, np.float32(6)) * inverse + np.float32(0.5))
    return np.minimum(whole * step, np.float32(6))


def in_pairs(terms):
    while len(terms) > 1:
        terms = [functools.reduce(ptx_model.add, terms[i : i + 2]) for i in range(0, len(terms), 2)]
    return terms[0]


def where_less_or_equal(a, b, yes, no):
    """Of the two errors only: other bounds are numbers."""
    less = a <= b if isinstance(b, np.ndarray) else a < np.float32(b)
    return np.where(less, np.asarray(yes, np.uint32), np.asarray(no, np.uint32))


def sign_bit(a, b, yes, no):
    """Negative zero counts as negative."""
    less = np.signbit(a) if isinstance(b, float) and b == 0.0 else a < np.asarray(b, np.float32)
    return np.where(less, np.asarray(yes, np.uint32), np.asarray(no, np.uint32))


def unclipped(y, rule):
    """Expected error as if nothing could exceed 6."""
    return EXPECTED(ptx_model.minimum(y, 6.0), rule)


def words_swapped(scaled, random, block):
    return HARDWARE_CODES(scaled, random[::-1], block)


def with_zeros(values, inverse):
    return [ptx_model.mul(value, inverse) for value in values]


HARDWARE_CODES = contract._hardware_codes
EXPECTED, PHILOX, MUL_WIDE, OFFSETS = (
    contract._expected,
    random_bits.philox,
    ptx_model.mul_wide,
    random_bits.offsets,
)
LEFT_TO_RIGHT = contract._left_to_right
BY_RECIPROCAL = contract.Division(
    quotient=lambda a, b: ptx_model.mul(a, ptx_model.rcp(b)),
    quotients=lambda a, b: ptx_model.mul_x2(a, (ptx_model.rcp(b), ptx_model.rcp(b))),
    reciprocal=contract.IEEE.reciprocal,
)
MUTANTS = {
    "ties away from zero": (contract, "_nearest", ties_away),
    "sums from right to left": (contract, "_left_to_right", lambda t: LEFT_TO_RIGHT(t[::-1])),
    "sums in pairs": (contract, "_left_to_right", in_pairs),
    "no clamp of the inverse": (contract, "FLOAT32_MAX", float("inf")),
    "4 where errors are equal": (ptx_model, "where_less", where_less_or_equal),
    "a sign for negative zero": (ptx_model, "where_less", sign_bit),
    "no smallest amax": (contract, "AMAX_MIN", 0.0),
    "no clipping": (contract, "_expected", unclipped),
    "an infinite block is finite": (contract, "EXPONENT", 0x7F800001),
    "a wrong Philox multiplier": (ptx_model, "mul_wide", lambda a, b: MUL_WIDE(a, b ^ 4)),
    "a fixed stream": (random_bits, "philox", lambda s, g, c: PHILOX(s, g, c * np.uint32(0))),
    "the words of the seed swapped": (random_bits, "philox", lambda s, g, c: PHILOX(s[::-1], g, c)),
    "bytes in another order": (random_bits, "offsets", lambda words: OFFSETS(words)[::-1]),
    "words of the hardware's dice swapped": (contract, "_hardware_codes", words_swapped),
    "a sign for the hardware's zeros": (contract, "_scaled", with_zeros),
    "a wrong sign of the transform": (hadamard, "SIGNS", "+++-+------+-+-+"),
    "quotients by reciprocals": (contract, "IEEE", BY_RECIPROCAL),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_comparison_sees(monkeypatch, mutant):
    """Each of these mistakes changes some bits somewhere in the data."""
    monkeypatch.setattr(*MUTANTS[mutant])
    assert any(next(mismatches(dtype), None) for dtype in (torch.bfloat16, torch.float32))


def test_midrange_division_is_correctly_rounded():
    """On the divisors in use and on random quotients: the argument for `_markstein` needs that the
    reciprocal itself is rounded correctly."""
    generator = np.random.default_rng(0)
    a = np.exp(generator.uniform(-60, 60, 1 << 20)).astype(np.float32)
    divisors = {
        formats.qs_of("nvfp4", r, k) for r in formats.SCALE_RULES for k in formats.ROUNDINGS
    }
    divisors |= {formats.value_max(r, k) for r in formats.SCALE_RULES for k in formats.ROUNDINGS}
    for divisor in divisors:
        assert np.array_equal(contract.MIDRANGE.quotient(a, divisor), a / np.float32(divisor))
    assert np.array_equal(contract.MIDRANGE.reciprocal(a), np.float32(1) / a)


@pytest.mark.parametrize("width", [4, 8])
def test_transposes_across_threads(width):
    generator = np.random.default_rng(0)
    matrix = generator.integers(0, 1 << width, (3, 2, 16, 16)).astype(np.uint64)
    per_word = 32 // width

    def words(m):
        shifted = m << (np.arange(16, dtype=np.uint64) % per_word * width)
        return shifted.reshape(3, 32, 16 // per_word, per_word).sum(-1).astype(np.uint32)

    rows = words(matrix.reshape(3, 32, 16))
    columns = words(matrix.swapaxes(-1, -2).reshape(3, 32, 16))
    got = contract.transpose_bits([rows[..., i] for i in range(rows.shape[-1])], width)
    assert np.array_equal(np.stack(got, -1), columns)


@pytest.mark.parametrize("format", formats.FORMATS)
def test_decodes_every_code_and_scale(format):
    kernel = dequantize_blocks.DequantizeBlocks(format, scaled=False, dtype=None)
    codes = dequantize_blocks.decode(np.full(256, 0xFEDCBA98, np.uint32))
    codes = dequantize_blocks.decode(np.full(256, 0x76543210, np.uint32)) + codes
    scale = kernel.decode_scale(np.arange(256, dtype=np.uint32))
    want = formats.decode_e2m1(torch.arange(16, dtype=torch.int32)).numpy()
    scales = formats.decode_scale(torch.arange(256, dtype=torch.uint8), format).numpy()
    for code in range(16):
        got, wanted = codes[code] * scale, want[code] * scales
        assert np.array_equal(got, wanted, equal_nan=True)
        assert np.array_equal(np.signbit(got[:127]), np.signbit(wanted[:127]))
