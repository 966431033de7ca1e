"""Causal rows of attention through features: each reads a state, and pair by pair the keys of its block up to it.

The letters are those of `feature_attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.feature_map import FeatureMap, Features
from subquad.kernels.feature_sums import Sums, add_block, exp_difference, hide, query_features, shown, sums_of
from subquad.kernels.max_shift import divide_or_zero, finite_shift, rescale

RUN = 16  # rows of a run of `_exact_block`, whose pairs are formed feature by feature, in O(RUN² m)
CAUSAL_ROWS = 256  # max rows of a causal block: its rows × rows weights are formed pair by pair, in O(rows² m)


def causal_rows(
    xp: ModuleType, phi: FeatureMap, weights: tuple[Array, ...], sums: Sums, q: Array, k: Array, v: Array,
    mask: Array | None,
) -> tuple[Sums, Array]:  # fmt: skip
    """(sums after the rows, output of the rows); the mask is (..., n, 1)."""

    def step(sums: Sums, q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Sums, Array]:
        # a program that unrolls the loop over blocks has a small number of large ones
        large = backend_of(xp).holds(q.shape[-2] > CAUSAL_ROWS)
        return (causal_runs if large else causal_block)(xp, phi, weights, sums, q, k, v, mask)

    batch = broadcast_batch(q=q.shape[:-2], state=sums.batch)
    width = math.prod(batch) * sums.denominator.shape[-2] * backend_of(xp).items_behind(q, k, v)
    return fold_blocks(step, sums, [q, k, v, mask], rows_per_block(width, max_rows=CAUSAL_ROWS), xp=xp)


def causal_block(
    xp: ModuleType, phi: FeatureMap, weights: tuple[Array, ...], sums: Sums, q: Array, k: Array, v: Array,
    mask: Array | None,
) -> tuple[Sums, Array]:  # fmt: skip
    """(sums after the block, output of its rows): a row reads the state and, pair by pair, the block's keys up to it.

    Nothing in row i depends on a later key, not even its rounding. Exponents are taken relative to a reference ρ: the
    shift of the state, or in a first block the exponents of its first key. The products of φ(q) with the state are then
    in range, for the state is stored relative to ρ too. If the features of a key are so far below ρ that the product of
    a pair underflows, the row is computed again by `_exact_block`.
    """
    k, v = shown(xp, k, v, mask)
    value, log = hide(xp, phi.map_keys(xp, k, *weights), mask)
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
    phi_q, level = query_features(xp, phi.map_queries(xp, reference, *weights)(q), reference)
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
    return add_block(xp, sums, v, value, log), xp.where(poisoned, math.nan, out)


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
    before = _before_each(xp, sums, sums_of(xp, shift, phi_k if value is None else phi_k * value, v))
    reference = finite_shift(xp, before.shift)
    phi_q, level = query_features(xp, phi.map_queries(xp, reference, *weights)(q), reference)
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


def causal_runs(
    xp: ModuleType, phi: FeatureMap, weights: tuple[Array, ...], sums: Sums, q: Array, k: Array, v: Array,
    mask: Array | None,
) -> tuple[Sums, Array]:  # fmt: skip
    """`causal_block` of more than `CAUSAL_ROWS` rows, cut into runs of as many, which advance together."""
    n, count = q.shape[-2], q.shape[-2] // CAUSAL_ROWS
    whole = count * CAUSAL_ROWS

    def cut(x: Array | None) -> Array:
        return x if x is None else xp.reshape(x[..., :whole, :], (*x.shape[:-2], count, CAUSAL_ROWS, x.shape[-1]))

    runs, own = (cut(q), cut(k), cut(v), cut(mask)), _beside_runs(xp, weights)
    seen_k, seen_v = shown(xp, *runs[1:])
    value, log = hide(xp, phi.map_keys(xp, seen_k, *own), runs[3])
    shift = xp.zeros_like(seen_k[..., :1, :1]) if log is None else xp.max(log, axis=-2, keepdims=True)
    phi_k = value if log is None else xp.exp(log - finite_shift(xp, shift))
    if log is not None and value is not None:
        phi_k = phi_k * value
    before = _before_each(xp, sums, sums_of(xp, shift, phi_k, seen_v))
    after, out = causal_block(xp, phi, own, before, *runs)
    sums = Sums(*(x[..., -1, :, :] for x in after))
    out = xp.reshape(out, (*out.shape[:-3], whole, out.shape[-1]))
    if whole == n:
        return sums, out
    rest = [None if x is None else x[..., whole:, :] for x in (q, k, v, mask)]
    sums, late = causal_block(xp, phi, weights, sums, *rest)
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
    phi_k = exp_difference(xp, log, finite_shift(xp, largest))
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

    Levels may be far apart and denominators far from 1: each part is first divided by its own size. Over a denominator
    that is infinite, a finite numerator gives 0.
    """
    # features that are not positive may cancel to a denominator of 0 in one part; its numerator must still count
    sizes = [
        xp.where(below == 0, xp.sum(xp.abs(above), axis=-1, keepdims=True), xp.abs(below)) for above, below, _ in parts
    ]
    heights = [_height(xp, size, level) for size, (_, _, level) in zip(sizes, parts, strict=True)]
    highest = finite_shift(xp, xp.maximum(*heights))
    numerator, denominator = 0.0, 0.0
    for size, height, (above, below, _) in zip(sizes, heights, parts, strict=True):
        weight = xp.exp(xp.where(height == math.inf, 0.0, height - highest))  # ∞ − ∞ and ∞ / ∞ are NaN
        numerator = numerator + divide_or_zero(xp, above, size) * weight
        part = xp.where(below == -math.inf, -1.0, divide_or_zero(xp, below, size))
        part = xp.where(below == math.inf, 1.0, part)
        denominator = denominator + part * weight
    return divide_or_zero(xp, numerator, denominator)


def _height(xp: ModuleType, total: Array, level: Array) -> Array:
    """log |total| + level, and −∞ where the total is 0."""
    size = xp.abs(total)
    return xp.where(size == 0, -math.inf, xp.log(xp.where(size == 0, 1.0, size)) + level)
