"""What all blocks of a tensor have in common, in shared memory: two divisions by one thread."""

from typing import Any

from fos_compile.kernels.cute import contract, ptx, shared


def store(to: Any, amax: Any, rules: contract.Rules) -> None:
    """Compute them from the amax at a global address: 16 bytes at the shared address `to`."""
    tensor = contract.tensor_of(ptx.load_f32(amax), rules.qs)
    numbers = [ptx.bits(number) for number in tensor]
    shared.store_v4(to, [*numbers, contract.outside_midrange(tensor)])


def load(at: Any) -> tuple[contract.Tensor, Any]:
    """What `store` left, and whether the amax is outside of `contract.MIDRANGE_AMAX`.

    To be read again in every phase: it occupies no registers between.
    """
    amax, encode, decode, outside = shared.load_v4(at)
    return contract.Tensor(ptx.real(amax), ptx.real(encode), ptx.real(decode)), outside
