"""What a kernel may ask of a matrix, without a guard: what cannot be known is answered no."""

import torch
from torch import Tensor

VECTOR_BYTES = 16
MAX_ROWS = 2**31 - 2**16
MAX_COLS = 2**28
"""What the grids of the kernels hold, and int32 indices with room for what is loaded ahead."""
MAX_BATCH = 65535
"""What a grid holds along z."""


def is_multiple(size: int | torch.SymInt, of: int) -> bool:
    """Whether `size` is known to be a multiple."""
    return size % of == 0 if type(size) is int else _known(size % of == 0)


def is_value(size: int | torch.SymInt, value: int | torch.SymInt) -> bool:
    """Whether `size` is known to be `value`."""
    if type(size) is int and type(value) is int:
        return size == value
    return _known(size == value)


def _known(statement: bool | torch.SymBool) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(statement)


def anything(x: Tensor) -> str:
    """Why x is no matrix that a grid can cover, or nothing."""
    if x.dim() not in (2, 3):
        return f"x must be [R, C] or [B, R, C], got {list(x.shape)}"
    # A symbolic batch is taken to be small; the call itself looks again.
    if x.dim() == 3 and type(x.shape[0]) is int and x.shape[0] > MAX_BATCH:
        return f"x must have at most {MAX_BATCH} batches, got {list(x.shape)}"
    for name, size, most in zip(
        ("rows", "columns"), x.shape[-2:], (MAX_ROWS, MAX_COLS), strict=True
    ):
        if type(size) is int and size > most:
            return f"x must have at most {most} {name}, got {list(x.shape)}"
    return ""


def vector(x: Tensor) -> str:
    """Why the rows of x are not whole vectors of 16 bytes, or nothing."""
    if anything(x):
        return anything(x)
    step = VECTOR_BYTES // x.element_size()
    if not is_value(x.stride(-1), 1):
        return f"columns must be contiguous, got strides {list(x.stride())}"
    if not all(is_multiple(size, step) for size in (x.shape[-1], *x.stride()[:-1])):
        return f"columns and strides must be known to be multiples of {step}"
    # The address of a fake tensor is unknown; a real one is looked at where it is launched.
    return ""


def by_column(x: Tensor) -> str:
    """Why the rows of x are not contiguous in memory, or nothing."""
    if anything(x):
        return anything(x)
    if is_value(x.stride(-2), 1) and not is_value(x.stride(-1), 1):
        return ""
    return f"rows must be contiguous, got strides {list(x.stride())}"
