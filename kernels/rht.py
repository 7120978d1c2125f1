"""Random Hadamard transform over groups of 16: y = x @ (diag(signs) @ H16) / 4.

H16 is the Sylvester matrix; the signs are the fixed vector of the published recipe. With both
operands of a product transformed along K the transform cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SIGNS = "+++-+------+-+--"


def rht(lanes: Tensor) -> Tensor:
    """Transform groups of 16, rounding once to the dtype of the input.

    Args:
        lanes: [16, ..], element i of every group in lanes[i]; bfloat16, float16 or float32.

    Returns:
        Like lanes, contiguous. Source: docs/contract.md section 3.
    """
    # One tensor a lane: 64 additions that fuse into one loop over the groups.
    v = [lane.to(torch.float32) for lane in lanes.unbind(0)]
    v = [lane if sign == "+" else -lane for lane, sign in zip(v, _SIGNS, strict=True)]
    for half in (1, 2, 4, 8):
        for i in range(16):
            if not i & half:
                v[i], v[i + half] = v[i] + v[i + half], v[i] - v[i + half]
    return torch.stack([(lane * 0.25).to(lanes.dtype) for lane in v])
