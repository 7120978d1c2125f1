from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from numerics import matmul_oracle, outside_budget, tensor_scale
from vectors import E2M1, E4M3, E8M0, row_major, unpack

from fos_compile.kernels.errors import FosError
from fos_compile.kernels.formats import qs_of

pytestmark = pytest.mark.usefixtures("implementation")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 3, 16), (17, 33, 70), (130, 129, 200), (64, 48, 1024)]


@dataclass(frozen=True, kw_only=True)
class Operand:
    """A quantized matrix [.., rows, cols] as fos::scaled_mm takes it."""

    values: torch.Tensor
    scales: torch.Tensor
    amax: torch.Tensor
    qs: float
    rows: int
    format: str

    @property
    def args(self):
        return self.values, self.scales, self.amax, self.qs

    @property
    def exact(self) -> torch.Tensor:
        """code * scale by this test's own tables: float64 [.., rows, P]."""
        codes = unpack(self.values)
        width, table = (32, E8M0) if self.format == "mxfp4" else (16, E4M3)
        scale = table[row_major(self.scales, self.rows, codes.shape[-1] // width)]
        scale = torch.from_numpy(scale).double().repeat_interleave(width, -1)
        return torch.from_numpy(E2M1[codes]).double() * scale


def _operand(shape, format="nvfp4", rule="mse", gain=1.0) -> Operand:
    return _quantized(torch.randn(shape) * gain, format, rule)


def _quantized(x: torch.Tensor, format="nvfp4", rule="mse") -> Operand:
    rule = "static_6" if format == "mxfp4" else rule
    amax = torch.ones(()) if format == "mxfp4" else torch.ops.fos.amax(x)
    values, scales = torch.ops.fos.quantize(x, amax, format=format, scale_rule=rule)
    qs = qs_of(format, rule, "nearest")
    return Operand(values=values, scales=scales, amax=amax, qs=qs, rows=x.shape[-2], format=format)


def _on(a: Operand, device: str) -> Operand:
    return Operand(**{k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(a).items()})


def _multiply(a: Operand, b: Operand, k: int, bias=None, out_dtype=torch.float32):
    return torch.ops.fos.scaled_mm(
        *a.args, *b.args, bias, format=a.format, m=a.rows, n=b.rows, k=k, out_dtype=out_dtype
    )


def _oracle(a: Operand, b: Operand, bias, out_dtype):
    alpha = tensor_scale(a.amax.item(), a.qs, b.amax.item(), b.qs)
    return matmul_oracle(a.exact, b.exact, alpha=alpha, bias=bias, out_dtype=out_dtype)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrix", "batch"])
@pytest.mark.parametrize("m,n,k", SHAPES)
def test_differs_from_float64_by_accumulation_only(m, n, k, batch, with_bias, format, out_dtype):
    a, b = _operand((*batch, m, k), format), _operand((*batch, n, k), format, "static_4", 0.1)
    bias = torch.randn(n) if with_bias else None
    got = _multiply(a, b, k, bias, out_dtype)
    exact, error = _oracle(a, b, bias, out_dtype)
    assert got.shape == (*batch, m, n) and got.dtype == out_dtype
    assert not outside_budget(got, exact, error).any()


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("which", ["code", "scale"])
def test_one_wrong_nibble_or_scale_is_outside_the_budget(which, format, out_dtype):
    a, b = _operand((17, 70), format), _operand((33, 70), format)
    exact, error = _oracle(a, b, None, out_dtype)
    for index in range(0, 35, 7):
        values, scales = a.values.clone(), a.scales.clone()
        if which == "code":
            values[3, index] ^= 0x20
        else:
            scales[3 * 16 + index // 16] += 1
        wrong = Operand(**{**vars(a), "values": values, "scales": scales})
        outside = outside_budget(_multiply(wrong, b, 70, None, out_dtype), exact, error)
        assert outside[3].any() and not outside[[0, 1, 2, 4]].any()


@pytest.mark.parametrize("out_dtype", DTYPES[1:])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rounds_once(out_dtype, with_bias):
    a, b = _operand((17, 200)), _operand((33, 200))
    bias = torch.randn(33) if with_bias else None
    wide = _multiply(a, b, 200, bias)
    assert torch.equal(_multiply(a, b, 200, bias, out_dtype), wide.to(out_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_is_added_in_float32_after_alpha(dtype):
    a, b = _operand((17, 70)), _operand((33, 70))
    bias = (torch.randn(33) * 100).to(dtype)
    got = _multiply(a, b, 70, bias)
    assert torch.equal(got, _multiply(a, b, 70) + bias.float())


def test_bias_given_by_name():
    a, b = _operand((17, 70)), _operand((33, 70))
    bias = torch.randn(33)
    sizes = {"m": 17, "n": 33, "k": 70, "out_dtype": torch.float32}
    got = torch.ops.fos.scaled_mm(*a.args, *b.args, bias=bias, **sizes)
    assert torch.equal(got, _multiply(a, b, 70, bias))


def test_tensor_scale_does_not_overflow():
    """amax_a * amax_b is beyond float32; alpha is not, nor are the results."""
    x, y = torch.zeros(8, 64), torch.zeros(8, 64)
    x[:, 0], x[:, 16] = torch.rand(8) * 1e21, torch.rand(8) * 1e17
    y[:, 0], y[:, 16] = torch.rand(8) * 1e14, torch.rand(8) * 1e18
    a, b = _quantized(x), _quantized(y)
    assert not torch.isfinite(a.amax * b.amax)
    exact, error = _oracle(a, b, None, torch.float32)
    assert (exact > 0).all()
    assert not outside_budget(_multiply(a, b, 64), exact, error).any()


def test_exact_products_of_small_integers():
    """Sums that float32 holds exactly leave no freedom at all."""
    x = torch.randint(-3, 4, (17, 64)).float() * 2
    y = torch.randint(-3, 4, (9, 64)).float() * 2
    x[:, ::16] = y[:, ::16] = 6
    amax, more = torch.tensor(6.0), {"scale_rule": "static_6"}
    a, b = (torch.ops.fos.quantize(t, amax, **more) for t in (x, y))
    sizes = {"m": 17, "n": 9, "k": 64, "out_dtype": torch.float32}
    one = torch.tensor(2688.0)
    got = torch.ops.fos.scaled_mm(*a, one, 2688.0, *b, one, 2688.0, **sizes)
    assert torch.equal(got, (x @ y.t()) * 448**2)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_non_finite_operands_never_give_finite_results(format):
    x = torch.randn(17, 70)
    x[4, 9] = float("nan")
    got = _multiply(_quantized(x, format), _operand((33, 70), format), 70)
    assert got[4].isnan().all()
    # A dynamic amax poisons the tensor; without one the row alone.
    assert got.isnan().all() if format == "nvfp4" else got[:4].isfinite().all()


@pytest.mark.parametrize("m,n,k", [(0, 5, 64), (5, 0, 64), (5, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("batch", [(), (2,), (0,)])
def test_empty(m, n, k, batch):
    a, b = _operand((*batch, m, k)), _operand((*batch, n, k))
    got = _multiply(a, b, k, torch.ones(n), torch.bfloat16)
    assert got.shape == (*batch, m, n)
    assert (got == 1).all()


def test_strided_buffers():
    a, b = _operand((17, 70)), _operand((33, 70))
    values = torch.stack([a.values, a.values], -1)[..., 0]
    assert not values.is_contiguous()
    strided = Operand(**{**vars(a), "values": values})
    assert torch.equal(_multiply(strided, b, 70), _multiply(a, b, 70))


def test_meta_device():
    a, b = _operand((2, 17, 70)), _operand((2, 33, 70))
    got = _multiply(_on(a, "meta"), _on(b, "meta"), 70, None, torch.half)
    assert got.is_meta and got.shape == (2, 17, 33) and got.dtype == torch.half


def test_bad_arguments():
    a, b = _operand((17, 70)), _operand((33, 70))
    with pytest.raises(FosError, match=r"nvfp4, mxfp4.*fp4"):
        _multiply(Operand(**{**vars(a), "format": "fp4"}), b, 70)
    batched = _operand((2, 33, 70))
    with pytest.raises(FosError, match="a and b"):
        _multiply(a, batched, 70)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"values": lambda a: a.values.int()}, "a and scales_a must be uint8"),
        ({"scales": lambda a: a.scales.float()}, "a and scales_a must be uint8"),
        ({"scales": lambda a: a.scales[:8]}, r"scales_a must be \[1024\].*got \[8\]"),
        ({"values": lambda a: a.values[:, :48]}, "P a multiple of 64"),
        ({"rows": lambda a: 16}, "m and n must be 17 and 33, .*got 16 and 33"),
    ],
)
def test_an_operand_that_does_not_fit_is_refused(changes, message, device):
    a, b = _operand((17, 70)), _operand((33, 70))
    wrong = Operand(**{**vars(a), **{name: change(a) for name, change in changes.items()}})
    with pytest.raises(FosError, match=message):
        _multiply(_on(wrong, device), _on(b, device), 70)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operands_that_do_not_fit_each_other_are_refused(device):
    a, b = (_on(_operand((rows, 70)), device) for rows in (17, 33))
    with pytest.raises(FosError, match=r"k must be at most 128, .*got 129"):
        _multiply(a, b, 129)
    with pytest.raises(FosError, match="a and b must be equal in batch and P"):
        _multiply(a, _on(_operand((33, 200)), device), 70)


@pytest.mark.parametrize(
    ("left", "right", "match"),
    [
        (torch.ones(4, 64), torch.ones(4, 32), r"\[m, P\].*got \[4, 64\] and \[4, 32\]"),
        (torch.ones(2, 4, 64), torch.ones(4, 64), r"\[B, m, P\]"),
        (torch.ones(64), torch.ones(64), r"\[m, P\]"),
        (torch.ones(4, 64).half(), torch.ones(4, 64).half(), "float32, got torch.float16"),
        (torch.ones(4, 64), torch.ones(4, 64).bfloat16(), "float32 and torch.bfloat16"),
    ],
)
def test_unpacked_operands_that_do_not_go_together(left, right, match):
    amax = torch.ones(())
    with pytest.raises(FosError, match=match):
        torch.ops.fos.unpacked_mm(left, right, amax, 1.0, amax, 1.0, out_dtype=torch.float32)


@pytest.mark.parametrize("which", [2, 6])
def test_an_amax_has_one_element(which):
    """One a row would be broadcast along columns, without a word."""
    a, b = _operand((4, 64)), _operand((4, 64))
    arguments = [*a.args, *b.args]
    arguments[which] = arguments[which].repeat(4)
    with pytest.raises(FosError, match=r"amax_[ab] must be one element, got shape \[4\]"):
        torch.ops.fos.scaled_mm(*arguments, m=4, n=4, k=64, out_dtype=torch.float32)
