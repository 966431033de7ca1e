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
ENOUGH = 1e-9  # relative size of a step of Newton's method after which the error is below that of float64
MOST_STEPS = 60
AT_ONCE = 2**20  # terms of the sums that are held at a time


def upper_bounds(found: Host, drawn: Host, confidence: float = CONFIDENCE) -> Host:
    """The upper bounds of shares, of which `found` of `drawn` were seen, each with the given confidence, in float64.

    The arrays are integers with 0 ≤ found ≤ drawn and broadcast. Of nothing drawn, and of all drawn found, it is 1.
    """
    found, drawn = np.broadcast_arrays(found, drawn)
    pairs, back = np.unique(np.stack([found.reshape(-1), drawn.reshape(-1)]), axis=1, return_inverse=True)
    bounds = np.ones(pairs.shape[1])
    is_sought = pairs[0] < pairs[1]
    sought = pairs[:, is_sought]
    size = max(1, AT_ONCE // (int(pairs[0].max(initial=0)) + 1))
    cuts = range(0, sought.shape[1], size)
    parts = [_solve(*(x[i : i + size, None] for x in sought), alpha=1 - confidence) for i in cuts]
    bounds[is_sought] = np.concatenate([np.empty(0), *parts])
    return bounds[back.reshape(-1)].reshape(found.shape)


def _solve(k: Host, r: Host, *, alpha: float) -> Host:
    # The bounds (pairs,) of k < r (pairs, 1), by Newton's method: the logarithm of the tail is concave in p, so that
    # each step ends at the root or above it, and from above the steps go down to it
    j = np.arange(int(k.max()) + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(r.max()) + 1)))])
    log_choose = log_factorial[r] - log_factorial[j] - log_factorial[np.maximum(r - j, 0)]
    log_choose = np.where(j <= k, log_choose, -np.inf)
    log_factor = np.log(r - k) + np.take_along_axis(log_choose, k, axis=-1)
    p = (k + 0.5) / (r + 0.5)
    for _ in range(MOST_STEPS):
        log_p, log_rest = np.log(p), np.log1p(-p)
        tail = np.exp(log_choose + j * log_p + (r - j) * log_rest).sum(axis=-1, keepdims=True)
        slope = np.exp(log_factor + k * log_p + (r - k - 1) * log_rest)  # of the tail, downwards
        step = np.log(tail / alpha) * tail / slope
        p = np.where(p + step < 1, p + step, (1 + p) / 2)
        if np.all(np.abs(step) <= ENOUGH * p):
            break
    return p[:, 0]
