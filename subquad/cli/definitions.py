"""The definitions in float64, by plain NumPy: what every result is compared with."""

import numpy as np

ROWS = 256  # query rows at a time: the matrix of logits stays (heads, 256, n)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, causal: bool) -> np.ndarray:
    """Exact attention of as many keys as queries.

        out = softmax(q kᵀ/√d) v

    with key heads repeated for the query heads that share them.
    """
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    if q.ndim > 2:
        shared_by = q.shape[-3] // k.shape[-3]
        k, v = (np.repeat(x, shared_by, axis=-3) for x in (k, v))
    n, d = q.shape[-2:]
    blocks = []
    for start in range(0, n, ROWS):
        logits = q[..., start : start + ROWS, :] @ np.swapaxes(k, -1, -2) / np.sqrt(d)
        if causal:
            row = np.arange(start, start + logits.shape[-2])[:, None]
            logits = np.where(np.arange(n) <= row, logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        blocks.append(weights @ v / weights.sum(axis=-1, keepdims=True))
    return np.concatenate(blocks, axis=-2)


def mean_of_values(q: np.ndarray, v: np.ndarray, *, causal: bool) -> np.ndarray:
    """What attention gives when every visible key weighs the same: knows no query, costs nothing."""
    v = np.repeat(v.astype(np.float64), q.shape[-3] // v.shape[-3], axis=-3) if q.ndim > 2 else v.astype(np.float64)
    if causal:
        return np.cumsum(v, axis=-2) / np.arange(1.0, v.shape[-2] + 1)[:, None]
    return np.broadcast_to(v.mean(axis=-2, keepdims=True), v.shape)


def selective_scan(
    u: np.ndarray,
    delta: np.ndarray,
    A: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    delta_bias: np.ndarray,
) -> np.ndarray:
    """Selective scan, one step at a time.

    Δ = softplus(delta + delta_bias)
    h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] u[t],      y[t] = C[t]·h[t] + D u[t]
    """
    u, delta, A, B, C, D, delta_bias = (x.astype(np.float64) for x in (u, delta, A, B, C, D, delta_bias))
    delta = np.logaddexp(0.0, delta + delta_bias)
    h = np.zeros((*u.shape[:-2], *A.shape))
    y = np.empty_like(u)
    for t in range(u.shape[-2]):
        step = delta[..., t, :, None]
        h = np.exp(step * A) * h + step * B[..., t, None, :] * u[..., t, :, None]
        y[..., t, :] = np.sum(C[..., t, None, :] * h, axis=-1) + D * u[..., t, :]
    return y


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    """‖out − reference‖ / ‖reference‖, both Frobenius."""
    off = float(np.linalg.norm(out.astype(np.float64) - reference))
    size = float(np.linalg.norm(reference))
    if size == 0.0:
        return 0.0 if off == 0.0 else float("inf")
    return off / size
