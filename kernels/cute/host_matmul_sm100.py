"""Host side of ``matmul_sm100``: how it is compiled and launched."""

from typing import Any

import torch
from torch import Tensor

from fos_compile.kernels.cute import host_general as general
from fos_compile.kernels.cute.cache import Kernel, KernelKey
from fos_compile.kernels.cute.layout import MAX_BATCH, MAX_ROWS, VECTOR_BYTES, is_value
from fos_compile.kernels.cute.matmul_layout import Tiling


def key_of(
    format: str,
    tile: tuple[int, int],
    cluster: tuple[int, int],
    *,
    dtype: torch.dtype,
    bias: torch.dtype | None = None,
    cols: int,
) -> KernelKey:
    """What is compiled for a product with `cols` columns; of their number only whether TMA can
    store rows of so many is kept.
    """
    options: dict[str, str | int | bool] = {
        "format": format,
        "tile_m": tile[0],
        "tile_n": tile[1],
        "cluster_m": cluster[0],
        "cluster_n": cluster[1],
        "bias": "" if bias is None else str(bias).removeprefix("torch."),
        "boxes": cols * dtype.itemsize % VECTOR_BYTES == 0,
    }
    name = str(dtype).removeprefix("torch.")
    return KernelKey(
        name="matmul_sm100", dtype=name, options=tuple(options.items()), alignment=VECTOR_BYTES
    )


def tiling(key: KernelKey) -> Tiling:
    """Tile, cluster and format of a key."""
    options = general.options_of(key)
    return Tiling(
        rows=options["tile_m"],
        cols=options["tile_n"],
        cluster=(options["cluster_m"], options["cluster_n"]),
        format=options["format"],
        item=getattr(torch, key.dtype).itemsize,
    )


def signature(key: KernelKey) -> tuple[Any, list[Any]]:
    """The kernel and what it is compiled for; sizes are symbolic."""
    import cutlass
    from cutlass import Float32, Int32, Int64, cute
    from cutlass.cute.runtime import make_fake_compact_tensor

    from fos_compile.kernels.cute.matmul_sm100 import MatmulSm100

    dtypes = {
        "bfloat16": cutlass.BFloat16,
        "float16": cutlass.Float16,
        "float32": cutlass.Float32,
        "": None,
    }
    options = general.options_of(key)
    kernel = MatmulSm100(
        tiling(key),
        dtype=dtypes[key.dtype],
        bias=dtypes[options["bias"]],
        boxes=options["boxes"],
    )
    a = make_fake_compact_tensor(
        cutlass.Uint8,
        (cute.sym_int32(), cute.sym_int32(), cute.sym_int32(divisibility=32)),
        stride_order=(2, 1, 0),
        assumed_align=VECTOR_BYTES,
    )
    addresses = [Int64(0) for _ in ("b", "scales_a", "scales_b", "amax_a", "amax_b")]
    numbers = [Float32(1.0), Float32(1.0), Int64(0), Int64(0), Int32(1), Int32(1)]
    return kernel, [a, *addresses, *numbers, general.env_stream()]


def layout(a: Tensor, b: Tensor, bias: Tensor | None = None) -> str:
    """Why the kernel cannot multiply operands [.., R, P/2], or nothing.

    What is not contiguous, or not where TMA can read it, is copied.
    """
    if a.dim() == 3 and type(a.shape[0]) is int and a.shape[0] > MAX_BATCH:
        return f"at most {MAX_BATCH} batches, got {list(a.shape)}"
    if any(type(x.shape[-2]) is int and x.shape[-2] > MAX_ROWS for x in (a, b)):
        return f"at most {MAX_ROWS} rows, got {list(a.shape)} and {list(b.shape)}"
    if is_value(a.shape[-1], 0):
        return "k must be positive: a product of nothing is no tile"
    if bias is not None and (bias.dim() != 1 or not is_value(bias.shape[0], b.shape[-2])):
        return f"bias must be [n], got {list(bias.shape)}"
    return ""


def prepare(kernel: Kernel, num_sms: int, key: KernelKey, a: Tensor, b: Tensor) -> general.Launch:
    """The launch for operands like a and b; takes arguments of fos::scaled_mm."""
    *batch, rows, _ = a.shape
    cols = b.shape[-2]
    new = general.allocator((*batch, rows, cols), getattr(torch, key.dtype), a.device)
    if not (rows and cols and all(batch)):
        return lambda *_: new()
    read = general.reader(a.contiguous(), True)
    chosen = tiling(key)
    clusters = max(1, num_sms // (chosen.cluster[0] * chosen.cluster[1]))

    def launch(
        a: Tensor,
        scales_a: Tensor,
        amax_a: Tensor,
        qs_a: float,
        b: Tensor,
        scales_b: Tensor,
        amax_b: Tensor,
        qs_b: float,
        bias: Tensor | None = None,
    ) -> Tensor:
        out = new()
        # Names, because a copy must live until the kernel is launched.
        a, b, scales_a, scales_b = (_readable(each) for each in (a, b, scales_a, scales_b))
        bias = None if bias is None else bias.contiguous()
        kernel(
            read(a),
            b.data_ptr(),
            scales_a.data_ptr(),
            scales_b.data_ptr(),
            amax_a.data_ptr(),
            amax_b.data_ptr(),
            qs_a,
            qs_b,
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            cols,
            clusters,
        )
        return out

    return launch


def _readable(x: Tensor) -> Tensor:
    """x, contiguous and at an address that TMA takes."""
    x = x if x.is_contiguous() else x.contiguous()
    return x.clone() if x.data_ptr() % VECTOR_BYTES else x
