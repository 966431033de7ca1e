"""Softmax attention by jax.nn.dot_product_attention."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from subquad.backend import Accepts, Call, Override
from subquad_jax.batch_axes import items_behind
from subquad_numpy.needs import why_not_compiled

# Maximum logits, which JAX's attention holds all at once: with more, the blocked form is better.
LOGITS = 2**24
FEW_ROWS = 256  # queries and keys up to which JAX's is the faster one, a call into compiled code being the larger part


def declines(call: Call) -> str | None:
    """The reason why JAX's attention cannot take the call, or None."""
    (q, k, v), key_mask = call.arrays, call.key_mask
    assert q is not None
    assert k is not None
    assert v is not None
    masks = () if key_mask is None else key_mask.shape[:-1]
    if 0 in (*q.shape, *k.shape, *v.shape, *masks):
        return "an axis is empty"
    if q.shape[-1] != v.shape[-1]:
        return f"it wants d_v = d, got {v.shape[-1]} and {q.shape[-1]}"
    rows = max(q.shape[-2], k.shape[-2])
    if jax.default_backend() == "cpu" and rows > FEW_ROWS and why_not_compiled() is None:
        return "the compiled kernel is faster for many rows"
    batch = jnp.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], masks)
    logits = math.prod(batch) * q.shape[-2] * k.shape[-2] * max(map(items_behind, call.arrays))
    if logits > LOGITS:
        return f"it would hold {logits} logits at once"
    return None


def softmax_attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    *,
    scale: float,
    key_mask: Array | None = None,
) -> Array:
    """The kernel `softmax_attention` without causality."""
    mask = seen = None
    if key_mask is not None:
        k, v = (jnp.where(key_mask[..., None], x, 0.0) for x in (k, v))
        seen = jnp.any(key_mask, axis=-1)[..., None, None]
        mask = key_mask[..., None, :] | ~seen  # a row of only hidden keys would be 0/0; it is set to 0 below
    batch = jnp.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], () if mask is None else mask.shape[:-2])
    heads = math.prod(batch)

    def rows_first(x: Array) -> Array:  # (..., n, d) → (1, n, heads, d)
        x = jnp.broadcast_to(x, (*batch, *x.shape[-2:])).reshape(heads, *x.shape[-2:])
        return jnp.moveaxis(x, 0, 1)[None]

    if mask is not None:
        mask = jnp.broadcast_to(mask, (*batch, *mask.shape[-2:])).reshape(1, heads, *mask.shape[-2:])
        mask = jnp.broadcast_to(mask, (1, heads, q.shape[-2], k.shape[-2]))
    out = jax.nn.dot_product_attention(rows_first(q), rows_first(k), rows_first(v), mask=mask, scale=scale)
    out = jnp.moveaxis(out[0], 1, 0).reshape(*batch, q.shape[-2], v.shape[-1])
    return out if seen is None else jnp.where(seen, out, 0.0)


OVERRIDE = Override(
    "softmax_attention",
    "dot_product_attention",
    softmax_attention,
    Accepts(
        # No float64, since the softmax is taken in float32. No half precision, whose weights JAX rounds before it sums
        # values. No causal form, since hidden values are multiplied by 0: a
        # value that is not finite would reach rows that do not see it.
        dtypes=("float32",),
        devices=("cpu", "gpu", "tpu"),
        options=frozenset({"key_mask"}),
        under=frozenset({"tracing", "tangents"}),
        also=declines,
    ),
)
