"""Shares of the keys that methods read: keys read per row over keys visible to it, averages over rows and heads.

`SHARES` maps the name of a method to `share(method, q, k, v, causal=…)`, with the arrays of a call. What is not in it,
such as a method by random features, has no such number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

SHARES: dict[str, Callable[..., float]] = {"exact": lambda *arguments, causal: 1.0}


def window(method: Any, q: Any, k: Any, v: Any, *, causal: bool) -> float:
    """Of self-attention by a window, whose rows read their neighbours and the global keys; global rows read all."""
    n = q.shape[-2]
    row = np.arange(n)
    last = row if causal else np.full(n, n - 1)
    right = 0 if causal else method.left if method.right is None else method.right
    is_global = np.zeros(n, dtype=bool) if method.global_mask is None else np.asarray(method.global_mask)
    step = method.dilation
    near = np.minimum(row // step, method.left) + np.minimum((n - 1 - row) // step, right) + 1
    before = np.concatenate([[0], np.cumsum(is_global)])  # number of global keys before each place
    far = before[last + 1] - _near_globals(is_global, method.left, right, step)
    read = np.where(is_global, last + 1, near + far)
    return float(read.sum() / (last + 1).sum())


def _near_globals(is_global: np.ndarray, left: int, right: int, step: int) -> np.ndarray:
    """How many global keys lie in the window of each row."""
    n = len(is_global)
    found = np.zeros(n, dtype=np.int64)
    for key in np.flatnonzero(is_global):
        rows = np.arange(max(0, key - right * step), min(n, key + left * step + 1))
        found[rows[(rows - key) % step == 0]] += 1
    return found


SHARES["window"] = window


def clustered(method: Any, q: Any, k: Any, v: Any, *, causal: bool) -> float:
    """Of self-attention to clusters: keys that are near, sinks, keys of opened clusters, and centroids.

    A row of a method with a `share` counts as if it opened as many clusters as it may.
    """
    n = q.shape[-2]
    row = np.arange(n)
    if causal:
        chunks, visible = row // method.chunk, row + 1
        near = row - chunks * method.chunk + 1
        clusters = chunks * -(-method.chunk // method.cluster_size)
    else:
        visible = np.full(n, n)
        near = np.minimum(row, method.window) + np.minimum(n - 1 - row, method.window) + 1
        clusters = np.full(n, -(-n // method.cluster_size))
    opened = np.minimum(method.opened, clusters)
    sinks = np.where(clusters > 0, min(method.sinks, n), 0)
    groups = clusters // method.group if method.group > 1 else 0 * clusters
    expanded = n if method.expanded is None else method.expanded
    weighed = np.where(groups > expanded, groups + expanded * (method.group - 1), clusters)
    read = near + sinks + opened * method.cluster_size + weighed - opened
    return float(np.minimum(read, visible).sum() / visible.sum())


SHARES["clustered"] = clustered
