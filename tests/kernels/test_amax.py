from __future__ import annotations

import numpy as np
import pytest
import torch
from vectors import make, oracle

from fos_compile.kernels.errors import FosError

pytestmark = pytest.mark.usefixtures("implementation")

F = np.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rht", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (17, 70), (130, 33), (3, 18, 66)])
def test_matches_the_oracle(shape, rht, transpose, dtype):
    data = make.data(shape, "wide", 7, dtype)
    opt = oracle.Options(dtype=dtype, rht=rht, transpose=transpose)
    want = oracle.tensor_amax(list(data) if data.ndim == 3 else [data], opt)
    got = torch.ops.fos.amax(torch.from_numpy(data).to(getattr(torch, dtype)), rht, transpose)
    assert got.shape == () and got.dtype == torch.float32
    assert got.item() == want


@pytest.mark.parametrize("rht", [False, True])
@pytest.mark.parametrize("place", [(0, 0), (16, 69), (8, 30)])
def test_nan_wins_and_infinity_is_infinite_or_nan(place, rht):
    x = torch.randn(17, 70)
    x[place] = float("nan")
    assert torch.ops.fos.amax(x, rht).isnan()
    x[place] = -float("inf")
    got = torch.ops.fos.amax(x, rht)
    # The butterfly adds infinities of both signs only when a group holds two of them.
    assert got == float("inf")


def test_infinities_of_both_signs_in_a_group_are_nan_after_rht():
    x = torch.zeros(1, 64)
    x[0, 0] = x[0, 1] = float("inf")
    assert torch.ops.fos.amax(x, True).isnan()
    assert torch.ops.fos.amax(x) == float("inf")


@pytest.mark.parametrize("rht", [False, True])
@pytest.mark.parametrize("shape", [(0, 64), (5, 0), (0, 0), (2, 0, 3), (0, 4, 64)])
def test_empty_is_zero(shape, rht):
    assert torch.ops.fos.amax(torch.empty(shape, dtype=torch.half), rht, True).item() == 0


def test_a_batch_has_one_maximum():
    x = torch.randn(3, 18, 66)
    assert torch.ops.fos.amax(x) == torch.stack([torch.ops.fos.amax(m) for m in x]).max()


def test_orientation_matters_only_after_rht():
    x = torch.randn(32, 64)
    assert torch.ops.fos.amax(x, False, True) == torch.ops.fos.amax(x)
    assert torch.ops.fos.amax(x, True, True) == torch.ops.fos.amax(x.t().contiguous(), True)
    assert torch.ops.fos.amax(x, True, True) != torch.ops.fos.amax(x, True)


def test_negative_zero_has_magnitude_zero():
    got = torch.ops.fos.amax(torch.full((4, 64), -0.0))
    assert got == 0 and not got.signbit()


def test_strided_input():
    base = torch.randn(2, 40, 3, 50)
    for x in (base[:, :, 1], base[0, :, 0].t(), base[1, ::3, 2, 1:48:2]):
        for rht in (False, True):
            assert torch.ops.fos.amax(x, rht) == torch.ops.fos.amax(x.contiguous(), rht)


def test_meta_device():
    got = torch.ops.fos.amax(torch.empty(4, 64, device="meta"))
    assert got.is_meta and got.shape == () and got.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.complex64])
def test_other_dtypes_are_refused_by_name(dtype):
    with pytest.raises(FosError, match=f"bfloat16, float16 or float32.*{dtype}"):
        torch.ops.fos.amax(torch.ones(4, 64).to(dtype))
