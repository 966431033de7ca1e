"""The selective scan by its formula, step by step in torch float64, with gradients by torch's autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from subquad.kernels.selective_scan import Inputs


def leaves(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays by name as tensors of double precision that ask for gradients; None stays."""

    def leaf(x: np.ndarray) -> torch.Tensor:
        wide = torch.complex128 if np.iscomplexobj(x) else torch.float64
        return torch.tensor(x, dtype=wide).requires_grad_()

    return {name: x if x is None else torch.tensor(x) if x.dtype == bool else leaf(x) for name, x in arrays.items()}


def scan(tensors: dict[str, Any], *, delta_softplus: bool, reverse: bool) -> tuple[Any, Any]:
    """(y, last state) of tensors by name, shaped as the kernel's inputs: one line per formula."""
    u, delta, A, B, C, D, z, delta_bias, h, resets = Inputs(**tensors)
    batch, n, d = u.shape
    delta = delta if delta_bias is None else delta + delta_bias
    if delta_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))

    def of_channels(x: Any) -> Any:
        x = x if x.ndim == 2 else x.repeat_interleave(d // x.shape[2], dim=2)
        return x.expand(batch, n, d, A.shape[1]).unbind(1)

    B, C = of_channels(B), of_channels(C)
    h = torch.zeros(batch, d, A.shape[1], dtype=A.dtype) if h is None else h
    y: list[Any] = [None] * n
    for t in reversed(range(n)) if reverse else range(n):
        h = h if resets is None else torch.where(resets[:, t, None, None], 0, h)
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[t] * u[:, t, :, None]
        read = (C[t] * h).sum(-1)
        y[t] = 2 * read.real if A.is_complex() else read
    out = torch.stack(y, 1)
    out = out if D is None else out + D * u
    return out if z is None else out * torch.nn.functional.silu(z), h
