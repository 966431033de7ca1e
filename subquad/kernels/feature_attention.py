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
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.dtypes import common_dtype, compute_dtype
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.feature_map import FeatureMap, Features
from subquad.kernels.max_shift import divide_or_zero, finite_shift, rescale

RUN = 16  # rows of a run of `_exact_block`, whose pairs are formed feature by feature, in O(RUN² m)
CAUSAL_ROWS = 256  # max rows of a causal block: its rows × rows weights are formed pair by pair, in O(rows² m)


class Sums(NamedTuple):
    """A state with the shift transposed to (..., 1, m or 1), so that it broadcasts against exponents (..., n, m)."""

    shift: Array
    numerator: Array
    denominator: Array

    @property
    def batch(self) -> tuple[int, ...]:
        """The batch shape of the state."""
        return tuple(self.denominator.shape[:-2])

    def outside(self, xp: ModuleType) -> tuple[Array, Array, Array]:
        """(shift, numerator, denominator) in the shapes of a state, the shift (..., m or 1, 1) again."""
        return xp.matrix_transpose(self.shift), self.numerator, self.denominator


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


def keys_batch(
    phi: FeatureMap, weights: tuple[Any, ...], k: Array, v: Array, key_mask: Array | None, held: Array | None = None
) -> tuple[int, ...]:
    """The batch shape of sums over keys that continue a state; `held` is its denominator, None without a state."""
    return broadcast_batch(
        state=None if held is None else held.shape[:-2],
        k=k.shape[:-2],
        v=v.shape[:-2],
        key_mask=None if key_mask is None else key_mask.shape[:-1],
        center=phi.batch_of_keys(*weights),
    )


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
    sums = _begin(xp, phi, weights, k, v, key_mask, shift, numerator, denominator)
    if k.shape[-2] == 0:
        return sums.outside(xp)

    def add(sums: Sums, k: Array, v: Array, mask: Array | None) -> tuple[Sums, None]:
        k, v = _visible(xp, k, v, mask)
        value, log = _hide(xp, phi.map_keys(xp, k, *weights), mask)
        return _add(xp, sums, v, value, log), None

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
        phi_q, _ = _query_features(xp, queries(q), shift)
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
    sums = _begin(xp, phi, weights, k, v, key_mask, shift, numerator, denominator)
    batch = broadcast_batch(q=q.shape[:-2], state=sums.batch)
    if q.shape[-2] == 0:
        return xp.zeros((*batch, 0, v.shape[-1]), dtype=q.dtype, device=place_of(q)), *sums.outside(xp)

    def step(sums: Sums, q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Sums, Array]:
        # a program that unrolls the loop over blocks has a small number of large ones
        large = backend_of(xp).holds(q.shape[-2] > CAUSAL_ROWS)
        return (_causal_runs if large else _causal_block)(xp, phi, weights, sums, q, k, v, mask)

    mask = None if key_mask is None else key_mask[..., None]
    width = math.prod(batch) * sums.denominator.shape[-2] * backend_of(xp).items_behind(q, k, v)
    size = rows_per_block(width, max_rows=CAUSAL_ROWS)
    sums, out = fold_blocks(step, sums, [q, k, v, mask], size, xp=xp)
    return out, *sums.outside(xp)


def _begin(
    xp: ModuleType,
    phi: FeatureMap,
    weights: tuple[Array, ...],
    k: Array,
    v: Array,
    key_mask: Array | None,
    shift: Array | None,
    numerator: Array | None,
    denominator: Array | None,
) -> Sums:
    """The state before new keys, broadcast to the batch shape after them: a traced loop carries one shape."""
    batch = keys_batch(phi, weights, k, v, key_mask, denominator)
    if denominator is None or shift is None or numerator is None:
        (m, width), where = phi.sizes(k.shape[-1], *weights), place_of(k)
        return Sums(
            xp.full((*batch, 1, width), -math.inf, dtype=k.dtype, device=where),
            xp.zeros((*batch, m, v.shape[-1]), dtype=k.dtype, device=where),
            xp.zeros((*batch, m, 1), dtype=k.dtype, device=where),
        )
    sums = Sums(xp.matrix_transpose(shift), numerator, denominator)
    return Sums(*(x if tuple(x.shape[:-2]) == batch else xp.broadcast_to(x, (*batch, *x.shape[-2:])) for x in sums))


def _causal_block(
    xp: ModuleType,
    phi: FeatureMap,
    weights: tuple[Array, ...],
    sums: Sums,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
) -> tuple[Sums, Array]:
    """(sums after the block, output of its rows): a row reads the state and, pair by pair, the block's keys up to it.

    Nothing in row i depends on a later key, not even its rounding. Exponents are taken relative to a reference ρ: the
    shift of the state, or in a first block the exponents of its first key. The products of φ(q) with the state are then
    in range, for the state is stored relative to ρ too. If the features of a key are so far below ρ that the product of
    a pair underflows, the row is computed again by `_exact_block`.
    """
    k, v = _visible(xp, k, v, mask)
    value, log = _hide(xp, phi.map_keys(xp, k, *weights), mask)
    position = xp.arange(q.shape[-2], device=place_of(q))
    visible = position[:, None] >= position
    # a key or value that is not finite reaches the rows that see it and no others, though 0 · NaN is NaN
    bad = ~(xp.all(xp.isfinite(k), axis=-1, keepdims=True) & xp.all(xp.isfinite(v), axis=-1, keepdims=True))
    if mask is not None:
        bad = bad & mask
    safe_v = xp.where(bad, 0.0, v)
    seen = visible & xp.matrix_transpose(~bad)

    shift = sums.shift
    reference = finite_shift(xp, shift if log is None else xp.where(shift == -math.inf, log[..., :1, :], shift))
    phi_q, level = _query_features(xp, phi.map_queries(xp, reference, *weights)(q), reference)
    if log is None:
        pairs, level_pairs = phi_q @ xp.matrix_transpose(value), level
        pairs = xp.where(seen, pairs, 0.0)
    else:
        products, a = _pairs(xp, phi_q, value, log - reference)
        a = xp.where(seen, a, -math.inf)
        most = finite_shift(xp, xp.max(a, axis=-1, keepdims=True))
        pairs, level_pairs = xp.where(seen, products * xp.exp(a - most), 0.0), level + most
        info = xp.finfo(q.dtype)
        least = info.smallest_normal / info.eps**2  # a product below this may have lost features to underflow
        lost = xp.any((a > -math.inf) & (products < least), axis=-1, keepdims=True)
    of_block = pairs @ safe_v, xp.sum(pairs, axis=-1, keepdims=True)
    of_state = phi_q @ sums.numerator, phi_q @ sums.denominator
    repairs = log is not None and shift.shape[-1] > 1
    if repairs:  # sums of a lost row may be so small that the gradient, which is 0, would meet an infinite slope
        of_block, of_state = (tuple(xp.where(lost, 0.0, x) for x in part) for part in (of_block, of_state))
    out = _merge_rows(xp, (*of_block, level_pairs), (*of_state, level))
    if repairs:

        def repair(out: Array) -> tuple[Array]:
            hidden = value, xp.where(bad, -math.inf, log)
            return (xp.where(lost, _exact_block(xp, phi, weights, sums, q, safe_v, hidden), out),)

        (out,) = _if_any(xp, lost, repair, (out,))
    poisoned = xp.any(visible & xp.matrix_transpose(bad), axis=-1, keepdims=True)
    return _add(xp, sums, v, value, log), xp.where(poisoned, math.nan, out)


def _exact_block(
    xp: ModuleType, phi: FeatureMap, weights: tuple[Array, ...], sums: Sums, q: Array, v: Array, features: Features
) -> Array:
    """The output of a causal block whatever the exponents of its features; `features` are those of its keys.

    The block is cut into runs of `RUN` rows. A row reads the state before its run, in which every feature has a shift
    of its own, and the keys of its run pair by pair and feature by feature, each term relative to the largest one.
    """
    n, (value, log) = q.shape[-2], features
    batch = broadcast_batch(q=q.shape[:-2], state=sums.batch)
    runs = -(-n // RUN)

    def cut(x: Array | None, fill: float = 0.0) -> Array:
        if x is None:
            return None
        if runs * RUN > n:
            rest = xp.full((*x.shape[:-2], runs * RUN - n, x.shape[-1]), fill, dtype=x.dtype, device=place_of(x))
            x = xp.concat([x, rest], axis=-2)
        return xp.reshape(x, (*x.shape[:-2], runs, RUN, x.shape[-1]))

    q, v, value, log = cut(q), cut(v), cut(value), cut(log, -math.inf)
    weights = _beside_runs(xp, weights)
    shift = xp.max(log, axis=-2, keepdims=True)
    phi_k = xp.exp(log - finite_shift(xp, shift))  # `log` is needed again, so it must not be overwritten
    before = _before_each(xp, sums, _sums_of(xp, shift, phi_k if value is None else phi_k * value, v))
    reference = finite_shift(xp, before.shift)
    phi_q, level = _query_features(xp, phi.map_queries(xp, reference, *weights)(q), reference)
    value_q, log_q = phi.map_queries(xp, xp.zeros_like(reference[..., :1, :, :]), *weights)(q)
    # broadcast by now: in pairs of rows this would be two axes more of one operation, which may not take as many
    value_q, log_q, value, log = (
        x if x is None else xp.broadcast_to(x, (*batch, *x.shape[-3:])) for x in (value_q, log_q, value, log)
    )
    terms = xp.expand_dims(log_q, axis=-2) + xp.expand_dims(log, axis=-3)  # (..., runs, RUN, RUN, m)
    place = xp.arange(RUN, device=place_of(q))
    terms = xp.where((place[:, None] >= place)[..., None], terms, -math.inf)
    most = finite_shift(xp, xp.max(terms, axis=(-2, -1), keepdims=True))
    pairs = xp.exp(terms - most)
    for factor, axis in ((value_q, -2), (value, -3)):
        pairs = pairs if factor is None else pairs * xp.expand_dims(factor, axis=axis)
    pairs = xp.sum(pairs, axis=-1)
    of_run = pairs @ v, xp.sum(pairs, axis=-1, keepdims=True), xp.reshape(most, most.shape[:-1])
    out = _merge_rows(xp, of_run, (phi_q @ before.numerator, phi_q @ before.denominator, level))
    out = xp.broadcast_to(out, (*batch, *out.shape[-3:]))
    return xp.reshape(out, (*batch, runs * RUN, out.shape[-1]))[..., :n, :]


def _causal_runs(
    xp: ModuleType,
    phi: FeatureMap,
    weights: tuple[Array, ...],
    sums: Sums,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
) -> tuple[Sums, Array]:
    """`_causal_block` of more than `CAUSAL_ROWS` rows, cut into runs of as many, which advance together."""
    n, count = q.shape[-2], q.shape[-2] // CAUSAL_ROWS
    whole = count * CAUSAL_ROWS

    def cut(x: Array | None) -> Array:
        return x if x is None else xp.reshape(x[..., :whole, :], (*x.shape[:-2], count, CAUSAL_ROWS, x.shape[-1]))

    runs, own = (cut(q), cut(k), cut(v), cut(mask)), _beside_runs(xp, weights)
    seen_k, seen_v = _visible(xp, *runs[1:])
    value, log = _hide(xp, phi.map_keys(xp, seen_k, *own), runs[3])
    shift = xp.zeros_like(seen_k[..., :1, :1]) if log is None else xp.max(log, axis=-2, keepdims=True)
    phi_k = value if log is None else xp.exp(log - finite_shift(xp, shift))
    if log is not None and value is not None:
        phi_k = phi_k * value
    before = _before_each(xp, sums, _sums_of(xp, shift, phi_k, seen_v))
    after, out = _causal_block(xp, phi, own, before, *runs)
    sums = Sums(*(x[..., -1, :, :] for x in after))
    out = xp.reshape(out, (*out.shape[:-3], whole, out.shape[-1]))
    if whole == n:
        return sums, out
    rest = [None if x is None else x[..., whole:, :] for x in (q, k, v, mask)]
    sums, late = _causal_block(xp, phi, weights, sums, *rest)
    return sums, xp.concat([out, late], axis=-2)


def _beside_runs(xp: ModuleType, weights: tuple[Array, ...]) -> tuple[Array, ...]:
    """The weights for rows that are cut into runs: their batch axes stand before the axis of runs."""
    return tuple(x if x is None or x.ndim <= 2 else xp.expand_dims(x, axis=-3) for x in weights)


def _before_each(xp: ModuleType, sums: Sums, parts: Sums) -> Sums:
    """The sums before each of the parts along axis −3: `sums` and all earlier parts; in log₂(parts) passes."""
    held = Sums(*(xp.expand_dims(x, axis=-3) for x in sums))
    parts = Sums(*(xp.broadcast_to(x, (*sums.batch, *x.shape[-3:])) for x in parts))
    found = Sums(*(xp.concat([x, y[..., :-1, :, :]], axis=-3) for x, y in zip(held, parts, strict=True)))
    reach = 1
    while reach < found.shift.shape[-3]:
        early, late = (Sums(*(x[..., cut, :, :] for x in found)) for cut in (slice(None, -reach), slice(reach, None)))
        shift = xp.maximum(early.shift, late.shift)
        one, other = (xp.matrix_transpose(rescale(xp, x.shift, shift)) for x in (early, late))
        joined = Sums(
            shift, early.numerator * one + late.numerator * other, early.denominator * one + late.denominator * other
        )
        found = Sums(*(xp.concat([x[..., :reach, :, :], y], axis=-3) for x, y in zip(found, joined, strict=True)))
        reach *= 2
    return found


def _pairs(xp: ModuleType, phi_q: Array, value: Array | None, log: Array) -> tuple[Array, Array]:
    """(products, a): φ(q)·φ(k) / exp(a) of all pairs (..., n, n), and a (..., 1, n), the largest `log` of each key."""
    largest = xp.max(log, axis=-1, keepdims=True)
    phi_k = _exp_difference(xp, log, finite_shift(xp, largest))
    phi_k = phi_k if value is None else phi_k * value
    return phi_q @ xp.matrix_transpose(phi_k), xp.matrix_transpose(largest)


def _if_any(xp: ModuleType, condition: Array, change: Callable[..., Any], given: tuple[Array, ...]) -> Any:
    """`change(*given)` if the condition is true anywhere, else `given`.

    `change` leaves entries as they are where the condition is false, so that it may be called in any case.
    """
    backend = backend_of(xp)
    if backend.is_concrete(condition):
        return change(*given) if bool(xp.any(condition)) else given
    return backend.where_any(xp.any(condition), change, given)


def _merge_rows(xp: ModuleType, *parts: tuple[Array, Array, Array]) -> Array:
    """Σ exp(level) numerator / Σ exp(level) denominator over parts (numerator, denominator, level).

    Levels may be far apart and denominators far from 1: each part is first divided by its own size.
    """
    # features that are not positive may cancel to a denominator of 0 in one part; its numerator must still count
    sizes = [
        xp.where(below == 0, xp.sum(xp.abs(above), axis=-1, keepdims=True), xp.abs(below)) for above, below, _ in parts
    ]
    heights = [_height(xp, size, level) for size, (_, _, level) in zip(sizes, parts, strict=True)]
    highest = finite_shift(xp, xp.maximum(*heights))
    numerator, denominator = 0.0, 0.0
    for size, height, (above, below, _) in zip(sizes, heights, parts, strict=True):
        weight = xp.exp(height - highest)
        numerator = numerator + divide_or_zero(xp, above, size) * weight
        denominator = denominator + divide_or_zero(xp, below, size) * weight
    return divide_or_zero(xp, numerator, denominator)


def _height(xp: ModuleType, total: Array, level: Array) -> Array:
    """log |total| + level, and −∞ where the total is 0."""
    size = xp.abs(total)
    return xp.where(size == 0, -math.inf, xp.log(xp.where(size == 0, 1.0, size)) + level)


def _add(xp: ModuleType, sums: Sums, v: Array, value: Array | None, log: Array | None) -> Sums:
    """The sums after adding the keys of a block; the shift grows to the largest `log` of the block."""
    if log is None:
        shift, phi_k, faded = xp.zeros_like(sums.shift), value, 1.0
    else:
        shift = xp.maximum(sums.shift, xp.max(log, axis=-2, keepdims=True))
        phi_k = _exp_difference(xp, log, finite_shift(xp, shift))
        phi_k = phi_k if value is None else phi_k * value
        faded = xp.matrix_transpose(rescale(xp, sums.shift, shift))  # (..., m or 1, 1)
    more = _sums_of(xp, shift, phi_k, v)
    return Sums(shift, sums.numerator * faded + more.numerator, sums.denominator * faded + more.denominator)


def _sums_of(xp: ModuleType, shift: Array, phi_k: Array, v: Array) -> Sums:
    """The sums over keys of features that are divided by exp(shift)."""
    return Sums(shift, xp.matrix_transpose(phi_k) @ v, xp.matrix_transpose(xp.sum(phi_k, axis=-2, keepdims=True)))


def _visible(xp: ModuleType, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
    """k and v with hidden rows set to 0: a NaN there would reach products and their gradients, since 0 · NaN is NaN."""
    return (k, v) if mask is None else (xp.where(mask, k, 0.0), xp.where(mask, v, 0.0))


def _hide(xp: ModuleType, features: Features, mask: Array | None) -> Features:
    """(value, log) of keys with φ = 0 for the keys that the mask hides."""
    value, log = features
    if mask is None:
        return value, log
    hidden = None if value is None else xp.where(mask, value, 0.0)
    return hidden, None if log is None else xp.where(mask, log, -math.inf)


def _query_features(xp: ModuleType, features: Features, shift: Array) -> tuple[Array, Array]:
    """(φ(q) exp(−level), level) of features (value, log) whose `log` includes the shift; level is the max of each row.

    A factor that a whole row has in common cancels in the output. If `log` is None, the level is the shift given.
    """
    value, log = features
    if log is None:
        return value, shift
    level = xp.max(log, axis=-1, keepdims=True)
    phi = _exp_difference(xp, log, level)
    return (phi if value is None else phi * value), level


def _exp_difference(xp: ModuleType, x: Array, y: Array) -> Array:
    """exp(x − y), by the backend, which may overwrite x: the caller must not use x again."""
    return backend_of(xp).exp_difference(xp, x, y)
