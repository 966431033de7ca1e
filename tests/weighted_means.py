"""Attention as means of values with weights Σ_m exp(log), in float64, by NumPy or PyTorch: the definition for kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace


def log_weights(log_q: Any, log_k: Any) -> Any:
    """log Σ_m exp(log_q[i, m] + log_k[j, m]), (..., n, n_kv): a product of matrices, with no array of n · n_kv · m numbers.

    Each row is shifted by its maximum, and the shift is added again: no sum is 0 unless the rows of a pair peak hundreds
    of exponents apart.
    """
    xp = array_namespace(log_q)
    top_q, top_k = (xp.max(constant(x), axis=-1, keepdims=True) for x in (log_q, log_k))
    sums = xp.exp(log_q - top_q) @ xp.matrix_transpose(xp.exp(log_k - top_k))
    return xp.log(sums) + top_q + xp.matrix_transpose(top_k)


def means(log: Any, v: Any, mask: np.ndarray | None, causal: bool = False) -> Any:
    """Means of v with weights exp(log), (heads, n, n_kv), of the keys that a row sees; zero where it sees none."""
    xp = array_namespace(log)
    n, n_kv = log.shape[-2:]
    seen = np.tri(n, n_kv, n_kv - n if causal else n_kv, dtype=bool)
    seen = xp.asarray(seen if mask is None else seen & mask[..., None, :])
    log = xp.where(seen, log, -xp.inf)
    top = xp.max(constant(log), axis=-1, keepdims=True)
    weights = xp.exp(log - xp.where(top == -xp.inf, 0.0, top))
    total = xp.sum(weights, axis=-1, keepdims=True)
    return (weights @ v) / xp.where(total == 0, 1.0, total)


def constant(x: Any) -> Any:
    """The array without its history: what is subtracted and added again has no gradient."""
    return x.detach() if hasattr(x, "detach") else x
