"""Depth-wise convolution along the sequence, as products with a banded matrix.

out[i] = Σ_s w[s] v[i + s − (taps − 1)/2],    v = 0 outside
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
from array_api_compat import device

from subquad._dispatch import Array

TILE = 64  # rows of the banded matrix, at least


def depthwise(xp: ModuleType, v: Array, weights: Array) -> Array:
    """Correlate the rows of `v` (..., n, d_v) with `weights` (..., taps), taps odd."""
    n, taps = v.shape[-2], weights.shape[-1]
    half, tile = taps // 2, max(TILE, taps - 1)
    # row i of a tile reads rows i … i + taps − 1 of the two tiles that begin `half` rows before it
    offset = np.arange(2 * tile) - np.arange(tile)[:, None]
    offset = np.where((offset >= 0) & (offset < taps), offset, taps)
    padded = xp.concat([weights, xp.zeros_like(weights[..., :1])], axis=-1)
    band = xp.take(padded, xp.asarray(offset.reshape(-1), device=device(v)), axis=-1)
    band = xp.reshape(band, (*weights.shape[:-1], 1, tile, 2 * tile))
    tiles = -(-n // tile)

    def zeros(rows: int) -> Array:
        return xp.zeros((*v.shape[:-2], rows, v.shape[-1]), dtype=v.dtype, device=device(v))

    joined = xp.concat([zeros(half), v, zeros((tiles + 1) * tile - n - half)], axis=-2)
    joined = xp.reshape(joined, (*v.shape[:-2], tiles + 1, tile, v.shape[-1]))
    windows = xp.concat([joined[..., :-1, :, :], joined[..., 1:, :, :]], axis=-2)
    out = band @ windows
    return xp.reshape(out, (*out.shape[:-3], tiles * tile, v.shape[-1]))[..., :n, :]
