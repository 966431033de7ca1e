"""Definitions of the methods, transcribed from their formulas: explicit matrices and loops in NumPy, in float64.

No code is shared with the library; random directions ω are an argument. Each definition computes one head. A definition takes q (n, d), k (n_kv, d), v (n_kv, d_v)
and `keep` (n_kv,), the keys that are not masked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray


def over_heads(
    definition: Callable[..., Array], q: Array, k: Array, v: Array, key_mask: Array | None, **options: Any
) -> Array:
    """The output of `definition` for each item of the batch; key heads are repeated for grouped queries.

    An option that is an array differs by head if it has batch axes; PER_HEAD has the number of axes for one head.
    """
    if min(q.ndim, k.ndim, v.ndim) >= 3:
        heads = q.shape[-3]
        k, v = (np.repeat(x, heads // x.shape[-3], axis=-3) if 1 < x.shape[-3] < heads else x for x in (k, v))
        if key_mask is not None and key_mask.ndim >= 2 and 1 < key_mask.shape[-2] < heads:
            key_mask = np.repeat(key_mask, heads // key_mask.shape[-2], axis=-2)
    if key_mask is None:
        key_mask = np.ones(k.shape[-2], dtype=bool)
    key_mask = np.broadcast_to(key_mask, (*key_mask.shape[:-1], k.shape[-2]))
    batch = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], key_mask.shape[:-1])
    q, k, v = (np.broadcast_to(x.astype(np.float64), (*batch, *x.shape[-2:])) for x in (q, k, v))
    keep = np.broadcast_to(key_mask, (*batch, k.shape[-2]))

    def of_head(name: str, x: Any, index: tuple[int, ...]) -> Any:
        if name not in PER_HEAD or x is None or isinstance(x, bool | str):
            return x
        if isinstance(x, tuple):
            parts = [f"{name}[{i}]" for i in range(len(x))]
            return tuple(
                of_head(part if part in PER_HEAD else name, y, index) for part, y in zip(parts, x, strict=True)
            )
        tail = x.shape[x.ndim - PER_HEAD[name] :]
        if x.ndim - len(tail) >= 1 and batch and 1 < x.shape[-len(tail) - 1] < batch[-1]:
            x = np.repeat(x, batch[-1] // x.shape[-len(tail) - 1], axis=-len(tail) - 1)
        return np.broadcast_to(x, (*batch, *tail))[index]

    out = np.zeros((*batch, q.shape[-2], v.shape[-1]))
    for index in np.ndindex(batch):
        mine = {name: of_head(name, x, index) for name, x in options.items()}
        out[index] = definition(q[index], k[index], v[index], keep[index], **mine)
    return out


PER_HEAD = {"center": 1, "conv_weights": 1, "landmarks": 2, "projection": 2, "query_mask": 1, "global_mask": 1,
            "global_qkv": 2, "plan": 2, "queries": 3, "statistics": 2, "statistics[0]": 1, "statistics[1]": 1}  # fmt: skip


def visible(n: int, keep: Array, causal: bool) -> Array:
    """Whether each query sees each key, (n, n_kv); causal alignment is at the ends."""
    n_kv = len(keep)
    i, j = np.arange(n)[:, None], np.arange(n_kv)[None, :]
    return keep & ((j <= i + n_kv - n) | (not causal))


def normalised(weights: Array, v: Array) -> Array:
    """Σ_j w[i, j] v[j] / Σ_j w[i, j]; 0 for a row without weight."""
    total = weights.sum(axis=1, keepdims=True)
    return weights @ v / np.where(total == 0, 1, total)


def softmax(logits: Array, seen: Array) -> Array:
    """The softmax of each row over its visible keys; a row without visible keys is 0."""
    weights = np.where(seen, np.exp(logits - logits.max(initial=0)), 0)
    total = weights.sum(axis=1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def exact(q: Array, k: Array, v: Array, keep: Array, *, causal: bool, scale: float | None = None) -> Array:
    scale = q.shape[1] ** -0.5 if scale is None else scale
    return softmax(scale * q @ k.T, visible(len(q), keep, causal)) @ np.where(keep[:, None], v, 0)


def auto(
    q: Array, k: Array, v: Array, keep: Array, *, causal: bool, scale: float | None = None, left: int | None = None
) -> Array:
    """Exact attention, which is chosen for short sequences; with `left`, the window that was chosen before."""
    if left is None:
        return exact(q, k, v, keep, causal=causal, scale=scale)
    return window(q, k, v, keep, causal=causal, scale=scale, left=left)


def favor(
    q: Array,
    k: Array,
    v: Array,
    keep: Array,
    *,
    causal: bool,
    omega: Array,
    features: str | Callable[[Array], Array] = "positive",
    scale: float | None = None,
    center: bool | tuple[Array, Array] = False,
    kernel_epsilon: float = 0.0,
    statistics: tuple[Array, ...] | None = None,
) -> Array:
    """exp(s q·k) ≈ φ(q)·φ(k) with ω given."""
    scale = q.shape[1] ** -0.5 if scale is None else scale
    rows = keep if len(q) == len(k) else np.ones(len(q), dtype=bool)
    if features == "derf":
        found = derf_statistics(q[rows], k[keep], scale) if statistics is None else statistics
        weights = derf(q, k, omega, scale, *found)
        return normalised(np.where(visible(len(q), keep, causal), weights, 0), v)
    extra = np.zeros(len(k))
    if center is not False:
        q_mean, k_mean = (q[rows].mean(axis=0), k[keep].mean(axis=0)) if center is True else center
        q, k = q - q_mean, k - k_mean
        extra = scale * k @ q_mean  # what centring takes out of q·k, beyond terms of the query alone
    root = abs(scale) ** 0.5
    q, k = np.sign(scale) * root * q, root * k

    def phi(x: Array) -> Array:
        projected, half = x @ omega.T, (x * x).sum(axis=1, keepdims=True) / 2
        if features == "positive":
            return np.exp(projected - half)
        if features == "hyperbolic":
            return np.concatenate([np.exp(projected - half), np.exp(-projected - half)], axis=1)
        if features == "trigonometric":
            return np.concatenate([np.cos(projected) * np.exp(half), np.sin(projected) * np.exp(half)], axis=1)
        f = (lambda x: np.maximum(x, 0)) if features == "relu" else features
        return f(projected) + kernel_epsilon

    weights = phi(q) @ phi(k).T * np.exp(extra)
    return normalised(np.where(visible(len(q), keep, causal), weights, 0), v)


def derf(
    q: Array, k: Array, omega: Array, scale: float, q_mean: Array, k_mean: Array, q_map: Array, k_map: Array, B: Array
) -> Array:
    """Estimates of exp(s q·k), up to a factor of each query, by the dense-exponential features of FAVOR#, eq. for f⁽¹⁾."""
    d = len(B)
    A, C = (np.eye(d) - B @ B) / 4, -np.eye(d) / 2

    def f(x: Array) -> Array:
        log_D = np.linalg.slogdet(np.eye(d) - 4 * A)[1] / 4
        exponents = np.einsum("ra,ab,rb->r", omega, A, omega) + x @ B.T @ omega.T
        return np.exp(log_D + exponents + np.einsum("ia,ab,ib->i", x, C, x)[:, None])

    x = np.sign(scale) * abs(scale) ** 0.5 * (q - q_mean) @ q_map.T
    y = abs(scale) ** 0.5 * (k - k_mean) @ k_map.T
    return f(x) @ f(y).T / len(omega) * np.exp(scale * (k - k_mean) @ q_mean)


def derf_statistics(q: Array, k: Array, scale: float) -> tuple[Array, Array, Array, Array, Array]:
    """(q̄, k̄, M, M⁻¹, B) of rows: any map that balances the covariances, made symmetric; the best A of each direction."""
    d = q.shape[1]

    def of_eigenvalues(f: Callable[[Array], Array], S: Array) -> Array:
        values, vectors = np.linalg.eigh((S + S.T) / 2)
        return vectors @ np.diag(f(values)) @ vectors.T

    def spread(x: Array) -> tuple[Array, float, Array]:
        mean = x.mean(axis=0) if len(x) else np.zeros(d)
        sigma = (x - mean).T @ (x - mean) / max(len(x), 1)
        size = np.trace(sigma) / d
        if size < 1e-25 * (1 + mean @ mean):  # the mean of equal rows is rounded
            return mean, 0.0, 1.03 * np.eye(d)
        return mean, size, sigma / size + 0.03 * np.eye(d)

    (q_mean, q_size, q_cov), (k_mean, k_size, k_cov) = spread(q), spread(k)
    half, inverse = of_eigenvalues(np.sqrt, q_cov), of_eigenvalues(lambda x: 1 / np.sqrt(x), q_cov)
    f, V = np.linalg.eigh(half @ k_cov @ half)
    M = np.diag(f**0.25) @ V.T @ inverse
    M = of_eigenvalues(np.sqrt, M.T @ M)
    if q_size and k_size:
        M = M * (k_size / q_size) ** 0.25
    s = 2 * abs(scale) * M @ (q_size * q_cov if k_size else 0 * q_cov) @ M
    A = of_eigenvalues(lambda s: (1 - 2 * s - np.sqrt((2 * s + 1) ** 2 + 8 * s)) / 16, s)
    return q_mean, k_mean, M, np.linalg.inv(M), of_eigenvalues(np.sqrt, np.eye(d) - 4 * A)


def linear(
    q: Array,
    k: Array,
    v: Array,
    keep: Array,
    *,
    causal: bool,
    scale: float | None = None,
    feature_map: str | Callable[[Array], Array] = "elu",
) -> Array:
    scale = 1.0 if scale is None else scale
    root, sign = abs(scale) ** 0.5, np.sign(scale)
    phi = (lambda x: np.where(x > 0, x + 1, np.exp(x))) if feature_map == "elu" else feature_map
    weights = phi(sign * root * q) @ phi(root * k).T
    return normalised(np.where(visible(len(q), keep, causal), weights, 0), v)


def linformer(
    q: Array,
    k: Array,
    v: Array,
    keep: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    rank: int = 256,
    projection: str | tuple[Array, Array] = "mean",
    seed: int = 0,
) -> Array:
    """softmax(s q (E k)ᵀ) F v; a key that is hidden has columns of zeros."""
    assert not causal
    scale, n_kv = q.shape[1] ** -0.5 if scale is None else scale, len(k)
    if projection == "mean":
        E = F = np.zeros((min(rank, keep.sum()), n_kv))
        for row, members in enumerate(np.array_split(np.flatnonzero(keep), max(len(E), 1))):
            E[row : row + 1, members] = 1 / max(len(members), 1)
    elif projection == "random":
        E = F = gaussian_columns(rank, n_kv, seed)
    else:
        E, F = projection
    E, F = (np.where(keep, x, 0) for x in (E, F))
    k, v = (np.where(keep[:, None], x, 0) for x in (k, v))
    return softmax(scale * q @ (E @ k).T, np.ones((1, len(E)), dtype=bool)) @ (F @ v)


def gaussian_columns(m: int, n: int, seed: int) -> Array:
    """Entries N(0, 1/m); 256 columns, one after the other, come from one seed."""
    blocks = [np.zeros((0, m))]
    for block in range(-(-n // 256)):
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(block,))))
        blocks.append(rng.standard_normal((256, m)))
    return np.concatenate(blocks)[:n].T / np.sqrt(m)


def segment_means(x: Array, rows: Array, m: int) -> Array:
    """Means of m consecutive segments of the rows kept; the first c mod m of them are longer by one row."""
    x = x[rows]
    means, start = [], 0
    for segment in range(min(m, len(x))):
        length = len(x) // m + (segment < len(x) % m)
        means.append(x[start : start + length].mean(axis=0))
        start += length
    return np.array(means)


def uniform_rows(x: Array, rows: Array, m: int, seed: int) -> Array:
    """One row of each stratum ⌊i c / m⌋ … ⌊(i+1) c / m⌋ of c rows, at a random fraction of 12 bits."""
    x = x[rows]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
    fractions = rng.integers(0, 4096, size=m)
    edges = [i * len(x) // m for i in range(m + 1)]
    chosen = [a + int(f) * (b - a) // 4096 for a, b, f in zip(edges, edges[1:], fractions, strict=False) if b > a]
    return x[chosen]


def nystrom(
    q: Array,
    k: Array,
    v: Array,
    keep: Array,
    *,
    causal: bool = False,
    scale: float | None = None,
    num_landmarks: int = 64,
    landmarks: str | tuple[Array, Array] = "segment-means",
    seed: int = 0,
    kmeans_iterations: int = 5,
    pinv: str = "iterative",
    iterations: int = 6,
    rcond: float = 1e-3,
    ridge: float | None = None,
    conv_weights: Array | None = None,
    query_mask: Array | None = None,
) -> Array:
    """F A⁺ B v, with landmarks of the visible rows; exact attention for at most m queries or m keys."""
    assert not causal
    m, scale = num_landmarks, q.shape[1] ** -0.5 if scale is None else scale
    everything = np.ones(len(q), dtype=bool)
    rows = query_mask if query_mask is not None else keep if len(q) == len(k) else everything
    v = np.where(keep[:, None], v, 0)
    residual = 0 if conv_weights is None else convolution(v, conv_weights)
    if isinstance(landmarks, str):
        if min(len(q), len(k), keep.sum()) <= m:
            return exact(q, k, v, keep, causal=False, scale=scale) + residual
        if landmarks == "segment-means":
            q_land, k_land = segment_means(q, rows, m), segment_means(k, keep, m)
        elif landmarks == "kmeans":
            heavy = scale * q[rows].sum(axis=0) / max(rows.sum(), 1)
            q_land, _ = kmeans(q[rows], m, kmeans_iterations, seed)
            share = 0 if pinv == "ridge-fit" else 0.4
            k_land, members = kmeans(k[keep], m, kmeans_iterations, seed, heavy, share)
            if pinv == "ridge-fit":
                return ridge_fit(q, k[keep], v[keep], q_land, k_land, members, m, scale, ridge) + residual
        else:
            q_land, k_land = uniform_rows(q, rows, m, seed), uniform_rows(k, keep, m, seed)
    else:
        q_land, k_land = landmarks
    every = np.ones((1, len(k_land)), dtype=bool)
    F = softmax(scale * q @ k_land.T, every)
    A = softmax(scale * q_land @ k_land.T, every)
    B = softmax(scale * q_land @ k.T, keep[None, :])
    return F @ (pseudo_inverse(A, pinv, iterations, rcond, ridge) @ (B @ v)) + residual


def kmeans(
    x: Array, m: int, iterations: int, seed: int, heavy: Array | None = None, share: float = 0
) -> tuple[Array, Array]:
    """(means of the clusters of the rows of x, the cluster of each row); few rows are clusters of their own.

    `heavy` is a direction: the m/2 rows that go farthest in it are the first centres of as many clusters, if their
    share of the exponentials is above `share`.
    """
    if len(x) <= m:
        return x, np.arange(len(x))

    def nearest(rows: Array) -> Array:
        return ((rows[:, None] - centres) ** 2).sum(axis=-1).argmin(axis=1)

    def means(rows: Array) -> Array:
        own = nearest(rows)
        return np.array([rows[own == c].mean(axis=0) if np.any(own == c) else centres[c] for c in range(m)])

    every = np.ones(len(x), dtype=bool)
    sample = x if len(x) <= 8 * m else uniform_rows(x, every, 8 * m, seed)
    first = x[:0]
    if heavy is not None:
        order, weights = np.argsort(-(x @ heavy), kind="stable")[: m // 2], np.exp(x @ heavy - (x @ heavy).max())
        first = x[order] if weights[order].sum() > share * weights.sum() else first
    centres = np.concatenate([first, segment_means(sample, np.ones(len(sample), dtype=bool), m - len(first))])
    sample = np.concatenate([first, sample])
    for _ in range(iterations):
        centres = means(sample)
    return means(x), nearest(x)


def ridge_fit(
    q: Array,
    k: Array,
    v: Array,
    rows: Array,
    means: Array,
    members: Array,
    m: int,
    scale: float,
    ridge: float | None,
) -> Array:
    """F(q) W + q L: each cluster of keys counts as its members would with normally distributed logits.

    W and L are fitted to exact attention at `rows`; L begins at the mean covariance of keys and values in a cluster.
    """
    d = k.shape[1]
    counts = np.array([(members == c).sum() for c in range(m)])
    summary = np.array([v[members == c].mean(axis=0) if counts[c] else 0 * v[0] for c in range(m)])
    spreads = np.array([k[members == c].var(axis=0) if counts[c] else 0 * k[0] for c in range(m)])
    slope = scale * (k - means[members]).T @ (v - summary[members]) / max(len(k), 1)
    every = np.ones(len(k), dtype=bool)

    def F(x: Array) -> Array:
        logits = scale * x @ means.T + scale**2 * (x * x) @ spreads.T / 2
        weights = counts * np.exp(logits - logits.max(axis=1, keepdims=True, initial=-1e9))
        return weights / weights.sum(axis=1, keepdims=True)

    def fit(features: Array, missing: Array, strength: float) -> Array:
        stacked = np.concatenate([features, np.sqrt(strength) * np.eye(m + d)])
        return np.linalg.lstsq(stacked, np.concatenate([missing, np.zeros((m + d, v.shape[1]))]))[0]

    exact_rows = softmax(scale * rows @ k.T, every) @ v
    middle = rows.mean(axis=0) if len(rows) else np.zeros(d)
    off, F_rows = rows - middle, F(rows)
    size, length = (np.sqrt((x**2).sum() / x.shape[1] or 1) for x in (F_rows, off))
    features, missing = (
        np.concatenate([F_rows / size, off / length], axis=1),
        exact_rows - F_rows @ summary - rows @ slope,
    )
    if ridge is None:
        strengths, errors = (10, 1, 0.1, 1e-2, 1e-3, 1e-4, 1e-5), []
        for x in strengths:
            others = [np.arange(len(rows)) != i for i in range(len(rows))]
            wrong = [missing[i] - features[i] @ fit(features[j], missing[j], x) for i, j in enumerate(others)]
            errors.append(sum((y**2).sum() for y in wrong))
        ridge = next(x for x, error in zip(strengths, errors, strict=True) if error <= 1.001 * min(errors))
    found = fit(features, missing, ridge)
    return F(q) @ (summary + found[:m] / size) + q @ slope + (q - middle) @ (found[m:] / length)


def pseudo_inverse(A: Array, pinv: str, iterations: int, rcond: float, ridge: float | None) -> Array:
    if pinv == "ridge":
        return np.linalg.inv(A.T @ A + (ridge or 1e-2) * np.eye(A.shape[1])) @ A.T
    if pinv == "exact":
        U, s, Vt = np.linalg.svd(A, full_matrices=False)
        return Vt.T @ np.diag([1 / x if x > rcond * s[0] else 0 for x in s]) @ U.T
    Z = A.T / (np.abs(A).sum(axis=0).max() * np.abs(A).sum(axis=1).max())
    eye = np.eye(len(A))
    for _ in range(iterations):
        Z = Z @ (13 * eye - A @ Z @ (15 * eye - A @ Z @ (7 * eye - A @ Z))) / 4
    return Z


def convolution(v: Array, weights: Array) -> Array:
    """out[i] = Σ_s w[s] v[i + s − (taps − 1)/2], 0 outside."""
    out, half = np.zeros_like(v), (len(weights) - 1) // 2
    for i in range(len(v)):
        for s, w in enumerate(weights):
            if 0 <= i + s - half < len(v):
                out[i] += w * v[i + s - half]
    return out


def pattern(seen: Array, logits: Array, v: Array, keep: Array) -> Array:
    """Softmax attention of each row over the keys that it sees, (n, n_kv)."""
    return softmax(logits, seen & keep) @ np.where(keep[:, None], v, 0)


Partition = Callable[[Array, Array, int], list[tuple[int, list[int]]]]


def with_rest(
    seen: Array, q: Array, k: Array, v: Array, keep: Array, scale: float, clusters: list[tuple[int, list[int]]],
    stop: Array,
) -> Array:  # fmt: skip
    """Softmax attention of each row i over the keys that it sees, and over centroids of the blocks 0 … stop[i] − 1.

    Clusters are (number of the block, places of the keys). A centroid has mean, variance and mean value of all keys of the cluster, and the weight of
    as many keys as the row does not see.
    """
    seen = seen & keep
    columns, values = [np.where(seen, scale * q @ np.where(keep[:, None], k, 0).T, -np.inf)], [v[keep]]
    columns = [columns[0][:, keep]]
    for block, members in clusters:
        left = np.where(block < stop, (~seen[:, members]).sum(axis=1), 0)
        weight = scale * q @ k[members].mean(axis=0) + scale**2 / 4 * q**2 @ k[members].var(axis=0)
        columns.append(np.where(left > 0, weight + np.log(np.maximum(left, 1)), -np.inf)[:, None])
        values.append(v[members].mean(axis=0, keepdims=True))
    logits = np.concatenate(columns, axis=1)
    return softmax(np.where(logits > -np.inf, logits, 0), logits > -np.inf) @ np.concatenate(values)


def window(
    q: Array,
    k: Array,
    v: Array,
    keep: Array,
    *,
    causal: bool,
    scale: float | None = None,
    left: int = 256,
    right: int | None = None,
    dilation: int = 1,
    global_mask: Array | None = None,
    global_qkv: tuple[Array, Array, Array] | None = None,
    rest: Partition | None = None,
    rest_size: int = 16,
) -> Array:
    """The query at place p = i + n_kv − n sees the keys p + t · dilation, −left ≤ t ≤ right, and global keys.

    In self-attention, rows of global queries are those of full attention, of global_qkv where given. With `rest`, keys
    that are not global are clustered in chunks; in causal calls, a row has centroids of the chunks before its own.
    """
    n, n_kv = len(q), len(k)
    scale = q.shape[1] ** -0.5 if scale is None else scale
    right = (0 if causal else left) if right is None else right
    everywhere = np.zeros(n_kv, bool) if global_mask is None else np.broadcast_to(global_mask, (n_kv,))
    seen = np.zeros((n, n_kv), bool)
    for i in range(n):
        for t in range(-left, right + 1):
            if 0 <= i + n_kv - n + t * dilation < n_kv:
                seen[i, i + n_kv - n + t * dilation] = True
    allowed = visible(n, keep, causal)
    seen = (seen | everywhere) & allowed
    if rest is None:
        out = pattern(seen, scale * q @ k.T, v, keep)
    else:
        longest, chunk = min(left + 1, 256) if causal else 256, rest_size
        while 2 * chunk <= longest:
            chunk *= 2
        stop = (np.arange(n) + n_kv - n) // chunk if causal else np.full(n, n_kv)
        clusters = rest(k, keep & ~everywhere, chunk) if n_kv else []
        out = with_rest(seen, q, k, v, keep, scale, clusters, stop)
    if n == n_kv and everywhere.any():
        q, k, v = (q, k, v) if global_qkv is None else global_qkv
        out[everywhere] = pattern(allowed, scale * q @ k.T, v, keep)[everywhere]
    return out


def bigbird(
    q: Array,
    k: Array,
    v: Array,
    keep: Array,
    *,
    causal: bool,
    plan: Array,
    scale: float | None = None,
    block_size: int = 64,
    window_blocks: int = 3,
    global_blocks: tuple[int, int] = (1, 1),
    rest: Partition | None = None,
) -> Array:
    """Each block of queries sees the keys of near, global and planned blocks, each once; of all blocks if global.

    With `rest`, keys are clustered in blocks; in causal calls, a row has centroids of the blocks before its own.
    """
    n, n_kv = len(q), len(k)
    scale = q.shape[1] ** -0.5 if scale is None else scale
    total = -(-n_kv // block_size)
    ends = {b for b in range(total) if b < global_blocks[0] or b >= total - global_blocks[1]}
    seen = np.zeros((n, n_kv), bool)
    for i in range(n):
        block = i // block_size
        at = (block * block_size + n_kv - n) // block_size
        near = set(range(at - window_blocks // 2, at + window_blocks // 2 + 1))
        read = set(range(total)) if at in ends else near | ends | set(plan[block].tolist())
        seen[i] = [j // block_size in read for j in range(n_kv)]
    seen = seen & visible(n, keep, causal)
    if rest is None or n_kv == 0:
        return pattern(seen, scale * q @ k.T, v, keep)
    stop = (np.arange(n) + n_kv - n) // block_size if causal else np.full(n, n_kv)
    return with_rest(seen, q, k, v, keep, scale, rest(k, keep, min(block_size, max(n, n_kv))), stop)


def lsh(
    q: Array,
    k: Array,
    v: Array,
    keep: Array,
    *,
    causal: bool,
    rotations: Array,
    scale: float | None = None,
    bucket_size: int = 64,
    shared_qk: bool = False,
    unit_keys: bool = False,
    allow_self: bool = True,
    rest: Partition | None = None,
) -> Array:
    """A query sees the keys that it meets in some round: in the chunk of keys of its rank, or in the one before.

    With `rest`, keys are clustered in the chunks of the first round.
    """
    n, n_kv = len(q), len(k)
    scale = q.shape[1] ** -0.5 if scale is None else scale
    met = np.zeros((n, n_kv), bool)
    sorted_keys = []
    for R in rotations:
        buckets = hashed(k, R, max(n, n_kv), bucket_size)
        keys = sorted(range(n_kv), key=lambda j: (buckets[j] if keep[j] else np.inf, j))  # hidden keys: one last bucket
        sorted_keys.append(keys)
        buckets = hashed(q, R, max(n, n_kv), bucket_size)
        queries = keys if shared_qk else sorted(range(n), key=lambda i: (buckets[i], i))
        chunks, chunks_k = ([x[i : i + bucket_size] for i in range(0, len(x), bucket_size)] for x in (queries, keys))
        for c, chunk in enumerate(chunks):
            rank = c * len(chunks_k) // len(chunks)
            for other in chunks_k[max(rank - 1, 0) : rank + 1]:
                met[np.ix_(chunk, other)] = True
    seen = met & visible(n, keep, causal)
    for i in range(n if not allow_self else 0):
        own = i + n_kv - n
        if 0 <= own < n_kv:
            seen[i, own] = False
            seen[i, own] = not seen[i].any() and keep[own]
    if unit_keys:
        k = k / np.linalg.norm(k, axis=1, keepdims=True)
    if rest is None or 0 in (n, n_kv):
        return pattern(seen, scale * q @ k.T, v, keep)
    first = np.array(sorted_keys[0])
    clusters = [(c, first[members]) for c, members in rest(k[first], keep[first], min(bucket_size, max(n, n_kv)))]
    return with_rest(seen, q, k, v, keep, scale, clusters, np.full(n, n_kv))


def hashed(x: Array, R: Array, n: int, bucket_size: int) -> Array:
    """argmax [x R; −x R], of 2 · columns buckets, or of two factors with rotations of their own."""
    count = -(-n // bucket_size)
    count = max(2, count + count % 2)
    halves = [R]
    if count > 128:
        first = next(f for f in range(2, count, 2) if f * f >= count)
        second = next(f for f in range(2, count, 2) if first * f >= count)
        if R.shape[1] == (first + second) // 2:
            halves = [R[:, : first // 2], R[:, first // 2 :]]
    found = np.zeros(len(x), int)
    for half in halves:
        found = found * 2 * half.shape[1] + np.argmax(np.concatenate([x @ half, -x @ half], axis=1), axis=1)
    return found


def clustered(
    q: Array,
    k: Array,
    v: Array,
    keep: Array,
    *,
    causal: bool,
    queries: Array,
    scale: float | None = None,
    cluster_size: int = 16,
    opened: int = 16,
    chunk: int = 256,
    sinks: int = 4,
    window: int = 8,
    spans: int = 8,
    seed: int = 0,
) -> Array:
    """Near keys, sinks and keys of opened clusters one by one; of other clusters their mean, with the weight of all.

    `queries` (heads, n, d) are those of all heads that share the keys, this one among them.
    """
    n, n_kv, d = len(q), len(k), q.shape[1]
    scale = d**-0.5 if scale is None else scale
    real = keep if n == n_kv else np.ones(n, bool)  # rows that count in the moment
    sketch = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed))).standard_normal((d, 32))
    sink_keys = {j for j in range(n_kv) if j < sinks and keep[j]}

    def clusters_of(keys: range, last: int, places: int) -> list[tuple[list[int], tuple[Array, ...]]]:
        """The clusters of some keys, by the queries before row `last`, and what stands for each.

        Full clusters would have so many keys.
        """
        moment = np.zeros((d, d))
        for own in queries:
            for row in own[: max(last, 0)][real[: max(last, 0)]]:
                moment += np.outer(row, row)
        own = [j for j in keys if keep[j] and j not in sink_keys]
        depth = 0
        while cluster_size * 2**depth < places:
            depth += 1
        root = quarter_root(moment)
        found = halves(k @ root, own, cluster_size * 2**depth, cluster_size, sketch)
        return [(own, (k[own].mean(axis=0), v[own].mean(axis=0), *variances(k[own], root))) for own in found if own]

    ahead, last = n_kv - n, 0
    clusters: list[
        tuple[int, float, list[int], tuple[Array, ...]]
    ] = []  # (the first place of a row that sees it, of one that does not, keys, (means of keys and values, variances))
    if causal:
        places = -(-chunk // cluster_size) * cluster_size
        for c in range(n_kv // chunk):
            period = 1 if c < 4 else 2 ** (len(bin(c)) - 4)  # 1 to 7: 1, 1, 1, 2; 8 to 15: 4, and so on
            last = (c + 1) * chunk - ahead if c % period == 0 else last
            end, many = (c + 1) * chunk, 1
            while spans > 1 and (c + 1) % (many * spans) == 0:
                many *= spans
            start = end - many * chunk  # these keys are clustered again
            clusters = [(x, min(y, end) if own[0] >= start else y, own, means) for x, y, own, means in clusters]
            clusters += [(end, np.inf, *found) for found in clusters_of(range(start, end), last, many * places)]
    else:
        clusters = [(-n, np.inf, *found) for found in clusters_of(range(n_kv), n, n_kv)]

    out = np.zeros((n, v.shape[1]))
    for i in range(n):
        place = i + ahead
        if causal:
            near = {j for j in range(place + 1) if j // chunk == place // chunk or j in sink_keys}
        else:
            near = sink_keys | {j for j in range(n_kv) if abs(j - place) <= window}
        near = {j for j in near if keep[j]}
        parts = []  # (logit, how many keys it stands for, their keys that are not near, mean value)
        for first, end, cluster, (k_mean, v_mean, main, others) in clusters:
            left = [j for j in cluster if j not in near] if first <= place < end else []
            if left:
                variance = (q[i] @ main) ** 2 + q[i] ** 2 @ others  # of the logits of the cluster
                logit = scale * q[i] @ k_mean + scale**2 * variance / 4
                parts.append((logit + np.log(len(left)), left, v_mean))
        parts.sort(key=lambda part: -part[0])
        near = near.union(*(left for _, left, _ in parts[:opened]))
        logits = [scale * q[i] @ k[j] for j in near] + [logit for logit, _, _ in parts[opened:]]
        values = [v[j] for j in near] + [mean for _, _, mean in parts[opened:]]
        if logits:
            weights = np.exp(np.array(logits) - max(logits))
            out[i] = weights @ np.array(values) / weights.sum()
    return out


def variances(k: Array, root: Array) -> tuple[Array, Array]:
    """Variances of a few keys: along one direction, which they are exactly, and of the rest by channels, as of a band's mean.

    `root` is Σ^¼ of the moment of queries, in which the direction is found; channels of a band count by their squares.
    """
    far, sight = k - k.mean(axis=0), np.diag(np.linalg.matrix_power(root, 4))
    covariance, square = far.T @ far / len(k), root @ root
    direction = square @ far[np.argmax(((far @ root) ** 2).sum(axis=1))]
    for _ in range(2):
        direction = square @ covariance @ direction
        direction = direction / max(np.linalg.norm(direction), 1e-300)
    along = direction @ covariance @ direction
    main = covariance @ direction / np.sqrt(along) if along > 0 else 0 * direction
    left, width = np.diag(covariance) - main**2, -(-len(main) // 4)
    bands = [slice(b, b + width) for b in range(0, len(main), width)]
    return main, np.concatenate([np.full_like(left[b], np.average(left[b], weights=sight[b])) for b in bands])


def quarter_root(moment: Array) -> Array:
    """M^¼ by eigenvalues, none of them under a millionth of the largest; the identity for M = 0. Its factor is free."""
    if not moment.any():
        return np.eye(len(moment))
    values, vectors = np.linalg.eigh(moment / np.trace(moment))
    return vectors @ np.diag(np.maximum(values, 1e-6 * values.max()) ** 0.25) @ vectors.T


def halves(x: Array, keys: list[int], places: int, size: int, sketch: Array) -> list[list[int]]:
    """The clusters of some rows of x, split again and again: the lower half of the places is full before the upper."""
    if places == size:
        return [keys]
    half = places // 2
    low, high = keys, []
    if len(keys) > half:
        rows = x[keys] - x[keys].mean(axis=0)
        direction = rows[np.argmax(((rows @ sketch) ** 2).sum(axis=1))]
        for _ in range(4):
            direction = rows.T @ (rows @ direction)
            direction = direction / (np.linalg.norm(direction) or 1)
        for step in range(3):
            order = np.argsort(rows @ direction, kind="stable")
            if step < 2:
                direction = rows[order[half:]].mean(axis=0) - rows[order[:half]].mean(axis=0)
        low, high = ([keys[r] for r in part] for part in (order[:half], order[half:]))
    return halves(x, low, half, size, sketch) + halves(x, high, half, size, sketch)


def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    *,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    initial_state: Array | None = None,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """(y, state) of one sequence: u, delta, z (n, d); B, C (n, d_state), (n, groups, d_state) or (d, d_state)."""
    n, d = u.shape
    h = np.zeros(A.shape, dtype=A.dtype) if initial_state is None else initial_state
    y = np.zeros((n, d))
    for t in reversed(range(n)) if reverse else range(n):
        step = delta[t] + (0 if delta_bias is None else delta_bias)
        step = np.logaddexp(0, step) if delta_softplus else step
        b, c = (x if x.shape == A.shape and x.ndim == 2 and n != d else x[t] for x in (B, C))
        b, c = (np.repeat(np.atleast_2d(x), d // len(np.atleast_2d(x)), axis=0) for x in (b, c))
        h = np.exp(step[:, None] * A) * h + (step * u[t])[:, None] * b
        dot = (c * h).sum(axis=1)
        y[t] = 2 * dot.real if np.iscomplexobj(A) else dot
        y[t] += 0 if D is None else D * u[t]
        y[t] *= 1 if z is None else z[t] / (1 + np.exp(-z[t]))
    return y, h


def linear_scan(
    a: Array, b: Array, initial_state: Array | None = None, *, reverse: bool = False
) -> tuple[Array, Array]:
    """(h, state) of a, b (..., n, d) and initial_state (..., d), whose batch axes broadcast."""
    start = np.zeros(a.shape[-1:]) if initial_state is None else initial_state
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2], start.shape[:-1])
    n, d = a.shape[-2:]
    h = np.zeros((*batch, n, d), dtype=np.result_type(a, b, start))
    state = np.broadcast_to(start, (*batch, d)).astype(h.dtype)
    for t in reversed(range(n)) if reverse else range(n):
        h[..., t, :] = state = a[..., t, :] * state + b[..., t, :]
    return h, state


def delta_scan(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    beta: Array | None = None,
    a: Array | None = None,
    b: Array | None = None,
    initial_state: Array | None = None,
    resets: Array | None = None,
    *,
    scale: float = 1.0,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """(o, state) with the shapes of the kernel, by the matrices I − β k kᵀ, or diag(w) + b aᵀ, themselves."""
    batch, n, heads, d = k.shape
    S = np.zeros((batch, heads, d, v.shape[-1])) if initial_state is None else initial_state.astype(np.float64)
    o = np.zeros(v.shape)
    for t in reversed(range(n)) if reverse else range(n):
        if resets is not None:
            S = np.where(resets[:, t, None, None, None], 0, S)
        w = np.ones((batch, heads, 1, d)) if g is None else np.exp(g[:, t, :, None, :])
        if beta is not None:
            strength = beta[:, t, :, None, None]
            A = (np.eye(d) - strength * k[:, t, :, :, None] * k[:, t, :, None, :]) * w
        else:
            strength, A = 1, np.eye(d) * w + b[:, t, :, :, None] * a[:, t, :, None, :]
        S = A @ S + strength * k[:, t, :, :, None] * v[:, t, :, None, :]
        o[:, t] = scale * (np.swapaxes(S, -1, -2) @ q[:, t, :, :, None])[..., 0]
    return o, S


def outer_scan(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None = None,
    weight: Array | None = None,
    bonus: Array | None = None,
    skip: Array | None = None,
    initial_state: Array | None = None,
    resets: Array | None = None,
    *,
    scale: float = 1.0,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """(o, state) of q, k (batch, n, groups, d) and v (batch, n, heads, d_v), step by step."""
    batch, n, heads, d_v = v.shape
    q, k = (np.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
    S = np.zeros((batch, heads, q.shape[-1], d_v)) if initial_state is None else initial_state
    o = np.zeros(v.shape)
    for t in reversed(range(n)) if reverse else range(n):
        if resets is not None:
            S = np.where(resets[:, t, None, None, None], 0, S)
        kv = k[:, t, :, :, None] * v[:, t, :, None, :] * (1 if weight is None else weight[:, t, :, None, None])
        read = None if bonus is None else S + bonus[..., None] * kv
        S = (1 if g is None else np.exp(g[:, t, :, :, None])) * S + kv
        o[:, t] = scale * np.einsum("bhdv,bhd->bhv", S if read is None else read, q[:, t])
    return (o if skip is None else o + skip * v), S


def gated_outer_scan(*arrays: Array | None, scale: float = 1.0, reverse: bool = False) -> tuple[Array, Array]:
    """(o silu(z), state) of `outer_scan`; z (batch, n, heads, d_v) is the last array."""
    *given, z = arrays
    assert z is not None
    o, S = outer_scan(*given, scale=scale, reverse=reverse)  # type: ignore[arg-type]
    return o * z / (1 + np.exp(-z)), S
