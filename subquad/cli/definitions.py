"""The definition of exact attention in float64, by plain NumPy, with which every attention method is compared."""

import numpy as np

ROWS = 256  # query rows of a block, so that the matrix of logits is (heads, 256, n) and not (heads, n, n)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, *, causal: bool) -> np.ndarray:
    """Exact self-attention in float64, (..., heads, n, d_v).

        out = softmax(q kᵀ/√d) v

    Key heads are repeated for the query heads that share them.
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
    """The mean of the visible values for each query: attention with equal weights, the yardstick of an error."""
    v = np.repeat(v.astype(np.float64), q.shape[-3] // v.shape[-3], axis=-3) if q.ndim > 2 else v.astype(np.float64)
    if causal:
        return np.cumsum(v, axis=-2) / np.arange(1.0, v.shape[-2] + 1)[:, None]
    return np.broadcast_to(v.mean(axis=-2, keepdims=True), v.shape)


def relative_error(out: np.ndarray, reference: np.ndarray) -> float:
    """‖out − reference‖ / ‖reference‖ in the Frobenius norm; for a reference of 0, 0 or infinity."""
    off = float(np.linalg.norm(out.astype(np.float64) - reference))
    size = float(np.linalg.norm(reference))
    if size == 0.0:
        return 0.0 if off == 0.0 else float("inf")
    return off / size
