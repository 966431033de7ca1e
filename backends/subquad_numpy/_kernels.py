"""The compiled kernels as overrides; Numba is imported at the first call."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from subquad.kernels._feature_map import FeatureMap
from subquad.kernels.selective_scan import Inputs, widened
from subquad_numpy.plain import attention as _attention

Array = np.ndarray[Any, Any]
MOST_COLUMNS = 256  # of a matrix that is inverted: five of them then take more than a megabyte
DTYPES = tuple(map(np.dtype, ("float32", "float64", "complex64", "complex128")))  # long doubles have no vectors


def declines(x: Array, *others: Array) -> str | None:
    """Why nothing can be compiled for arrays like x; the others must be of its dtype."""
    if x.dtype not in DTYPES:
        return f"it computes in {', '.join(map(str, DTYPES))}, not in {x.dtype}"
    if any(other.dtype != x.dtype for other in others):
        return f"it computes in one dtype, not in {', '.join(sorted({str(y.dtype) for y in (x, *others)}))}"
    return without_numba()


def without_numba() -> str | None:
    """The reason to decline every call where Numba is absent; it is not imported."""
    return None if importlib.util.find_spec("numba") else 'numba is not installed (pip install "subquad[numba]")'


def scan_declines(*arrays: Array | None, delta_softplus: bool, reverse: bool) -> str | None:
    """Why the compiled scan cannot take the call."""
    return declines(widened(np, Inputs(*arrays)).u)


def selective_scan(*arrays: Array | None, delta_softplus: bool, reverse: bool) -> tuple[Array, Array]:
    """The kernel `selective_scan`."""
    from subquad_numpy.selective_scan.calls import scan_forward

    return scan_forward(*widened(np, Inputs(*arrays)), delta_softplus, reverse)


def linear_scan_declines(a: Array, b: Array, initial_state: Array | None, /, *, reverse: bool) -> str | None:
    """Why the compiled kernel cannot take the call."""
    return declines(a)


def linear_scan(a: Array, b: Array, initial_state: Array | None, /, *, reverse: bool) -> Array:
    """The kernel `linear_scan`."""
    from subquad_numpy.linear_scan.calls import linear_scan_forward

    return linear_scan_forward(a, b, initial_state, reverse)


def iterative_pinv_declines(a: Array, /, *, iterations: int) -> str | None:
    """Why the compiled iteration cannot take the call."""
    m = a.shape[-1]
    return f"matrices of {m} columns do not stay in a core's cache" if m > MOST_COLUMNS else declines(a)


def iterative_pinv(a: Array, /, *, iterations: int) -> Array:
    """The kernel `iterative_pinv`."""
    from subquad_numpy.iterative_pinv import calls as compiled

    return compiled.iterative_pinv(a, iterations=iterations)


def feature_product_declines(
    q: Array, k: Array, v: Array, /, *, phi: FeatureMap, causal: bool = False, key_mask: Array | None = None
) -> str | None:
    """Why the compiled product cannot take the call."""
    if phi.fused is None:
        return "the features are neither exponentials nor elu(x) + 1"
    return declines(q, k, v, *phi.fused.arrays)


def feature_product(
    q: Array, k: Array, v: Array, /, *, phi: FeatureMap, causal: bool = False, key_mask: Array | None = None
) -> Array:
    """The kernel `feature_product`."""
    from subquad_numpy.features import calls as features

    assert phi.fused is not None
    return features.feature_product(q, k, v, causal=causal, phi=phi.fused, key_mask=key_mask)


def softmax_attention_declines(
    q: Array, k: Array, v: Array, /, *, scale: float, causal: bool = False, key_mask: Array | None = None
) -> str | None:
    """Why the compiled softmax attention cannot take the call."""
    reason = _attention.softmax_attention_declines(q, k, v, scale=scale, causal=causal, key_mask=key_mask)
    return reason or declines(q, k, v)


def softmax_attention(
    q: Array, k: Array, v: Array, /, *, scale: float, causal: bool = False, key_mask: Array | None = None
) -> Array:
    """The kernel `softmax_attention`, not causal."""
    from subquad_numpy.features import calls as features

    return features.softmax_attention(q, k, v, scale=scale, key_mask=key_mask)
