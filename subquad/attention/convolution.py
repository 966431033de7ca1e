"""Depth-wise convolution along the sequence, computed as products with a banded matrix.

out[i] = Σ_s w[s] v[i + s − (taps − 1)/2],    v = 0 outside
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from subquad.attention.call import AttentionCall
from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_arrays, check_floating
from subquad.core.dtypes import cast

TILE = 64  # min rows of the banded matrix: fewer would make its products too small


def add_convolution(call: AttentionCall, out: Array, weights: Array | None) -> Array:
    """`out` plus the convolution of v by `weights` (..., taps), masked values counting as 0; `out` if weights is None.

    Raises ValueError for an even number of taps or n ≠ n_kv, TypeError for weights that are no floating array.
    """
    if weights is None:
        return out
    xp, v = call.xp, call.v
    check_arrays(q=call.q, conv_weights=weights)
    check_floating(xp, conv_weights=weights)
    if weights.ndim == 0 or weights.shape[-1] % 2 == 0:
        msg = f"conv_weights has shape {tuple(weights.shape)}, expected (..., taps) with an odd number of taps"
        raise ValueError(msg)
    if call.q.shape[-2] != v.shape[-2]:
        msg = f"conv_weights needs one value per query, got n = {call.q.shape[-2]} and n_kv = {v.shape[-2]}"
        raise ValueError(msg)
    if call.key_mask is not None:
        v = xp.where(call.key_mask[..., None], v, 0.0)
    weights = call.arrangement.heads.fold(weights, tail=1)
    call.batch(output=out.shape[:-2], conv_weights=weights.shape[:-1])
    return out + depthwise(xp, v, cast(xp, weights, v.dtype))


def depthwise(xp: ModuleType, v: Array, weights: Array) -> Array:
    """Correlate the rows of `v` (..., n, d_v) with `weights` (..., taps), taps odd, and return (..., n, d_v)."""
    n, taps = v.shape[-2], weights.shape[-1]
    half, tile = taps // 2, max(TILE, taps - 1)
    # row i of a tile reads rows i … i + taps − 1 of a window of two tiles that starts `half` rows before the tile;
    # entry `taps` of the padded weights is the 0 outside the band
    offset = np.arange(2 * tile) - np.arange(tile)[:, None]
    offset = np.where((offset >= 0) & (offset < taps), offset, taps)
    padded = xp.concat([weights, xp.zeros_like(weights[..., :1])], axis=-1)
    band = xp.take(padded, xp.asarray(offset.reshape(-1), device=place_of(v)), axis=-1)
    band = xp.reshape(band, (*weights.shape[:-1], 1, tile, 2 * tile))
    tiles = -(-n // tile)

    def zeros(rows: int) -> Array:
        return xp.zeros((*v.shape[:-2], rows, v.shape[-1]), dtype=v.dtype, device=place_of(v))

    joined = xp.concat([zeros(half), v, zeros((tiles + 1) * tile - n - half)], axis=-2)
    joined = xp.reshape(joined, (*v.shape[:-2], tiles + 1, tile, v.shape[-1]))
    windows = xp.concat([joined[..., :-1, :, :], joined[..., 1:, :, :]], axis=-2)
    out = band @ windows
    return xp.reshape(out, (*out.shape[:-3], tiles * tile, v.shape[-1]))[..., :n, :]
