"""Attention through features, in O(n m (d + d_v)): three kernels that summarise keys, attend to a state, and step.

FAVOR+ and linear attention are both of this form:

    out[i] = φ(q[i])ᵀ Σ_j φ(k[j]) v[j]ᵀ / φ(q[i])ᵀ Σ_j φ(k[j]),    φ = value · exp(log)

A `FeatureMap` gives φ as a pair: `value` (..., n, m) or None for 1, and `log` (..., n, m), (..., n, 1) or None for 0.
Every sum over keys is stored divided by exp(shift), where shift is the largest `log` so far *for each feature* (for all
features together if `log` has one column). The shift cancels exactly between queries and keys; without a shift, real
keys underflow to 0/0 in float32.

A state is three arrays, or (None, None, None) before any key:

    shift        (..., m or 1, 1)    −∞ where there is no key yet
    numerator    (..., m, d_v)       Σ φ(k) vᵀ / exp(shift)
    denominator  (..., m, 1)         Σ φ(k) / exp(shift)

The shift is a gauge: if numerator and denominator follow a change of the shift, no output changes. An implementation
may therefore choose any shift.
"""

from __future__ import annotations

import math

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.dtypes import common_dtype, compute_dtype
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.feature_causal import causal_rows
from subquad.kernels.feature_map import FeatureMap
from subquad.kernels.feature_sums import Sums, add_block, hide, keys_batch, query_features, shown, sums_before
from subquad.kernels.max_shift import divide_or_zero, finite_shift, rescale


def summarize_outputs(
    k: Array, v: Array, *rest: Array | None, phi: FeatureMap, key_mask: Array | None = None
) -> tuple[Like, ...]:
    """Shapes and dtypes of the outputs of `feature_summarize`."""
    state, weights = rest[:3], rest[3:]
    m, width = phi.sizes(k.shape[-1], *weights)
    batch = keys_batch(phi, weights, k, v, key_mask, state[2])
    dtype = compute_dtype(namespace_of(k), k, v)
    return tuple(Like((*batch, *tail), dtype) for tail in ((width, 1), (m, v.shape[-1]), (m, 1)))


def attend_outputs(q: Array, shift: Array, numerator: Array, *rest: Array, phi: FeatureMap) -> tuple[Like, ...]:
    """Shape and dtype of the output of `feature_attend`."""
    batch = broadcast_batch(q=q.shape[:-2], state=numerator.shape[:-2], center=phi.batch(*rest[1:]))
    return (Like((*batch, q.shape[-2], numerator.shape[-1]), q.dtype),)


def step_outputs(
    q: Array, k: Array, v: Array, *rest: Array | None, phi: FeatureMap, key_mask: Array | None = None
) -> tuple[Like, ...]:
    """Shapes and dtypes of the outputs of `feature_step`."""
    state = summarize_outputs(k, v, *rest, phi=phi, key_mask=key_mask)
    batch = broadcast_batch(q=q.shape[:-2], state=state[2].shape[:-2])
    return (Like((*batch, q.shape[-2], v.shape[-1]), common_dtype(namespace_of(q), q, k, v)), *state)


def summarize_pinned(
    arrays: tuple[Array | None, ...], outputs: tuple[Array, ...], *, phi: FeatureMap, key_mask: Array | None = None
) -> tuple[Array, Array, Array]:
    """The outputs of `feature_summarize` with the shift held constant at `outputs[0]`; for maps that have a `log`."""
    k, v, shift, numerator, denominator, *weights = arrays
    xp = namespace_of(k)
    level = outputs[0] + 1  # above every exponent, rounding included, so that no gradient flows through the maximum
    if shift is None or numerator is None or denominator is None:
        before = xp.zeros_like(outputs[1]), xp.zeros_like(outputs[2])
    else:
        faded = rescale(xp, shift, level)
        before = numerator * faded, denominator * faded
    _, *sums = feature_summarize.generic(k, v, level, *before, *weights, phi=phi, key_mask=key_mask)
    back = rescale(xp, level, outputs[0])
    return outputs[0], sums[0] * back, sums[1] * back


def step_pinned(
    arrays: tuple[Array | None, ...], outputs: tuple[Array, ...], *, phi: FeatureMap, key_mask: Array | None = None
) -> tuple[Array, ...]:
    """The outputs of `feature_step` with the shift of the new state held constant at `outputs[1]`."""
    out, *_ = feature_step.generic(*arrays, phi=phi, key_mask=key_mask)
    return out, *summarize_pinned(arrays[1:], outputs[1:], phi=phi, key_mask=key_mask)


@kernel(outputs=summarize_outputs, options={"key_mask": None}, pinned=summarize_pinned, reads_half=True)
def feature_summarize(
    k: Array,
    v: Array,
    shift: Array | None,
    numerator: Array | None,
    denominator: Array | None,
    /,
    *weights: Array,
    phi: FeatureMap,
    key_mask: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The state (shift, numerator, denominator) after adding keys k (..., n, d) and values v (..., n, d_v).

    The state before is three arrays or three times None. `weights` are the arrays of the map `phi`; `key_mask`
    (..., n), True = keep, hides keys. k and v may have half precision in place of float32, a state has not.
    """
    xp = namespace_of(k)
    sums = sums_before(xp, phi, weights, k, v, key_mask, shift, numerator, denominator)
    if k.shape[-2] == 0:
        return sums.outside(xp)

    def add(sums: Sums, k: Array, v: Array, mask: Array | None) -> tuple[Sums, None]:
        k, v = shown(xp, k, v, mask)
        value, log = hide(xp, phi.map_keys(xp, k, *weights), mask)
        return add_block(xp, sums, v, value, log), None

    mask = None if key_mask is None else key_mask[..., None]
    size = rows_per_block(math.prod(sums.denominator.shape[:-1]) * backend_of(xp).items_behind(k, v))
    sums, _ = fold_blocks(add, sums, [k, v, mask], size, xp=xp)
    return sums.outside(xp)


@kernel(outputs=attend_outputs, reads_half=True)
def feature_attend(
    q: Array, shift: Array, numerator: Array, denominator: Array, /, *weights: Array, phi: FeatureMap
) -> Array:
    """The output (..., n, d_v) of queries q (..., n, d) that read a state; 0 where the denominator is 0.

    q may have half precision in place of float32, and the output then has it too.
    """
    xp = namespace_of(q)
    shift = xp.matrix_transpose(shift)
    queries = phi.map_queries(xp, finite_shift(xp, shift), *weights)

    def rows(_: None, q: Array) -> tuple[None, Array]:
        phi_q, _ = query_features(xp, queries(q), shift)
        return None, divide_or_zero(xp, phi_q @ numerator, phi_q @ denominator)

    batch = broadcast_batch(q=q.shape[:-2], state=denominator.shape[:-2], center=phi.batch(*weights))
    if q.shape[-2] == 0:
        return xp.zeros((*batch, 0, numerator.shape[-1]), dtype=q.dtype, device=place_of(q))
    width = math.prod(batch) * denominator.shape[-2] * backend_of(xp).items_behind(q, numerator)
    _, out = fold_blocks(rows, None, [q], rows_per_block(width), xp=xp)
    return out


@kernel(outputs=step_outputs, options={"key_mask": None}, pinned=step_pinned, reads_half=True)
def feature_step(
    q: Array,
    k: Array,
    v: Array,
    shift: Array | None,
    numerator: Array | None,
    denominator: Array | None,
    /,
    *weights: Array,
    phi: FeatureMap,
    key_mask: Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    """(out, shift, numerator, denominator): causal output of n new rows after a state, and the state after them.

    Row i reads the state before and the keys 0 … i of this call, so q and k have the same number of rows. q, k and v
    may have half precision in place of float32; the output has it if they have the same, a state has not.
    """
    xp = namespace_of(q)
    sums = sums_before(xp, phi, weights, k, v, key_mask, shift, numerator, denominator)
    batch = broadcast_batch(q=q.shape[:-2], state=sums.batch)
    if q.shape[-2] == 0:
        return xp.zeros((*batch, 0, v.shape[-1]), dtype=q.dtype, device=place_of(q)), *sums.outside(xp)
    sums, out = causal_rows(xp, phi, weights, sums, q, k, v, None if key_mask is None else key_mask[..., None])
    return out, *sums.outside(xp)
