from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree
from vectors import E2M1, E4M3, E8M0, oracle, row_major, run_quantize, unpack

from fos_compile.kernels.errors import FosError

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH = {"nvfp4": 16, "mxfp4": 32}
TABLE = {"nvfp4": E4M3, "mxfp4": E8M0}
ROWS = 64


def _every_byte(format: str) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """values, scales, codes and scale bytes of all 16 codes under all 256 scale bytes."""
    width = WIDTH[format]
    codes = np.tile(np.arange(16), (ROWS, 4 * width // 16))
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    bytes_ = np.arange(256, dtype=np.uint8).reshape(ROWS, 4)
    scales = torch.from_numpy(oracle.block_layout(bytes_))
    return torch.from_numpy(packed), scales, codes, np.repeat(bytes_, width, 1)


def _round_float32(x: np.ndarray) -> np.ndarray:
    """float64 -> nearest-even float32 with an unlimited exponent upwards, as float64."""
    with np.errstate(invalid="ignore"):
        mantissa, exponent = np.frexp(x)
        wide = np.ldexp(mantissa.astype(np.float32).astype(np.float64), exponent)
        return np.where(np.abs(x) < 2.0**-126, x.astype(np.float32).astype(np.float64), wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", WIDTH)
def test_all_codes_and_scale_bytes_without_amax(format, dtype):
    values, scales, codes, bytes_ = _every_byte(format)
    got = torch.ops.fos.dequantize(values, scales, None, *codes.shape, format=format, dtype=dtype)
    exact = E2M1[codes].astype(np.float64) * TABLE[format][bytes_].astype(np.float64)
    with np.errstate(over="ignore"):
        want = torch.from_numpy(exact.astype(np.float32)).to(dtype)
    assert got.dtype == dtype and got.shape == codes.shape
    np.testing.assert_array_equal(got.float(), want.float())
    if format == "nvfp4" and dtype is not torch.float16:
        finite = np.isfinite(exact)
        np.testing.assert_array_equal(got.double().numpy()[finite], exact[finite])
    assert got.isnan().any(1).sum() == (2 if format == "nvfp4" else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amax", [2.0**-116, 0.37, 1.0, 1.1, 4.5, 1e30, 3.3e38, float("inf")])
@pytest.mark.parametrize("qs", [1536.0, 2688.0, float(np.float32(1536 * 16 / 17))])
def test_all_codes_and_scale_bytes_with_amax(amax, qs, dtype):
    values, scales, codes, bytes_ = _every_byte("nvfp4")
    got = torch.ops.fos.dequantize(
        values, scales, torch.tensor(amax), *codes.shape, qs=qs, dtype=dtype
    )
    # Quotients of float32 survive float64 on the way to float32: 53 >= 2 * 24 + 2 bits.
    with np.errstate(invalid="ignore", over="ignore"):
        product = _round_float32((E2M1[codes] * E4M3[bytes_]) * np.float64(np.float32(amax)))
        want = torch.from_numpy((product / qs).astype(np.float32)).to(dtype)
    np.testing.assert_array_equal(got.float(), want.float())


@pytest.mark.parametrize("format", WIDTH)
def test_amax_of_nan_is_nan_everywhere(format):
    values, scales, codes, _ = _every_byte(format)
    amax = torch.tensor(float("nan"))
    got = torch.ops.fos.dequantize(
        values, scales, amax, *codes.shape, format=format, dtype=torch.float32
    )
    assert got.isnan().all()


@pytest.mark.parametrize("format,amax", [("nvfp4", 1792.0 * 1.5), ("mxfp4", 1.0)])
def test_round_trip_of_all_codes_and_scales(format, amax):
    """Where a block holds a six and E = 1, quantizing the decoded matrix gives its own bytes."""
    values, scales, codes, bytes_ = _every_byte(format)
    opt = oracle.Options(format=format, scale_rule="static_6")
    decoded = torch.ops.fos.dequantize(
        values, scales, None, *codes.shape, format=format, dtype=torch.float32
    )
    again, again_scales = run_quantize(decoded, torch.tensor(amax), opt)
    width, top = WIDTH[format], {"nvfp4": 0x7F, "mxfp4": 253}[format]
    kept = bytes_[:, ::width]
    got = row_major(again_scales, ROWS, 4)
    usable = (kept > 0) & (kept < top)
    np.testing.assert_array_equal(got[usable], kept[usable])
    # Code 8 is a negative zero; quantizing gives it code 0.
    want = np.where(codes == 8, 0, codes)
    wide = np.repeat(usable, width, 1)
    np.testing.assert_array_equal(unpack(again)[wide], want[wide])
    lost = np.isnan(TABLE[format][kept])
    assert lost.any() and (got[lost] == {"nvfp4": 0x7F, "mxfp4": 0xFF}[format]).all()


def test_logical_size_cuts_the_padding():
    values = torch.randint(256, (3, 18, 64), dtype=torch.uint8)
    scales = torch.randint(0x70, (3, 128 * 8), dtype=torch.uint8)
    full = torch.ops.fos.dequantize(values, scales, None, 18, 128, dtype=torch.float32)
    for cols in (1, 65, 127):
        part = torch.ops.fos.dequantize(values, scales, None, 18, cols, dtype=torch.float32)
        assert torch.equal(part, full[..., :cols])
    for i in range(3):
        one = torch.ops.fos.dequantize(values[i], scales[i], None, 18, 128, dtype=torch.float32)
        assert torch.equal(one, full[i])


@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0), (2, 0, 64), (0, 5, 64), (2, 5, 0)])
def test_empty(shape):
    x = torch.empty(shape)
    values, scales = torch.ops.fos.quantize(x, torch.zeros(()))
    for amax in (None, torch.zeros(())):
        got = torch.ops.fos.dequantize(values, scales, amax, *shape[-2:], dtype=torch.half)
        assert got.shape == shape and got.dtype == torch.half


def test_strided_buffers():
    values, scales, codes, _ = _every_byte("nvfp4")
    want = torch.ops.fos.dequantize(values, scales, None, *codes.shape, dtype=torch.float32)
    wide = torch.stack([values, values + 1], -1)[..., 0]
    long = torch.stack([scales, scales + 1], -1)[..., 0]
    got = torch.ops.fos.dequantize(wide, long, None, *codes.shape, dtype=torch.float32)
    assert not wide.is_contiguous()
    np.testing.assert_array_equal(got, want)


def test_meta_device():
    values, scales, _, _ = _every_byte("nvfp4")
    got = torch.ops.fos.dequantize(
        values.to("meta"), scales.to("meta"), None, 64, 60, dtype=torch.half
    )
    assert got.is_meta and got.shape == (64, 60) and got.dtype == torch.half


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments(device):
    values, scales, codes, _ = _every_byte("nvfp4")
    buffers = values.to(device), scales.to(device), None, *codes.shape
    with pytest.raises(FosError, match=r"nvfp4, mxfp4.*int4"):
        torch.ops.fos.dequantize(*buffers, format="int4", dtype=torch.float32)
    with pytest.raises(FosError, match=r"bfloat16, float16 or float32.*float64"):
        torch.ops.fos.dequantize(*buffers, dtype=torch.float64)


# 18 rows of 128 columns: 18 x 64 values; 128 x 8 scales (nvfp4), 128 x 4 (mxfp4).
MISFITS = {
    "values": ({"values": torch.zeros(18, 64, dtype=torch.int32)}, "uint8"),
    "scales": ({"scales": torch.zeros(1024)}, "uint8.*float32"),
    "rank": ({"scales": torch.zeros(1, 1024, dtype=torch.uint8)}, r"values and scales must be \["),
    "width": ({"values": torch.zeros(18, 48, dtype=torch.uint8)}, "P a multiple of 64"),
    "short": ({"scales": torch.zeros(8, dtype=torch.uint8)}, r"scales must be \[1024\].*got \[8\]"),
    "format": ({"format": "mxfp4"}, r"scales must be \[512\] for mxfp4"),
    "rows": ({"rows": 17}, "rows must be 18"),
    "cols": ({"cols": 129}, "cols must be at most 128"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", MISFITS)
def test_buffers_that_do_not_fit_are_refused(case, device):
    good = {
        "values": torch.zeros(18, 64, dtype=torch.uint8),
        "scales": torch.zeros(1024, dtype=torch.uint8),
        "amax": None,
        "rows": 18,
        "cols": 128,
    }
    changes, message = MISFITS[case]
    call = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), {**good, **changes})
    with pytest.raises(FosError, match=message):
        torch.ops.fos.dequantize(**call, dtype=torch.float32)
    batched = pytree.tree_map_only(torch.Tensor, lambda t: t.unsqueeze(0), call)
    with pytest.raises(FosError):
        torch.ops.fos.dequantize(**batched, dtype=torch.float32)
