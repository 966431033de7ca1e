"""Attention through exponential features by the compiled CPU kernel, zero copy, where no gradient is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from subquad.kernels.feature_product import Exponential, FeatureMap
from subquad_torch._plain import declines_plain, has


def declines(
    q: Tensor, k: Tensor, v: Tensor, /, *, phi: FeatureMap, causal: bool = False, key_mask: Tensor | None = None
) -> str | None:
    """Why the compiled product cannot take the call."""
    if phi.exponential is None:
        return "the features are not plain exponentials"
    if causal:
        return "it has no causal form"
    floats = [q, k, v, phi.exponential.keys, phi.exponential.queries, *(phi.exponential.center or ())]
    tensors = floats if key_mask is None else [*floats, key_mask]
    if q.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {q.device.type}"
    if torch.compiler.is_compiling():
        return "a compiler sees through the generic form"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "gradients are recorded through the generic form"
    if len({x.dtype for x in floats}) > 1:
        return "it computes in one dtype"
    if torch._C._len_torch_dispatch_stack():
        return "what watches or records operations sees through the generic form only"  # counters, make_fx
    if not has("numba"):
        return 'numba is not installed (pip install "subquad[numba]")'
    return declines_plain(tensors)


def feature_product(
    q: Tensor, k: Tensor, v: Tensor, /, *, phi: FeatureMap, causal: bool = False, key_mask: Tensor | None = None
) -> Tensor:
    """The kernel `feature_product`, not causal."""
    from subquad_numpy import features

    assert phi.exponential is not None
    given = phi.exponential
    exponential = Exponential(
        *map(_numpy, (given.keys, given.queries)), given.scale, given.center and tuple(map(_numpy, given.center))
    )
    queries, keys, values, mask = map(_numpy, (q, k, v, key_mask))
    mask_batch = () if key_mask is None else key_mask.shape[:-1]
    batch = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], mask_batch, phi.batch)
    out = q.new_empty((*batch, q.shape[-2], v.shape[-1]))  # torch's memory, so that torch accounts for it
    features.feature_product(
        queries, keys, values, exponential=exponential, key_mask=mask, threads=torch.get_num_threads(), out=out.numpy()
    )
    return out


def _numpy(x: Tensor | None) -> Any:
    """The tensor's memory as a NumPy array, strides as they are."""
    return None if x is None else x.detach().resolve_neg().numpy()
