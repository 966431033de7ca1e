"""Nyström attention by the means of segments, in one piece: see `subquad.Nystrom`.

    out = F A⁺ (B v),    F = softmax(s q k̃ᵀ),  A = softmax(s q̃ k̃ᵀ),  B = softmax(s q̃ kᵀ)

with the means q̃ and k̃ of m segments. It is two calls of `softmax_attention` and one of `iterative_pinv`; an override of
all together keeps what is between them to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.iterative_pinv import iterative_pinv
from subquad.kernels.segment_means import means_of_segments
from subquad.kernels.softmax_attention import softmax_attention

HIDDEN = -1e30  # finite, since gradients of rows of −∞ would be NaN, of items without keys whose A nobody reads


def outputs(q: Array, k: Array, v: Array, /, *, m: int, iterations: int, scale: float) -> tuple[Like, ...]:
    """Shape and dtype of the output."""
    batch = broadcast_batch(q=q.shape[:-2], k=k.shape[:-2], v=v.shape[:-2])
    return (Like((*batch, q.shape[-2], v.shape[-1]), q.dtype),)


def finite_queries(xp: ModuleType, q_land: Array) -> Array:
    """The landmarks of queries; one that is not finite spoils its own row of the output, not what all rows read."""
    return xp.where(xp.isfinite(q_land), q_land, 0.0)


def landmark_weights(
    xp: ModuleType, q_land: Array, k_land: Array, scale: float, q_valid: Array | None = None,
    k_valid: Array | None = None,
) -> Array:  # fmt: skip
    """A (..., m, m), whose rows are 0 where landmarks are not valid."""
    logits = (q_land * scale) @ xp.matrix_transpose(k_land)
    if k_valid is not None:
        logits = xp.where(k_valid[..., None, :], logits, HIDDEN)
    a = backend_of(xp).softmax(xp, logits)
    # rows of NaN are set to 0, since decompositions would raise or never end; B v has NaN too
    return xp.where(a >= 0 if q_valid is None else (a >= 0) & q_valid[..., :, None], a, 0.0)


def _composed(attend: Callable[..., Any], invert: Callable[..., Any]) -> Callable[..., Array]:
    """The output by these forms of the kernels."""

    def composed(q: Array, k: Array, v: Array, /, *, m: int, iterations: int, scale: float) -> Array:
        xp = namespace_of(q)
        q_land, k_land = finite_queries(xp, means_of_segments(xp, q, m)), means_of_segments(xp, k, m)
        at_landmarks = attend(q_land, k, v, scale=scale)
        values = invert(landmark_weights(xp, q_land, k_land, scale), iterations=iterations) @ at_landmarks
        return attend(q, k_land, values, scale=scale)

    return composed


_by_kernels = _composed(softmax_attention, iterative_pinv)
_generic = _composed(softmax_attention.generic, iterative_pinv.generic)


@kernel(outputs=outputs, options={}, parts=_by_kernels, reads_half=True)
def landmark_attention(q: Array, k: Array, v: Array, /, *, m: int, iterations: int, scale: float) -> Array:
    """The output (..., n, d_v) of queries (..., n, d) for keys (..., n_kv, d) and values, with m ≤ n, n_kv landmarks.

    q, k and v may have half precision in place of float32; the output has the dtype of q.
    """
    return _generic(q, k, v, m=m, iterations=iterations, scale=scale)
