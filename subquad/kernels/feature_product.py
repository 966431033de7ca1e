"""Attention through features, in O(n m d): what FAVOR+ and linear attention share.

    out[i] = φ(q[i])ᵀ Σ_j φ(k[j]) v[j]ᵀ / φ(q[i])ᵀ Σ_j φ(k[j]),    φ = value · exp(log)

A feature map gives φ as a pair: `value` (..., n, m) or None for 1, and `log` (..., n, m), (..., n, 1) or None for 0.
Every sum over keys is kept relative to exp(shift), the largest exponent so far *per feature* (the width of `log`).
The shift cancels between the query and the key side, exactly; without it real keys underflow to 0/0 in float32.

A state is {"shift": (..., 1, m or 1), "kv": (..., m, d_v), "k": (..., m, 1)}: Σ φ(k) vᵀ and Σ φ(k), over exp(shift).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from array_api_compat import array_namespace, device

from subquad._arrays import broadcast_batch
from subquad._blocks import rows_per_block, scan_blocks
from subquad._dispatch import Array, backend_of, kernel
from subquad.kernels._feature_map import FeatureMap, Features
from subquad.kernels._online import State, divide, fade, finite

CAUSAL_ROWS = 256  # rows of a block whose weights are formed pair by pair


@kernel
def feature_product(
    q: Array, k: Array, v: Array, /, *, phi: FeatureMap, causal: bool = False, key_mask: Array | None = None
) -> Array:
    """Attention through features of checked arrays; causal is aligned at the end, as in `softmax_attention`."""
    xp = array_namespace(q)
    state = no_keys(xp, phi, k, v, key_mask)
    if not causal:
        return read(xp, phi, q, absorb(xp, phi, state, k, v, key_mask))
    ahead = k.shape[-2] - q.shape[-2]
    early = max(-ahead, 0)  # rows before the first key
    if ahead > 0:  # keys that every row sees
        head = None if key_mask is None else key_mask[..., :ahead]
        state = absorb(xp, phi, state, k[..., :ahead, :], v[..., :ahead, :], head)
        k, v = k[..., ahead:, :], v[..., ahead:, :]
        key_mask = None if key_mask is None else key_mask[..., ahead:]
    state, out = advance(xp, phi, state, q[..., early:, :], k, v, key_mask)
    if early:
        shape = (*out.shape[:-2], early, out.shape[-1])
        out = xp.concat([xp.zeros(shape, dtype=out.dtype, device=device(out)), out], axis=-2)
    return out


def no_keys(xp: ModuleType, phi: FeatureMap, k: Array, v: Array, key_mask: Array | None) -> State:
    """The state before any key."""
    mask_batch = None if key_mask is None else key_mask.shape[:-1]
    batch = broadcast_batch(k=k.shape[:-2], v=v.shape[:-2], key_mask=mask_batch, center=phi.batch)
    where = device(k)
    return {
        "shift": xp.full((*batch, 1, phi.width), -math.inf, dtype=k.dtype, device=where),
        "kv": xp.zeros((*batch, phi.m, v.shape[-1]), dtype=k.dtype, device=where),
        "k": xp.zeros((*batch, phi.m, 1), dtype=k.dtype, device=where),
    }


def absorb(xp: ModuleType, phi: FeatureMap, state: State, k: Array, v: Array, key_mask: Array | None) -> State:
    """The state with more keys."""
    if k.shape[-2] == 0:
        return state

    def add(state: State, k: Array, v: Array, mask: Array | None) -> tuple[State, None]:
        k, v = _visible(xp, k, v, mask)
        value, log = _hide(xp, phi.keys(k), mask)
        return _add(xp, state, v, value, log), None

    mask = None if key_mask is None else key_mask[..., None]
    state, _ = scan_blocks(add, state, [k, v, mask], rows_per_block(math.prod(state["k"].shape[:-1])), xp=xp)
    return state


def merge(xp: ModuleType, left: State, right: State) -> State:
    """The state of both chunks of keys."""
    shift = xp.maximum(left["shift"], right["shift"])
    one, other = _fade(xp, left["shift"], shift), _fade(xp, right["shift"], shift)
    return {"shift": shift} | {name: left[name] * one + right[name] * other for name in ("kv", "k")}


def read(xp: ModuleType, phi: FeatureMap, q: Array, state: Mapping[str, Any]) -> Array:
    """Output of all queries from a state."""
    queries = phi.queries(finite(xp, state["shift"]))
    kv, k_sum = state["kv"], state["k"]

    def rows(_: None, q: Array) -> tuple[None, Array]:
        phi_q, _ = _query_features(xp, queries(q), state["shift"])
        return None, divide(xp, phi_q @ kv, phi_q @ k_sum)

    batch = broadcast_batch(q=q.shape[:-2], state=k_sum.shape[:-2], center=phi.batch)
    if q.shape[-2] == 0:
        return xp.zeros((*batch, 0, kv.shape[-1]), dtype=q.dtype, device=device(q))
    _, out = scan_blocks(rows, None, [q], rows_per_block(math.prod(batch) * k_sum.shape[-2]), xp=xp)
    return out


def advance(
    xp: ModuleType, phi: FeatureMap, state: State, q: Array, k: Array, v: Array, key_mask: Array | None
) -> tuple[State, Array]:
    """Causal output of new rows after a state, and the state that includes them."""
    held, mask_batch = state["k"].shape[:-2], None if key_mask is None else key_mask.shape[:-1]
    held = broadcast_batch(state=held, k=k.shape[:-2], v=v.shape[:-2], key_mask=mask_batch, center=phi.batch)
    # at once what the new keys would make of it: a traced loop may not change the shape of what it carries
    state = {
        name: x if tuple(x.shape[:-2]) == held else xp.broadcast_to(x, (*held, *x.shape[-2:]))
        for name, x in state.items()
    }
    batch = broadcast_batch(q=q.shape[:-2], state=held)
    if q.shape[-2] == 0:
        return state, xp.zeros((*batch, 0, v.shape[-1]), dtype=q.dtype, device=device(q))

    def step(state: State, q: Array, k: Array, v: Array, mask: Array | None) -> tuple[State, Array]:
        return _causal_block(xp, phi, state, q, k, v, mask)

    mask = None if key_mask is None else key_mask[..., None]
    size = rows_per_block(math.prod(batch) * phi.m, most=CAUSAL_ROWS)
    return scan_blocks(step, state, [q, k, v, mask], size, xp=xp)


def _causal_block(
    xp: ModuleType, phi: FeatureMap, state: State, q: Array, k: Array, v: Array, mask: Array | None
) -> tuple[State, Array]:
    """Rows of one block: what the state holds, and the keys of the block up to each row, pair by pair.

    Nothing in row i depends on a later key, not even its rounding. Exponents are taken relative to ρ, the state's shift
    (in a first block, its first key): so φ(q) reaches what the state holds. Where the product of a pair is lost below
    the range of the dtype, since ρ is of keys that are nothing like this one, it is taken relative to 0 instead.
    """
    k, v = _visible(xp, k, v, mask)
    value, log = _hide(xp, phi.keys(k), mask)
    position = xp.arange(q.shape[-2], device=device(q))
    visible = position[:, None] >= position
    # a key or value that is not finite reaches the rows that see it and no others, though 0 · NaN is NaN
    bad = ~(xp.all(xp.isfinite(k), axis=-1, keepdims=True) & xp.all(xp.isfinite(v), axis=-1, keepdims=True))
    if mask is not None:
        bad = bad & mask
    safe_v = xp.where(bad, 0.0, v)
    seen = visible & xp.matrix_transpose(~bad)

    shift = state["shift"]
    reference = finite(xp, shift if log is None else xp.where(shift == -math.inf, log[..., :1, :], shift))
    phi_q, level = _query_features(xp, phi.queries(reference)(q), reference)
    if log is None:
        weights, level_pairs = phi_q @ xp.matrix_transpose(value), level
        weights = xp.where(seen, weights, 0.0)
    else:
        products, a = _pairs(xp, phi_q, value, log - reference)
        a = xp.where(seen, a, -math.inf)
        most = finite(xp, xp.max(a, axis=-1, keepdims=True))
        weights, level_pairs = xp.where(seen, products * xp.exp(a - most), 0.0), level + most
        info = xp.finfo(q.dtype)
        least = info.smallest_normal / info.eps**2  # of what is below, some features are lost
        lost = xp.any((a > -math.inf) & (products < least), axis=-1, keepdims=True)

        def from_zero(weights: Array, level_pairs: Array) -> tuple[Array, Array]:
            zero = xp.zeros_like(reference)
            own_phi_q, own_level = _query_features(xp, phi.queries(zero)(q), zero)
            own_products, own_a = _pairs(xp, own_phi_q, value, log - zero)
            one, other = _height(xp, products, a + level), _height(xp, own_products, own_a + own_level)
            other = xp.where(own_products < least, xp.maximum(one, other), other)
            logs = xp.where(seen, xp.where(products < least, other, one), -math.inf)
            most = finite(xp, xp.max(logs, axis=-1, keepdims=True))
            return xp.where(lost, xp.exp(logs - most), weights), xp.where(lost, most, level_pairs)

        if phi.width > 1:
            weights, level_pairs = _if_any(xp, lost, from_zero, (weights, level_pairs))
    pairs = weights @ safe_v, xp.sum(weights, axis=-1, keepdims=True), level_pairs
    out = _merge_rows(xp, pairs, (phi_q @ state["kv"], phi_q @ state["k"], level))
    poisoned = xp.any(visible & xp.matrix_transpose(bad), axis=-1, keepdims=True)
    return _add(xp, state, v, value, log), xp.where(poisoned, math.nan, out)


def _pairs(xp: ModuleType, phi_q: Array, value: Array | None, log: Array) -> tuple[Array, Array]:
    """Products of the features of all pairs, (..., n, n), over exp(a), and a, (..., 1, n): the largest of each key."""
    largest = xp.max(log, axis=-1, keepdims=True)
    phi_k = _exp_minus(xp, log, finite(xp, largest))
    phi_k = phi_k if value is None else phi_k * value
    return phi_q @ xp.matrix_transpose(phi_k), xp.matrix_transpose(largest)


def _if_any(xp: ModuleType, condition: Array, change: Callable[..., Any], given: tuple[Array, ...]) -> Any:
    """`change(*given)`, not computed where it would change nothing since the condition is nowhere true."""
    backend = backend_of(xp)
    if backend.concrete(condition):
        return change(*given) if bool(xp.any(condition)) else given
    return change(*given) if backend.cond is None else backend.cond(xp.any(condition), change, given)


def _merge_rows(xp: ModuleType, *parts: tuple[Array, Array, Array]) -> Array:
    """Σ exp(level) numerator / Σ exp(level) denominator: levels may be far apart, and denominators far from 1."""
    # features that are not positive may cancel in one of the parts alone: its numerator counts all the same
    sizes = [
        xp.where(below == 0, xp.sum(xp.abs(above), axis=-1, keepdims=True), xp.abs(below)) for above, below, _ in parts
    ]
    heights = [_height(xp, size, level) for size, (_, _, level) in zip(sizes, parts, strict=True)]
    highest = finite(xp, xp.maximum(*heights))
    numerator, denominator = 0.0, 0.0
    for size, height, (above, below, _) in zip(sizes, heights, parts, strict=True):
        weight = xp.exp(height - highest)
        numerator = numerator + divide(xp, above, size) * weight
        denominator = denominator + divide(xp, below, size) * weight
    return divide(xp, numerator, denominator)


def _height(xp: ModuleType, total: Array, level: Array) -> Array:
    """log |total| + level."""
    size = xp.abs(total)
    return xp.where(size == 0, -math.inf, xp.log(xp.where(size == 0, 1.0, size)) + level)


def _add(xp: ModuleType, state: State, v: Array, value: Array | None, log: Array | None) -> State:
    """The state with the keys of a block added; the shift grows to the block's largest exponents."""
    if log is None:
        shift, phi_k, faded = xp.zeros_like(state["shift"]), value, 1.0
    else:
        shift = xp.maximum(state["shift"], xp.max(log, axis=-2, keepdims=True))
        phi_k = _exp_minus(xp, log, finite(xp, shift))
        phi_k = phi_k if value is None else phi_k * value
        faded = _fade(xp, state["shift"], shift)
    return {
        "shift": shift,
        "kv": state["kv"] * faded + xp.matrix_transpose(phi_k) @ v,
        "k": state["k"] * faded + xp.matrix_transpose(xp.sum(phi_k, axis=-2, keepdims=True)),
    }


def _visible(xp: ModuleType, k: Array, v: Array, mask: Array | None) -> tuple[Array, Array]:
    """Zeros in place of hidden rows: 0 · NaN is NaN, in products and in their gradients."""
    return (k, v) if mask is None else (xp.where(mask, k, 0.0), xp.where(mask, v, 0.0))


def _hide(xp: ModuleType, features: Features, mask: Array | None) -> Features:
    """Features of the keys with masked keys set to φ = 0."""
    value, log = features
    if mask is None:
        return value, log
    hidden = None if value is None else xp.where(mask, value, 0.0)
    return hidden, None if log is None else xp.where(mask, log, -math.inf)


def _query_features(xp: ModuleType, features: Features, shift: Array) -> tuple[Array, Array]:
    """φ(q) · exp(shift − level), and that level, up to a factor of each row; `log` None stands for such a factor."""
    value, log = features
    if log is None:
        return value, shift
    level = xp.max(log, axis=-1, keepdims=True)
    phi = _exp_minus(xp, log, level)
    return (phi if value is None else phi * value), level


def _exp_minus(xp: ModuleType, x: Array, y: Array) -> Array:
    """exp(x − y); x is not used again."""
    in_place = backend_of(xp).exp_minus
    return xp.exp(x - y) if in_place is None else in_place(x, y)


def _fade(xp: ModuleType, old: Array, new: Array) -> Array:
    """exp(old − new) for every feature, shape (..., m or 1, 1)."""
    return xp.matrix_transpose(fade(xp, old, new))
