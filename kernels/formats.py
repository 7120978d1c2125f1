"""E2M1, E4M3, E8M0 and the blocked scale layout, in arithmetic that every backend rounds alike.

No float8 dtypes (older GPUs lack them in Triton) and no tables (Inductor would gather).
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from fos_compile.kernels.errors import InvalidArgument, UnsupportedArgument
from fos_compile.kernels.op import Status

FORMATS = ("nvfp4", "mxfp4")
SCALE_RULES = ("mse", "mae", "abs_max", "static_6", "static_4")
ROUNDINGS = (
    "nearest",
    "stochastic",
    "stochastic_realized",
    "stochastic_unbiased",
    "stochastic_hardware",
)
BLOCKS = ("1d", "2d")
ADAPTIVE_RULES = SCALE_RULES[:3]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

NAN_SCALE = {"nvfp4": 0x7F, "mxfp4": 0xFF}
WIDTH = {"nvfp4": 16, "mxfp4": 32}
"""Elements that share a scale."""

_EXPONENT = 0x7F800000
_MANTISSA = 0x007FFFFF


def float32(value: float) -> float:
    """`value` rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


_SHRINK = {
    rounding: 16 / 17 if rounding == "stochastic_unbiased" else 1.0 for rounding in ROUNDINGS
}
_Q = {rule: 4 if rule == "static_4" else 6 for rule in SCALE_RULES}
_S = {rule: 256 if rule in ADAPTIVE_RULES else 448 for rule in SCALE_RULES}
# Tables, because Dynamo cannot trace the rounding.
_VALUE_MAX = {(r, k): float32(_Q[r] * f) for r in SCALE_RULES for k, f in _SHRINK.items()}
_QS = {(r, k): float32(_Q[r] * _S[r] * f) for r in SCALE_RULES for k, f in _SHRINK.items()}


def value_max(scale_rule: str, rounding: str) -> float:
    """Qf of docs/contract.md: the E2M1 magnitude that blockmax maps to."""
    return _VALUE_MAX[scale_rule, rounding]


def qs_of(format: str, scale_rule: str, rounding: str = "nearest") -> float:
    """Divisor of amax in the tensor scale: dequantized = (code * scale) * amax / qs.

    Source: docs/contract.md section 3. mxfp4 has no tensor scale: 1.
    """
    return 1.0 if format == "mxfp4" else _QS[scale_rule, rounding]


def check_options(
    op: str, *, format: str, scale_rule: str, rounding: str, block: str, seed: object
) -> None:
    """Raise InvalidArgument or UnsupportedArgument unless the options go together."""
    choices = {
        "format": (format, FORMATS),
        "scale_rule": (scale_rule, SCALE_RULES),
        "rounding": (rounding, ROUNDINGS),
        "block": (block, BLOCKS),
    }
    for name, (value, valid) in choices.items():
        if value not in valid:
            raise InvalidArgument(op, name, f"one of {', '.join(valid)}", repr(value))
    if rounding != "nearest" and seed is None:
        fix = "pass torch.ops.fos.seed(device=x.device)"
        raise InvalidArgument(op, "seed", f"an int64 tensor for rounding={rounding!r}", None, fix)
    if format == "nvfp4":
        return
    if scale_rule in ADAPTIVE_RULES:
        fix = "use format='nvfp4' to choose between 4 and 6"
        raise UnsupportedArgument(
            op, "scale_rule", "static_6 or static_4 for mxfp4", scale_rule, fix
        )
    if block == "2d":
        raise UnsupportedArgument(op, "block", "1d for mxfp4", block, "use format='nvfp4'")
    if rounding == "stochastic_unbiased":
        fix = "use rounding='stochastic': an E8M0 scale is rounded up, so nothing clips"
        raise UnsupportedArgument(op, "rounding", "nearest or stochastic for mxfp4", rounding, fix)


def dtype_status(op: str, dtype: torch.dtype) -> Status:
    """Whether `dtype` can be quantized at all, on any device."""
    if dtype in DTYPES:
        return Status()
    return Status(f"{op}: x must be bfloat16, float16 or float32, got {dtype}; {_way_out(dtype)}")


def _way_out(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "quantize x.real and x.imag apart"
    return "cast it, for example x.float()"


def check_input(op: str, x: Tensor) -> None:
    """Raise UnsupportedArgument or InvalidArgument unless x is a matrix that can be quantized."""
    if x.dtype not in DTYPES:
        raise UnsupportedArgument(
            op, "x", "bfloat16, float16 or float32", x.dtype, _way_out(x.dtype)
        )
    if x.dim() not in (2, 3):
        raise InvalidArgument(
            op, "x", "[R, C] or [B, R, C]", list(x.shape), "reshape or flatten its leading dims"
        )


def known(*sizes: int) -> bool:
    """Whether all sizes are plain numbers: asking anything of a symbolic one would be a guard."""
    return not torch.compiler.is_dynamo_compiling() and all(type(size) is int for size in sizes)


def check_buffers(
    op: str, names: tuple[str, str], values: Tensor, scales: Tensor, format: str
) -> None:
    """Raise InvalidArgument unless the scales are those of the values, as far as sizes are known.

    A kernel reads the scales where the shape of the values says that they are.
    """
    both = " and ".join(names)
    if values.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise InvalidArgument(op, both, "uint8", f"{values.dtype} and {scales.dtype}", "view them")
    if values.dim() not in (2, 3) or scales.dim() != values.dim() - 1:
        required, actual = "[rows, P/2] and [L], or both with a batch", _shapes(values, scales)
        raise InvalidArgument(op, both, required, actual)
    if not known(*values.shape, *scales.shape):
        return
    *lead, rows, half = values.shape
    if half % (2 * WIDTH[format]):
        required = f"[.., P/2] with P a multiple of {4 * WIDTH[format]} for {format}"
        raise InvalidArgument(op, names[0], required, list(values.shape))
    shape = [*lead, scale_count(rows, 2 * half, format)]
    if list(scales.shape) != shape:
        required = f"{shape} for {format} {names[0]} {list(values.shape)}"
        raise InvalidArgument(op, names[1], required, list(scales.shape), "pass what quantize gave")


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(list(tensor.shape)) for tensor in tensors)


def constant(value: float, like: Tensor) -> Tensor:
    """float32 []: a choice between two Python numbers would have torch's default dtype."""
    return torch.full((), value, dtype=torch.float32, device=like.device)


def bits(x: Tensor) -> Tensor:
    """The int32 pattern of a float32 tensor."""
    return x.view(torch.int32)


def from_bits(x: Tensor) -> Tensor:
    """The float32 tensor of an int32 pattern."""
    return x.view(torch.float32)


def round_e4m3(s: Tensor) -> Tensor:
    """float32 in [0, inf) -> nearest-even E4M3 value, saturating at 448, as float32.

    Adding and removing 2^(e + 20), e the exponent of s, leaves 3 mantissa bits; the smallest
    normal exponent -6 serves the subnormals.
    """
    s = s.clamp(max=448.0)
    magic = from_bits((bits(s) & _EXPONENT).clamp(min=(127 - 6) << 23) + (20 << 23))
    return (s + magic) - magic


def encode_e4m3(value: Tensor) -> Tensor:
    """float32 that holds an E4M3 value >= 0 -> its byte as int32."""
    normal = (bits(value) >> 20) - ((127 - 7) << 3)
    return torch.where(value < 2.0**-6, (value * 512.0).to(torch.int32), normal)


def decode_e4m3(byte: Tensor) -> Tensor:
    """uint8 of any value -> float32; 0x7F and 0xFF are NaN."""
    code = byte.to(torch.int32)
    low = code & 0x7F
    value = torch.where(
        low < 8, low.to(torch.float32) * 2.0**-9, from_bits((low << 20) + ((127 - 7) << 23))
    )
    value = torch.where(low == 0x7F, float("nan"), value)
    return torch.where(code < 128, value, -value)


def encode_e8m0(s: Tensor) -> Tensor:
    """float32 >= 0 -> byte (as int32) of the power of two at or above it; 0 -> 0."""
    b = bits(s)
    return (b >> 23) + ((b & _MANTISSA) != 0).to(torch.int32)


def decode_e8m0(byte: Tensor) -> Tensor:
    """uint8 -> 2^(byte - 127) as float32; 0xFF is NaN."""
    code = byte.to(torch.int32)
    # Byte 0 is the subnormal 2^-127; 0xFF << 23 would be infinity.
    pattern = torch.where(code == 0, 1 << 22, code << 23)
    return torch.where(code == 255, float("nan"), from_bits(pattern))


def decode_scale(byte: Tensor, format: str) -> Tensor:
    """Scale bytes -> float32."""
    return decode_e4m3(byte) if format == "nvfp4" else decode_e8m0(byte)


def round_e2m1(a: Tensor) -> Tensor:
    """float32 in [0, inf] -> nearest-even E2M1 magnitude, saturating at 6, as float32."""
    a = a.clamp(max=6.0)
    # 2^22 has ulp 0.5. Selecting beats masking exponent bits: Inductor's C++ does not vectorize
    # reinterpreting casts.
    high = torch.where(a < 4.0, constant(2.0**23, a), 2.0**24)
    magic = torch.where(a < 2.0, 2.0**22, high)
    return (a + magic) - magic


def e2m1_steps(a: Tensor) -> tuple[Tensor, Tensor]:
    """float32 in [0, inf] -> (step of its binade: 0.5, 1 or 2; 1 / step)."""
    below_2, below_4 = a < 2.0, a < 4.0
    one = constant(1.0, a)
    step = torch.where(below_2, 0.5, torch.where(below_4, one, 2.0))
    inverse = torch.where(below_2, 2.0, torch.where(below_4, one, 0.5))
    return step, inverse


def encode_e2m1(q: Tensor) -> Tensor:
    """float32 E2M1 magnitude -> code 0..7 as float32 (the grid is concave in the code)."""
    return torch.minimum(torch.minimum(q * 2.0, q + 2.0), q * 0.5 + 4.0)


def decode_e2m1(code: Tensor) -> Tensor:
    """int32 code 0..15 -> float32; code 8 is -0.0."""
    c = (code & 7).to(torch.float32)
    q = torch.maximum(torch.maximum(c * 0.5, c - 2.0), c * 2.0 - 8.0)
    return torch.where(code < 8, q, -q)


def unpack(values: Tensor) -> Tensor:
    """uint8 [.., P/2] -> int32 codes [.., P]."""
    shifts = torch.arange(0, 8, 4, dtype=torch.int32, device=values.device)
    return ((values.to(torch.int32).unsqueeze(-1) >> shifts) & 15).flatten(-2)


def padded_cols(cols: int, format: str) -> int:
    """P: columns rounded up to 64 (nvfp4) or 128 (mxfp4)."""
    multiple = 4 * WIDTH[format]
    return (cols + multiple - 1) // multiple * multiple


def scale_count(rows: int, cols: int, format: str) -> int:
    """Entries of the blocked scale buffer of a [rows, cols] matrix."""
    return (rows + 127) // 128 * 128 * (padded_cols(cols, format) // WIDTH[format])


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """[.., R, C] -> [.., rows, C] with zeros; never looks at a symbolic size."""
    return torch.ops.aten.constant_pad_nd(x, [0, 0, 0, rows - x.shape[-2]])


def copied_view(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """`x` copied to contiguous `dtype` and viewed as `shape`.

    Tensor.reshape first asks whether a view would do, which guards on symbolic sizes being 1.
    """
    copied = torch.ops.aten._to_copy(x, dtype=dtype, memory_format=torch.contiguous_format)
    return copied.view(shape)


def to_blocked(scales: Tensor) -> Tensor:
    """Row-major uint8 [.., R, G], G % 4 == 0 -> 128x4 blocked [.., roundup(R, 128) * G].

    By index rather than by permuting [R/128, 4, 32, G/4, 4]: the metadata of a permuted tensor
    depends on which symbolic sizes are 1, and every such question is a guard.
    """
    *batch, rows, groups = scales.shape
    count = (rows + 127) // 128 * 128 * groups
    offset = torch.arange(count, device=scales.device)
    tile, inside = offset // 512, offset % 512
    band = groups // 4
    row = tile // band * 128 + inside % 16 // 4 * 32 + inside // 16
    column = tile % band * 4 + inside % 4
    source = torch.where(row < rows, row * groups + column, 0)
    picked = scales.reshape(*batch, rows * groups)[..., source]
    return torch.where(row < rows, picked, 0)


def from_blocked(blocked: Tensor, rows: int, groups: int) -> Tensor:
    """The inverse of `to_blocked`: [.., L] -> row-major [.., rows, groups]."""
    row = torch.arange(rows, device=blocked.device).unsqueeze(-1)
    column = torch.arange(groups, device=blocked.device)
    tile = row // 128 * (groups // 4) + column // 4
    return blocked[..., tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4]
