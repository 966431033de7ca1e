"""Attention through features, in O(n m d): what FAVOR+ and linear attention share.

    out[i] = φ(q[i])ᵀ Σ_j φ(k[j]) v[j]ᵀ / φ(q[i])ᵀ Σ_j φ(k[j]),    φ = value · exp(log)

A feature map gives φ as a pair: `value` (..., n, m) or None for 1, and `log` (..., n, m), (..., n, 1) or None for 0.
Every sum over keys is kept relative to exp(shift), the largest exponent so far *per feature* (the width of `log`).
The shift cancels between the query and the key side, exactly; without it real keys underflow to 0/0 in float32.

A state is {"shift": (..., 1, m or 1), "kv": (..., m, d_v), "k": (..., m, 1)}: Σ φ(k) vᵀ and Σ φ(k), over exp(shift).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
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
        phi_q = _query_features(xp, queries(q))
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

    Nothing in row i depends on a later key, not even its rounding: exponents are taken relative to the state's shift ρ
    (in a first block, to its first key), each key is scaled by its own largest feature exp(a[j]), and row i by
    exp(−R[i]), R[i] half the largest a[j] that it sees: half, so that neither the state nor the new keys underflow
    before a[j] passes 160 in float32. (R[i] is `divisor` in the code, exp(−R[i]) `held`.)
    """
    k, v = _visible(xp, k, v, mask)
    value, log = _hide(xp, phi.keys(k), mask)
    where = device(q)
    position = xp.arange(q.shape[-2], device=where)
    visible = position[:, None] >= position
    # a key or value that is not finite reaches the rows that see it and no others, though 0 · NaN is NaN
    bad = ~(xp.all(xp.isfinite(k), axis=-1, keepdims=True) & xp.all(xp.isfinite(v), axis=-1, keepdims=True))
    if mask is not None:
        bad = bad & mask
    safe_v = xp.where(bad, 0.0, v)

    if log is None:
        phi_q, phi_k = phi.queries(state["shift"])(q)[0], value
        held = xp.ones_like(q[..., :1])
        weights = phi_q @ xp.matrix_transpose(phi_k)
    else:
        reference = finite(xp, xp.where(state["shift"] == -math.inf, log[..., :1, :], state["shift"]))
        phi_q = _query_features(xp, phi.queries(reference)(q))
        relative = log - reference
        largest = xp.max(relative, axis=-1, keepdims=True)
        phi_k = _exp_minus(xp, relative, finite(xp, largest))
        phi_k = phi_k if value is None else phi_k * value
        a = xp.matrix_transpose(largest)
        a = xp.where(visible & xp.matrix_transpose(~bad), a, -math.inf)
        most = finite(xp, xp.max(a, axis=-1, keepdims=True))
        empty = xp.all(state["shift"] == -math.inf, axis=-1, keepdims=True)
        # the state, at exponent 0, is one of the things seen; where it is empty, the keys have the range to themselves
        divisor = xp.where(empty, most, xp.where(most > 0, most / 2, 0.0))
        held = xp.exp(-xp.where(empty, 0.0, divisor))
        weights = (phi_q @ xp.matrix_transpose(phi_k)) * xp.exp(a - divisor)
    weights = xp.where(visible, weights, 0.0)
    weights = xp.where(xp.matrix_transpose(bad), 0.0, weights)
    numerator = weights @ safe_v + held * (phi_q @ state["kv"])
    denominator = xp.sum(weights, axis=-1, keepdims=True) + held * (phi_q @ state["k"])
    out = divide(xp, numerator, denominator)
    poisoned = xp.any(visible & xp.matrix_transpose(bad), axis=-1, keepdims=True)
    return _add(xp, state, v, value, log), xp.where(poisoned, math.nan, out)


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


def _query_features(xp: ModuleType, features: Features) -> Array:
    """φ(q) · exp(shift), up to a factor of each row; `log` None stands for such a factor."""
    value, log = features
    if log is None:
        return value
    phi = _exp_minus(xp, log, xp.max(log, axis=-1, keepdims=True))
    return phi if value is None else phi * value


def _exp_minus(xp: ModuleType, x: Array, y: Array) -> Array:
    """exp(x − y); x is not used again."""
    in_place = backend_of(xp).exp_minus
    return xp.exp(x - y) if in_place is None else in_place(x, y)


def _fade(xp: ModuleType, old: Array, new: Array) -> Array:
    """exp(old − new) for every feature, shape (..., m or 1, 1)."""
    return xp.matrix_transpose(fade(xp, old, new))
