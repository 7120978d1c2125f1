"""Regenerates vectors.safetensors from oracle.py: `python tests/vectors/make.py`.

For case NAME the file holds NAME/x, NAME/amax, NAME/values, NAME/scales (blocked layout) and
NAME/dequantized (float32, in the rows and columns of the quantized matrix); the options of the
cases and `philox`, rows of (counter, key, words), are JSON under `about` in its metadata.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import oracle
import torch
from oracle import E2M1, E4M3, F, Options
from safetensors.torch import save

PATH = Path(__file__).with_name("vectors.safetensors")
WORD = 0xFFFFFFFF
# The first three are the published known answers of Random123 (kat_vectors, philox4x32 10).
PHILOX = [
    ((0, 0, 0, 0), (0, 0)),
    ((WORD, WORD, WORD, WORD), (WORD, WORD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)),
    ((1, 0, 0, 0), (0x12345678, 0x9ABCDEF0)),
    ((5, 1, 7, 0), (0x80000000, 0x7FFFFFFF)),
]
SEED = -0x123456789ABCDEF


Case = tuple[str, tuple[int, ...], str, float | None, Options]
"""Name, shape, kind of data, static amax or None, options."""


def rows() -> list[Case]:
    """Every case; its position seeds its data."""
    return [*every_rule(), *special_cases(), *mxfp4_cases(), *later_cases()]


def every_rule() -> list[Case]:
    """Each nvfp4 rule under each rounding and block, all dtypes."""
    o = Options
    out: list[Case] = []
    for rule in ("mse", "mae", "abs_max", "static_6", "static_4"):
        out += [
            (f"{rule}_unaligned", (17, 70), "randn", None, o(scale_rule=rule)),
            (
                f"{rule}_fp16_rht",
                (5, 100),
                "randn",
                None,
                o(scale_rule=rule, dtype="float16", rht=True),
            ),
            (
                f"{rule}_fp32_2d",
                (19, 50),
                "wide",
                None,
                o(scale_rule=rule, dtype="float32", block="2d"),
            ),
            (
                f"{rule}_transpose_2d_rht",
                (40, 21),
                "wide",
                None,
                o(scale_rule=rule, block="2d", rht=True, transpose=True),
            ),
        ]
        for rounding in oracle.STOCHASTIC[:3]:
            out += both_blocks(rule, rounding)
    return out


def both_blocks(rule: str, rounding: str) -> list[Case]:
    """A rule under a rounding that has dice."""
    out: list[Case] = []
    for block in ("1d", "2d"):
        options = Options(scale_rule=rule, rounding=rounding, block=block, seed=SEED, stream=3)
        out.append((f"{rule}_{rounding}_{block}", (20, 80), "wide", None, options))
    return out


def special_cases() -> list[Case]:
    """Sizes, layouts and values that need care."""
    o = Options
    sr = o(rounding="stochastic", seed=77, stream=12)
    return [
        ("one_element", (1, 1), "randn", None, o()),
        ("rows_above_128", (131, 64), "wide", None, o()),
        ("groups_above_4", (3, 200), "wide", None, o()),
        ("fp32_rht", (7, 33), "randn", None, o(dtype="float32", rht=True)),
        ("transpose", (70, 130), "randn", None, o(transpose=True)),
        ("batched", (3, 18, 66), "wide", None, o()),
        ("batched_transpose_2d", (2, 18, 33), "wide", None, o(transpose=True, block="2d")),
        ("batched_stochastic", (3, 18, 66), "wide", None, sr),
        (
            "stochastic_transpose_rht",
            (30, 41),
            "randn",
            None,
            o(rounding="stochastic", seed=5, stream=1, transpose=True, rht=True),
        ),
        (
            "stochastic_fp32",
            (4, 64),
            "wide",
            None,
            o(rounding="stochastic", seed=2**40 + 1, dtype="float32"),
        ),
        ("zeros", (3, 64), "zeros", None, o()),
        ("negative_zeros", (3, 64), "negzero", None, o()),
        ("nan_dynamic", (4, 64), "nan", None, o()),
        ("inf_dynamic", (4, 64), "inf", None, o(scale_rule="mae")),
        ("nan_static", (20, 64), "nan", 4.0, o()),
        ("inf_static", (20, 64), "inf", 4.0, o(scale_rule="static_6")),
        ("nan_static_2d", (20, 64), "nan", 4.0, o(block="2d")),
        ("inf_static_stochastic", (4, 64), "inf", 4.0, sr),
        ("nan_rht", (4, 64), "nan", 4.0, o(rht=True)),
        ("static_amax_saturates", (6, 64), "wide", 0.5, o()),
        ("tiny_amax_zero", (3, 64), "tiny-117", None, o()),
        ("tiny_amax_first", (3, 64), "tiny-114", None, o(scale_rule="mae")),
        ("tiny_amax_static", (3, 64), "tiny-114", None, o(scale_rule="static_6", dtype="float32")),
        ("subnormal_scales", (9, 64), "range", None, o()),
        ("subnormal_scales_stochastic", (9, 64), "range", None, sr),
        ("huge", (3, 64), "huge", None, o(scale_rule="mae")),
    ]


def mxfp4_cases() -> list[Case]:
    """Both rules of mxfp4."""
    o = Options
    out: list[Case] = []
    for rule in ("static_6", "static_4"):
        mx = {"format": "mxfp4", "scale_rule": rule}
        out += [
            (f"mxfp4_{rule}_unaligned", (17, 70), "wide", None, o(**mx)),
            (
                f"mxfp4_{rule}_rht_transpose",
                (130, 10),
                "randn",
                None,
                o(**mx, rht=True, transpose=True, dtype="float32"),
            ),
            (
                f"mxfp4_{rule}_stochastic",
                (9, 128),
                "wide",
                None,
                o(**mx, rounding="stochastic", seed=9, stream=2),
            ),
            (f"mxfp4_{rule}_nan", (4, 70), "nan", None, o(**mx)),
            (f"mxfp4_{rule}_range", (9, 70), "range", None, o(**mx, dtype="float32")),
        ]
    return out


def later_cases() -> list[Case]:
    """Further cases, after all others so that those keep their data."""
    o = Options
    sr = o(rounding="stochastic", seed=21)
    return [
        ("divisor_underflows", (1, 32), "sliver", None, o()),
        ("divisor_underflows_static", (1, 32), "sliver", None, o(scale_rule="static_6")),
        ("divisor_underflows_stochastic", (1, 32), "sliver", None, sr),
        ("divisor_underflows_2d", (17, 32), "sliver", None, o(dtype="float32", block="2d")),
        *hardware_cases(),
    ]


def hardware_cases() -> list[Case]:
    """The stochastic rounding of the hardware under every rule and in both formats."""
    rules = ("mse", "mae", "abs_max", "static_6", "static_4")
    hardware = Options(rounding="stochastic_hardware", seed=SEED, stream=5)
    mx = {"format": "mxfp4", "scale_rule": "static_6", "dtype": "float16"}
    rotated = replace(hardware, dtype="float32", rht=True)
    return [
        *(case for rule in rules for case in both_blocks(rule, hardware.rounding)),
        ("hardware_fp32_rht", (7, 100), "range", None, rotated),
        ("hardware_negative_zeros", (3, 64), "negzero", 4.0, hardware),
        ("hardware_mxfp4", (9, 128), "wide", None, replace(hardware, **mx, transpose=True)),
        ("hardware_saturates", (6, 64), "wide", 0.5, replace(hardware, scale_rule="static_6")),
    ]


def data(shape: tuple[int, ...], kind: str, seed: int, dtype: str) -> np.ndarray:
    """float32 array already rounded to `dtype`."""
    rng = np.random.RandomState(seed)  # the one generator whose stream numpy has frozen
    x = rng.standard_normal(shape)
    if kind == "wide":
        x *= 2.0 ** rng.randint(-6, 7, (*shape[:-1], 1))
    elif kind == "range":
        x *= 2.0 ** np.linspace(-30, 4, shape[-2])[:, None]
    elif kind in ("zeros", "negzero"):
        x *= -0.0
        x = np.abs(x) if kind == "zeros" else -np.abs(x)
    elif kind.startswith("tiny"):
        x = np.clip(x, -3.9, 3.9) * 2.0 ** (int(kind[4:]) - 2)
    elif kind == "sliver":  # a block with one element, 2^-17 of an amax of 2^-112
        x *= 0.0
        x[..., 0], x[..., 16] = 2.0**-112, 2.0**-129
    elif kind == "huge":
        x *= 1e37 if dtype != "float16" else 2e4
    elif kind in ("nan", "inf"):
        flat = x.reshape(-1)
        flat[3], flat[-7] = (np.nan, np.nan) if kind == "nan" else (np.inf, -np.inf)
    return oracle.round_to(x.astype(F), dtype)


def dequantize(
    values: np.ndarray, scales: np.ndarray, amax: np.float32, cols: int, opt: Options
) -> np.ndarray:
    """((q * s) * amax) / qs, one float32 rounding each; scales row-major."""
    codes = np.stack([values & 15, values >> 4], -1).reshape(values.shape[0], -1)[:, :cols]
    q = np.array(E2M1 + [-v for v in E2M1], F)[codes]
    if opt.format == "mxfp4":
        table = np.array([2.0 ** (b - 127) for b in range(255)] + [np.nan], F)
        return q * np.repeat(table[scales], 32, 1)[:, :cols]
    table = np.array([*E4M3, np.nan], F)
    shift = F(2.0**-12) if amax > 1 else F(1)
    scaled = (q * np.repeat(table[scales], 16, 1)[:, :cols]) * (amax * shift)
    return scaled / (opt.qs * shift)


def build() -> bytes:
    """The bytes of the vector file."""
    tensors: dict[str, torch.Tensor] = {}
    cases: dict[str, dict[str, object]] = {}
    for number, (name, shape, kind, static, opt) in enumerate(rows()):
        x = data(shape, kind, number, opt.dtype)
        matrices = list(x) if x.ndim == 3 else [x]
        amax = oracle.tensor_amax(matrices, opt) if static is None else F(static)
        height = shape[-1] if opt.transpose else shape[-2]
        width = shape[-2] if opt.transpose else shape[-1]
        parts = [
            oracle.quantize(m, amax, opt, first_row=i * height) for i, m in enumerate(matrices)
        ]
        result = {
            "values": [v for v, _ in parts],
            "scales": [oracle.block_layout(s) for _, s in parts],
            "dequantized": [dequantize(v, s, amax, width, opt) for v, s in parts],
        }
        for key, arrays in result.items():
            array = np.stack(arrays) if x.ndim == 3 else arrays[0]
            tensors[f"{name}/{key}"] = torch.from_numpy(np.ascontiguousarray(array))
        tensors[f"{name}/x"] = torch.from_numpy(x).to(getattr(torch, opt.dtype))
        tensors[f"{name}/amax"] = torch.tensor(amax)
        cases[name] = {**asdict(opt), "static_amax": static is not None}
    answers = [[list(c), list(k), oracle.philox(c, k)] for c, k in PHILOX]
    # One key: the order of several would change from run to run.
    return save(tensors, metadata={"about": json.dumps({"cases": cases, "philox": answers})})


if __name__ == "__main__":
    with np.errstate(all="ignore"):
        PATH.write_bytes(build())
