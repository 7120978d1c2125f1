"""Python numbers as operands of inline PTX."""

from typing import Any

from cutlass import Float32, Uint32
from cutlass.cute import arch


def register(operand: Any) -> Any:
    """An operand of inline PTX: numbers of Python become constants in registers."""
    if isinstance(operand, int):
        return u32(operand)
    return Float32(operand) if isinstance(operand, float) else operand


def u32(value: int) -> Any:
    """A constant in a register.

    Packed instructions take no immediates in PTX, and a bare int above 2^31 would make an
    expression 64 bits wide. The assembler folds the move.
    """
    return arch.inline_ptx(f"mov.b32 {{$w0}}, {value:#x};", write_only_types=[Uint32])
