"""Bounds for a share that is estimated from a sample (Clopper & Pearson, 1934).

Of r drawn things, k have a property. With confidence 1 − α, the share p that has it among all is at most the p with

    P(Binomial(r, p) ≤ k) = Σ_{j ≤ k} C(r, j) p^j (1 − p)^(r−j) = α

whatever p is: a smaller share than the bound would have shown so few with a probability below α. For k = 0 it is
1 − α^(1/r), about 3 / r for α = 0.05.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Host = np.ndarray[Any, Any]

CONFIDENCE = 0.95
HALVINGS = 52  # of the interval 0 … 1: all digits of float64
AT_ONCE = 2**20  # terms of the sums that are held at a time


def upper_bounds(found: Host, drawn: Host, confidence: float = CONFIDENCE) -> Host:
    """The upper bounds of shares, of which `found` of `drawn` were seen, each with the given confidence, in float64.

    The arrays are integers with 0 ≤ found ≤ drawn and broadcast. Of nothing drawn, and of all drawn found, it is 1.
    """
    found, drawn = np.broadcast_arrays(found, drawn)
    pairs, back = np.unique(np.stack([found.reshape(-1), drawn.reshape(-1)]), axis=1, return_inverse=True)
    most = int(pairs[0].max(initial=0))
    size = max(1, AT_ONCE // (most + 1))
    cuts = range(0, pairs.shape[1], size)
    parts = [_solve(*(x[i : i + size, None] for x in pairs), alpha=1 - confidence) for i in cuts]
    return np.concatenate([np.empty(0), *parts])[back.reshape(-1)].reshape(found.shape)


def _solve(k: Host, r: Host, *, alpha: float) -> Host:
    # The bounds (pairs,) of k and r (pairs, 1), by bisection: the tail falls from 1 to 0 as p grows
    j = np.arange(int(k.max(initial=0)) + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(r.max(initial=0)) + 1)))])
    log_choose = log_factorial[r] - log_factorial[j] - log_factorial[np.maximum(r - j, 0)]
    log_choose = np.where(j <= k, log_choose, -np.inf)
    low, high = np.zeros(k.shape), np.ones(k.shape)
    for _ in range(HALVINGS):
        p = (low + high) / 2
        is_below = np.exp(log_choose + j * np.log(p) + (r - j) * np.log1p(-p)).sum(axis=-1, keepdims=True) > alpha
        low, high = np.where(is_below, p, low), np.where(is_below, high, p)
    return np.where(k >= r, 1.0, high)[:, 0]
