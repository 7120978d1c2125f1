"""The quantizer of docs/contract.md sections 3 to 6, for blocks of both formats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.reference import blocks
from fos_compile.kernels.reference.selection import expected_error, realized_error

AMAX_MIN = 2.0**-116
"""Below it Q * S / amax would overflow: such a tensor quantizes to zeros."""

_FLOAT_MAX = torch.finfo(torch.float32).max
_REALIZED = ("nearest", "stochastic_realized")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """Static options of one quantization."""

    format: str
    scale_rule: str
    rounding: str
    block: str
    rht: bool
    transpose: bool
    stream: int


def quantize_matrix(
    x: Tensor, amax: Tensor, seed: Tensor | None, spec: Spec
) -> tuple[Tensor, Tensor]:
    """Packed values [.., R, P/2] and row-major scale bytes [.., R, G], both uint8.

    Args:
        x: [R, C] or [B, R, C] before transposition, bfloat16, float16 or float32.
        amax: float32 [], ignored for mxfp4.
        seed: int64 [1], unused for nearest.
        spec: static options.
    """
    lanes = blocks.group_lanes(x, spec.format, spec.rht, spec.transpose)
    rows = lanes.shape[-2]
    u = None
    if spec.rounding != "nearest":
        assert seed is not None
        dice = blocks.group_dice(lanes, seed, spec.stream, spec.rounding)
        u = blocks.block_lanes(dice, spec.format, spec.block)
    v = blocks.block_lanes(lanes, spec.format, spec.block)
    make = _mxfp4 if spec.format == "mxfp4" else _nvfp4
    codes, scales = make(v, amax, u, spec)
    if spec.block == "2d":
        *lead, tiles, groups = scales.shape
        rowwise = scales.unsqueeze(-2).expand(*lead, tiles, 16, groups)
        whole = formats.copied_view(rowwise, (*lead, tiles * 16, groups), torch.uint8)
        scales = whole.narrow(-2, 0, rows)
    return blocks.pack_codes(codes, spec.format, spec.block, rows), scales


def _mxfp4(v: Tensor, amax: Tensor, u: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
    ax = v.abs()
    peak = ax.amax(0)
    finite = peak < float("inf")
    peak = torch.where(finite, peak, 1.0)
    divisor = blocks.same_constant(formats.value_max(spec.scale_rule, spec.rounding), peak)
    byte = formats.encode_e8m0(peak / divisor)
    inverse = blocks.materialize(formats.from_bits((254 - byte) << 23))
    q = blocks.round_magnitude(ax * inverse, u, spec.rounding)
    scales = torch.where(finite, byte, formats.NAN_SCALE["mxfp4"]).to(torch.uint8)
    return _signed_codes(q, v, finite), scales


def _nvfp4(v: Tensor, amax: Tensor, u: Tensor | None, spec: Spec) -> tuple[Tensor, Tensor]:
    ax = v.abs()
    peak = ax.amax(0)
    usable = amax.abs() < float("inf")
    finite = (peak < float("inf")) & usable
    live = amax >= AMAX_MIN
    # Blocks without an answer compute with harmless numbers, so that no NaN meets an integer cast.
    amax = torch.where(live & usable, amax, 1.0)
    peak = torch.where(finite, peak, 0.0)
    one = blocks.same_constant(1.0, amax)
    qs = one * formats.qs_of(spec.format, spec.scale_rule, spec.rounding)
    encode = qs / amax
    s = (peak / (one * formats.value_max(spec.scale_rule, spec.rounding))) * encode
    scale, y = _candidate(ax, s, encode, one)
    if spec.scale_rule not in formats.ADAPTIVE_RULES:
        q = blocks.round_magnitude(y, u, spec.rounding)
    else:
        scale4, y4 = _candidate(ax, s * 1.5, encode, one)
        if spec.rounding in _REALIZED:
            q = blocks.round_magnitude(y, u, spec.rounding)
            q4 = blocks.round_magnitude(y4, u, spec.rounding)
            error = realized_error(q, ax, scale, amax, qs, spec.scale_rule)
            error4 = realized_error(q4, ax, scale4, amax, qs, spec.scale_rule)
            pick4 = blocks.materialize(error4 < error)
            q = torch.where(pick4, q4, q)
        else:
            error = expected_error(y, scale, spec.scale_rule)
            error4 = expected_error(y4, scale4, spec.scale_rule)
            pick4 = blocks.materialize(error4 < error)
            q = blocks.round_magnitude(torch.where(pick4, y4, y), u, spec.rounding)
        scale = torch.where(pick4, scale4, scale)
    byte = torch.where(live, formats.encode_e4m3(scale), 0)
    scales = torch.where(finite, byte, formats.NAN_SCALE["nvfp4"]).to(torch.uint8)
    return _signed_codes(q, v, finite & live & (scale != 0.0)), scales


def _candidate(ax: Tensor, s: Tensor, encode: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 scale of an unrounded scale `s`, and the magnitudes scaled by it."""
    scale = blocks.materialize(formats.round_e4m3(s))
    # For the smallest amax the divisor underflows, and zeros times infinity would be NaN.
    inverse = (one / ((one / encode) * scale)).clamp(max=_FLOAT_MAX)
    return scale, ax * blocks.materialize(torch.where(scale == 0.0, 0.0, inverse))


def _signed_codes(q: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    """float32 codes 0..15; 0 throughout blocks that are not valid."""
    code = formats.encode_e2m1(q)
    code = torch.where(v < 0.0, code + 8.0, code)
    return torch.where(valid, code, 0.0)
