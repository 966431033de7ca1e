"""PyTorch as a namespace of the array API standard: that of array_api_compat, with sums that a compiler can follow.

Running sums of array_api_compat look for the namespace of their argument in a cache, of which ``torch.compile`` warns.
"""

from __future__ import annotations

from typing import Any

import torch
from array_api_compat.torch import *  # noqa: F403
from torch import Tensor


def cumulative_sum(
    x: Tensor, /, *, axis: int | None = None, dtype: Any = None, include_initial: bool = False
) -> Tensor:
    """The sums x[0] + … + x[i] along an axis, which only one axis may leave out; with `include_initial`, 0 first."""
    if axis is None:
        if x.ndim != 1:
            msg = f"axis must be given for an array of {x.ndim} axes"
            raise ValueError(msg)
        axis = 0
    sums = torch.cumsum(x, dim=axis, dtype=dtype)
    if not include_initial:
        return sums
    shape = list(sums.shape)
    shape[axis] = 1
    return torch.cat([sums.new_zeros(shape), sums], dim=axis)
