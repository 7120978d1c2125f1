"""The kernels of every operator, best first, and what each of them serves."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels import formats
from fos_compile.kernels.cute import (
    conversions,
    host_amax_rotated,
    host_dequantize_blocks,
    host_oriented,
    host_quantize_blocks,
    host_quantize_filtered,
    host_quantize_staged,
    host_quantize_tiles,
    host_quantize_tiles_staged,
    layout,
)
from fos_compile.kernels.cute.cache import Kernel, KernelKey
from fos_compile.kernels.cute.host_general import Launch

Options = tuple[Any, ...]
"""Values of an operator's options, in the order of `NAMES`."""
NAMES = {
    "quantize": ("format", "scale_rule", "rounding", "block", "rht", "transpose"),
    "amax": ("rht",),
    "dequantize": ("format", "scaled", "dtype"),
    "quantize_pair": (
        "format",
        "scale_rule",
        "block",
        "rounding_row",
        "rounding_col",
        "rht_row",
        "rht_col",
    ),
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "quantize": {
        "format": "nvfp4",
        "scale_rule": "mse",
        "rounding": "nearest",
        "block": "1d",
        "rht": False,
        "transpose": False,
    },
    "amax": {"rht": False, "transpose": False},
    "dequantize": {"format": "nvfp4", "scaled": False, "dtype": torch.bfloat16},
    "quantize_pair": {
        "format": "nvfp4",
        "scale_rule": "mse",
        "block": "1d",
        "rounding_row": "nearest",
        "rounding_col": "nearest",
        "rht_row": False,
        "rht_col": False,
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One kernel, for one class of layouts."""

    name: str
    dtypes: tuple[torch.dtype, ...]
    options: dict[str, tuple[Any, ...]]
    """Accepted values by option, of every option."""
    layout: Callable[[Tensor], str]
    """Why the kernel cannot read a matrix (transposed already), or nothing."""
    prepare: Callable[..., Launch]
    """(compiled kernel, SMs, key, matrix) to the launch for all matrices of its layout, shape and
    device, which takes the tensors of a call: the matrix before it is transposed, if it is.
    """
    alignment: int = 1
    reads: dict[str, bool] = field(default_factory=dict)
    """How the matrix is read, as further static options."""

    def launch(self, kernel: Kernel, num_sms: int, key: KernelKey, x: Tensor, *rest: Any) -> Any:
        """One call from scratch."""
        return self.prepare(kernel, num_sms, key, x)(x, *rest)

    def refuses(self, names: tuple[str, ...], dtype: torch.dtype, options: Options) -> str:
        """The first option that this kernel does not serve, or nothing."""
        if dtype not in self.dtypes:
            return f"x must be {_either(self.dtypes)}, got {dtype}"
        for name, actual in zip(names, options, strict=True):
            if actual not in self.options[name]:
                return f"{name} must be {_either(self.options[name])}, got {actual}"
        return ""

    def key(self, dtype: torch.dtype, options: Options) -> KernelKey:
        """What is compiled for these options."""
        chosen = dict(zip(self.options, options, strict=True))
        chosen.pop("transpose", None)  # a view with other strides
        chosen = {name: _plain(value) for name, value in chosen.items()}
        return KernelKey(
            name=self.name,
            dtype=_plain(dtype),
            options=tuple({**chosen, **self.reads}.items()),
            alignment=self.alignment,
        )


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _either(choices: tuple[Any, ...]) -> str:
    return " or ".join(map(str, choices))


BOTH = (False, True)
_READS: tuple[tuple[dict[str, bool], int, Callable[[Tensor], str]], ...] = (
    ({"by_column": False, "vector": True}, layout.VECTOR_BYTES, layout.vector),
    ({"by_column": True, "vector": False}, 1, layout.by_column),
    ({"by_column": False, "vector": False}, 1, layout.anything),
)


def _general(
    name: str,
    options: dict[str, tuple[Any, ...]],
    host: Any,
    dtypes: tuple[torch.dtype, ...] = formats.DTYPES,
) -> tuple[Entry, ...]:
    """A kernel that reads any matrix, in every way that it does."""
    return tuple(
        Entry(
            name=name,
            dtypes=dtypes,
            options=options,
            alignment=alignment,
            layout=reads_it,
            prepare=host.prepare,
            reads=reads,
        )
        for reads, alignment, reads_it in _READS
    )


FILTERED: dict[str, tuple[Any, ...]] = {
    "format": ("nvfp4",),
    "scale_rule": ("mse", "static_6"),
    "rounding": ("nearest",),
    "block": ("1d",),
    "rht": BOTH,
    "transpose": BOTH,
}
"""What has a filter."""
DICE = ("stochastic", "stochastic_unbiased")


def _staged(reads_it: Callable[[Tensor], str], by_column: bool, *roundings: str) -> Entry:
    """One orientation of the kernel for pairs."""
    return Entry(
        name="quantize_staged",
        dtypes=(torch.bfloat16,),
        options={**FILTERED, "rounding": roundings},
        alignment=layout.VECTOR_BYTES,
        layout=reads_it,
        prepare=host_quantize_staged.prepare,
        reads={"by_column": by_column, "vector": True},
    )


def _tiles(reads_it: Callable[[Tensor], str], by_column: bool) -> Entry:
    """One orientation of the kernel for pairs of tiles."""
    return Entry(
        name="quantize_tiles_staged",
        dtypes=(torch.bfloat16,),
        options={**FILTERED, "block": ("2d",), "rht": (False,)},
        alignment=layout.VECTOR_BYTES,
        layout=reads_it,
        prepare=host_quantize_tiles_staged.prepare,
        reads={"by_column": by_column, "vector": True},
    )


_ROWS, *_OTHERWISE = _general(
    "quantize_filtered", FILTERED, host_quantize_filtered, (torch.bfloat16,)
)
TABLES: dict[str, tuple[Entry, ...]] = {
    "quantize": (
        _ROWS,
        _staged(layout.vector, False, *DICE),
        _staged(host_oriented.columns, True, "nearest", *DICE),
        *_OTHERWISE,
        _tiles(layout.vector, False),
        _tiles(host_oriented.columns, True),
        Entry(
            name="quantize_tiles",
            dtypes=formats.DTYPES,
            options={
                "format": ("nvfp4",),
                "scale_rule": formats.SCALE_RULES,
                "rounding": formats.ROUNDINGS,
                "block": ("2d",),
                "rht": BOTH,
                "transpose": BOTH,
            },
            layout=layout.anything,
            prepare=host_quantize_tiles.prepare,
        ),
        *_general(
            "quantize_blocks",
            {
                "format": ("nvfp4",),
                "scale_rule": formats.SCALE_RULES,
                "rounding": formats.ROUNDINGS,
                "block": ("1d",),
                "rht": BOTH,
                "transpose": BOTH,
            },
            host_quantize_blocks,
        ),
        *_general(
            "quantize_blocks",
            {
                "format": ("mxfp4",),
                "scale_rule": ("static_6", "static_4"),
                "rounding": tuple(r for r in formats.ROUNDINGS if r != "stochastic_unbiased"),
                "block": ("1d",),
                "rht": BOTH,
                "transpose": BOTH,
            },
            host_quantize_blocks,
        ),
    ),
    "amax": _general("amax_rotated", {"rht": (True,)}, host_amax_rotated),
    "dequantize": (
        Entry(
            name="dequantize_blocks",
            dtypes=(torch.uint8,),
            options={"format": formats.FORMATS, "scaled": BOTH, "dtype": formats.DTYPES},
            layout=host_dequantize_blocks.layout,
            prepare=host_dequantize_blocks.prepare,
        ),
    ),
    "quantize_pair": (
        Entry(
            name="quantize_staged",
            dtypes=(torch.bfloat16,),
            options={
                "format": ("nvfp4",),
                "scale_rule": ("mse", "static_6"),
                "block": ("1d",),
                "rounding_row": ("nearest", *DICE),
                "rounding_col": ("nearest", *DICE),
                "rht_row": BOTH,
                "rht_col": BOTH,
            },
            alignment=layout.VECTOR_BYTES,
            layout=layout.vector,
            prepare=host_quantize_staged.prepare,
            reads={"vector": True},
        ),
        Entry(
            name="quantize_tiles_staged",
            dtypes=(torch.bfloat16,),
            options={
                "format": ("nvfp4",),
                "scale_rule": ("mse", "static_6"),
                "block": ("2d",),
                "rounding_row": ("nearest",),
                "rounding_col": ("nearest",),
                "rht_row": (False,),
                "rht_col": (False,),
            },
            alignment=layout.VECTOR_BYTES,
            layout=layout.vector,
            prepare=host_quantize_tiles_staged.prepare,
            reads={"vector": True},
        ),
    ),
}
"""A pair that no kernel here serves is two launches of quantize."""


def lacks(options: Options, arch: str) -> str:
    """What an architecture lacks for these options of any operator, or nothing."""
    if "stochastic_hardware" not in options or arch in conversions.STOCHASTIC:
        return ""
    have = " and ".join(conversions.STOCHASTIC)
    return f"rounding stochastic_hardware is cvt.rs, which exists on {have} only, got {arch}"
