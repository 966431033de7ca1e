"""Attention through features of a whole call: its keys are summed up, and its queries read the sums.

    out[i] = φ(q[i])ᵀ Σ_j φ(k[j]) v[j]ᵀ / φ(q[i])ᵀ Σ_j φ(k[j])

This is `feature_summarize` and then `feature_attend`. An override of both together keeps the state to itself.
"""

from __future__ import annotations

from subquad.backend import Array, Like
from subquad.core.kernel import kernel
from subquad.core.shapes import broadcast_batch
from subquad.kernels.feature_attention import feature_attend, feature_summarize
from subquad.kernels.feature_map import FeatureMap
from subquad.kernels.feature_sums import keys_batch

NO_KEYS = None, None, None


def whole_outputs(
    q: Array, k: Array, v: Array, *weights: Array, phi: FeatureMap, key_mask: Array | None = None
) -> tuple[Like, ...]:
    """Shape and dtype of the output."""
    state = keys_batch(phi, weights, k, v, key_mask)
    batch = broadcast_batch(q=q.shape[:-2], state=state, center=phi.batch(*weights))
    return (Like((*batch, q.shape[-2], v.shape[-1]), q.dtype),)


def _by_parts(
    q: Array, k: Array, v: Array, /, *weights: Array, phi: FeatureMap, key_mask: Array | None = None
) -> Array:
    """The output by the two kernels."""
    state = feature_summarize(k, v, *NO_KEYS, *weights, phi=phi, key_mask=key_mask)
    return feature_attend(q, *state, *weights, phi=phi)


@kernel(outputs=whole_outputs, options={"key_mask": None}, parts=_by_parts, reads_half=True)
def feature_whole(
    q: Array, k: Array, v: Array, /, *weights: Array, phi: FeatureMap, key_mask: Array | None = None
) -> Array:
    """The output (..., n, d_v) of queries q (..., n, d) that all read the keys k (..., n_kv, d) and values v.

    `weights` are the arrays of the map `phi`; `key_mask` (..., n_kv), True = keep, hides keys. q, k and v may have half
    precision in place of float32; the output has the dtype of q.
    """
    state = feature_summarize.generic(k, v, *NO_KEYS, *weights, phi=phi, key_mask=key_mask)
    return feature_attend.generic(q, *state, *weights, phi=phi)
