"""Attention through features, in O(n m d): what FAVOR+ and linear attention share.

    out[i] = φ(q[i])ᵀ Σ_j φ(k[j]) v[j]ᵀ / φ(q[i])ᵀ Σ_j φ(k[j]),    φ = value · exp(log)

A feature map gives φ as a pair: `value` (..., n, m) or None for 1, and `log` (..., n, m), (..., n, 1) or None for 0.
Every sum over keys is kept relative to exp(shift), the largest exponent so far *per feature* (the width of `log`).
The shift cancels between the query and the key side, exactly; without it real keys underflow to 0/0 in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from array_api_compat import device

from subquad._arrays import broadcast_batch, cast, check_arrays, compute_dtype
from subquad._blocks import rows_per_block, scan_blocks
from subquad._dispatch import Array
from subquad.attention import _door
from subquad.attention._method import State, Streaming

Features = tuple[Array | None, Array | None]  # (value, log)
RowMap = Callable[[Array], Features]


@dataclass(frozen=True)
class FeatureMap:
    """φ of keys, and of queries with a shift (..., 1, m) added to `log`, where a factor of a row may be left out."""

    keys: RowMap
    queries: Callable[[Array], RowMap]


CAUSAL_ROWS = 256  # rows of a block whose weights are formed pair by pair


@dataclass(frozen=True)
class FeatureMethod(Streaming):
    """A method defined by a feature map. A subclass gives `map_rows` and `widths`."""

    def map_rows(self, xp: ModuleType, like: Array, *, scale: float, center: tuple[Array, Array] | None) -> FeatureMap:
        """The map of rows to features, for arrays of the dtype and device of `like`."""
        raise NotImplementedError

    def widths(self, xp: ModuleType, k: Array) -> tuple[int, int]:
        """Number of features m of keys like `k`, and the width of `log` (m, or 1 where all features share it)."""
        raise NotImplementedError

    def choose_center(self, inputs: _door.Inputs) -> tuple[Array, Array] | None:
        """Points (q̄, k̄) to subtract from queries and keys, each (..., 1, d)."""
        return None

    def given_center(self, xp: ModuleType, like: Array) -> tuple[Array, Array] | None:
        """The same where no queries are at hand: only what the caller gave."""
        return None

    def evaluate(self, inputs: _door.Inputs) -> Array:
        xp, q, k, v, key_mask = inputs.xp, inputs.q, inputs.k, inputs.v, inputs.key_mask
        center = self.choose_center(inputs)
        phi = self.map_rows(xp, q, scale=inputs.scale, center=center)
        state = self._no_keys(xp, k, v, key_mask, center)
        if not inputs.causal:
            state = self._absorb_all(xp, phi, state, k, v, key_mask)
            return self._read_all(xp, phi, q, state)
        ahead = k.shape[-2] - q.shape[-2]
        early = max(-ahead, 0)  # rows before the first key
        if ahead > 0:  # keys that every row sees
            head = None if key_mask is None else key_mask[..., :ahead]
            state = self._absorb_all(xp, phi, state, k[..., :ahead, :], v[..., :ahead, :], head)
            k, v = k[..., ahead:, :], v[..., ahead:, :]
            key_mask = None if key_mask is None else key_mask[..., ahead:]
        state, out = self._run_causal(xp, phi, state, q[..., early:, :], k, v, key_mask)
        if early:
            shape = (*out.shape[:-2], early, out.shape[-1])
            out = xp.concat([xp.zeros(shape, dtype=out.dtype, device=device(out)), out], axis=-2)
        return out

    def step(
        self,
        q: Array,
        k: Array,
        v: Array,
        state: Mapping[str, Any] | None = None,
        /,
        *,
        key_mask: Array | None = None,
        scale: float | None = None,
    ) -> tuple[Array, State]:
        """Any number of new tokens after `state`, causally: their output, and the state that includes them."""
        if q.shape[-2] != k.shape[-2]:
            msg = f"step takes one key per query, got {q.shape[-2]} queries and {k.shape[-2]} keys"
            raise ValueError(msg)
        inputs = _door.enter(q, k, v, causal=True, key_mask=key_mask, scale=self.default_scale(scale))
        xp = inputs.xp
        center = self.given_center(xp, inputs.q)
        phi = self.map_rows(xp, inputs.q, scale=inputs.scale, center=center)
        grouped = inputs.k.ndim > k.ndim
        held = self._no_keys(xp, inputs.k, inputs.v, inputs.key_mask, center)
        if state is not None:
            check_arrays(q=q, **state)
            held = {name: xp.expand_dims(x, axis=-3) if grouped else x for name, x in state.items()}
        held, out = self._run_causal(xp, phi, held, inputs.q, inputs.k, inputs.v, inputs.key_mask)
        if grouped:
            held = {name: x[..., 0, :, :] for name, x in held.items()}
        return inputs.leave(out), held

    def summarize_keys(self, xp: ModuleType, k: Array, v: Array, *, key_mask: Array | None, scale: float) -> State:
        center = self.given_center(xp, k)
        phi = self.map_rows(xp, k, scale=scale, center=center)
        return self._absorb_all(xp, phi, self._no_keys(xp, k, v, key_mask, center), k, v, key_mask)

    def merge_states(self, xp: ModuleType, left: State, right: State) -> State:
        shift = xp.maximum(left["shift"], right["shift"])
        one, other = _fade(xp, left["shift"], shift), _fade(xp, right["shift"], shift)
        return {"shift": shift} | {name: left[name] * one + right[name] * other for name in ("kv", "k")}

    def read_state(self, xp: ModuleType, q: Array, state: Mapping[str, Any], *, scale: float) -> Array:
        dtype = compute_dtype(xp, q, state["kv"])
        phi = self.map_rows(xp, cast(xp, q, dtype), scale=scale, center=self.given_center(xp, q))
        return self._read_all(xp, phi, q, state)

    def _no_keys(
        self, xp: ModuleType, k: Array, v: Array, key_mask: Array | None, center: tuple[Array, Array] | None
    ) -> State:
        mask_batch = None if key_mask is None else key_mask.shape[:-1]
        means = () if center is None else (x.shape[:-2] for x in center)  # the mean of q weighs the keys
        centers = dict(zip(("q_mean", "k_mean"), means, strict=False))
        batch = broadcast_batch(k=k.shape[:-2], v=v.shape[:-2], key_mask=mask_batch, **centers)
        m, width = self.widths(xp, k)
        where = device(k)
        return {
            "shift": xp.full((*batch, 1, width), -math.inf, dtype=k.dtype, device=where),
            "kv": xp.zeros((*batch, m, v.shape[-1]), dtype=k.dtype, device=where),
            "k": xp.zeros((*batch, m, 1), dtype=k.dtype, device=where),
        }

    def _absorb_all(
        self, xp: ModuleType, phi: FeatureMap, state: State, k: Array, v: Array, key_mask: Array | None
    ) -> State:
        mask = None if key_mask is None else key_mask[..., None]
        size = rows_per_block(math.prod(state["k"].shape[:-1]))

        def absorb(state: State, k: Array, v: Array, mask: Array | None) -> tuple[State, None]:
            value, log = _hide(xp, phi.keys(k), mask)
            if mask is not None:
                v = xp.where(mask, v, 0.0)
            return _add(xp, state, v, value, log), None

        if k.shape[-2] == 0:
            return state
        state, _ = scan_blocks(absorb, state, [k, v, mask], size, xp=xp)
        return state

    def _read_all(self, xp: ModuleType, phi: FeatureMap, q: Array, state: Mapping[str, Any]) -> Array:
        queries = phi.queries(_finite(xp, state["shift"]))
        kv, k_sum = state["kv"], state["k"]

        def read(_: None, q: Array) -> tuple[None, Array]:
            phi_q = _query_features(xp, queries(q))
            return None, _divide(xp, phi_q @ kv, phi_q @ k_sum)

        batch = broadcast_batch(q=q.shape[:-2], state=k_sum.shape[:-2])
        if q.shape[-2] == 0:
            return xp.zeros((*batch, 0, kv.shape[-1]), dtype=q.dtype, device=device(q))
        _, out = scan_blocks(read, None, [q], rows_per_block(math.prod(batch) * k_sum.shape[-2]), xp=xp)
        return out

    def _run_causal(
        self,
        xp: ModuleType,
        phi: FeatureMap,
        state: State,
        q: Array,
        k: Array,
        v: Array,
        key_mask: Array | None,
    ) -> tuple[State, Array]:
        mask = None if key_mask is None else key_mask[..., None]

        def advance(state: State, q: Array, k: Array, v: Array, mask: Array | None) -> tuple[State, Array]:
            return _causal_block(xp, phi, state, q, k, v, mask)

        batch = broadcast_batch(q=q.shape[:-2], state=state["k"].shape[:-2])
        if q.shape[-2] == 0:
            return state, xp.zeros((*batch, 0, v.shape[-1]), dtype=q.dtype, device=device(q))
        size = rows_per_block(math.prod(batch) * state["k"].shape[-2], most=CAUSAL_ROWS)
        return scan_blocks(advance, state, [q, k, v, mask], size, xp=xp)


def _causal_block(
    xp: ModuleType, phi: FeatureMap, state: State, q: Array, k: Array, v: Array, mask: Array | None
) -> tuple[State, Array]:
    """Rows of one block: what the state holds, and the keys of the block up to each row, pair by pair.

    Nothing in row i depends on a later key, not even its rounding: exponents are taken relative to the state's shift ρ
    (in a first block, to its first key), each key is scaled by its own largest feature exp(a[j]), and row i by
    exp(−R[i]), R[i] half the largest a[j] that it sees: half, so that neither the state nor the new keys underflow
    before a[j] passes 160 in float32. (R[i] is `divisor` in the code, exp(−R[i]) `held`.)
    """
    value, log = _hide(xp, phi.keys(k), mask)
    if mask is not None:
        v = xp.where(mask, v, 0.0)
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
        reference = _finite(xp, xp.where(state["shift"] == -math.inf, log[..., :1, :], state["shift"]))
        phi_q = _query_features(xp, phi.queries(reference)(q))
        relative = log - reference
        largest = xp.max(relative, axis=-1, keepdims=True)
        phi_k = xp.exp(relative - _finite(xp, largest))
        phi_k = phi_k if value is None else phi_k * value
        a = xp.matrix_transpose(largest)
        a = xp.where(visible & xp.matrix_transpose(~bad), a, -math.inf)
        most = _finite(xp, xp.max(a, axis=-1, keepdims=True))
        empty = xp.all(state["shift"] == -math.inf, axis=-1, keepdims=True)
        # the state, at exponent 0, is one of the things seen; where it is empty, the keys have the range to themselves
        divisor = xp.where(empty, most, xp.where(most > 0, most / 2, 0.0))
        held = xp.exp(-xp.where(empty, 0.0, divisor))
        weights = (phi_q @ xp.matrix_transpose(phi_k)) * xp.exp(a - divisor)
    weights = xp.where(visible, weights, 0.0)
    weights = xp.where(xp.matrix_transpose(bad), 0.0, weights)
    numerator = weights @ safe_v + held * (phi_q @ state["kv"])
    denominator = xp.sum(weights, axis=-1, keepdims=True) + held * (phi_q @ state["k"])
    out = _divide(xp, numerator, denominator)
    poisoned = xp.any(visible & xp.matrix_transpose(bad), axis=-1, keepdims=True)
    return _add(xp, state, v, value, log), xp.where(poisoned, math.nan, out)


def _add(xp: ModuleType, state: State, v: Array, value: Array | None, log: Array | None) -> State:
    """The state with the keys of a block added; the shift grows to the block's largest exponents."""
    if log is None:
        shift, phi_k, fade = xp.zeros_like(state["shift"]), value, 1.0
    else:
        shift = xp.maximum(state["shift"], xp.max(log, axis=-2, keepdims=True))
        phi_k = xp.exp(log - _finite(xp, shift))
        phi_k = phi_k if value is None else phi_k * value
        fade = _fade(xp, state["shift"], shift)
    return {
        "shift": shift,
        "kv": state["kv"] * fade + xp.matrix_transpose(phi_k) @ v,
        "k": state["k"] * fade + xp.matrix_transpose(xp.sum(phi_k, axis=-2, keepdims=True)),
    }


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
    phi = xp.exp(log - xp.max(log, axis=-1, keepdims=True))
    return phi if value is None else phi * value


def _finite(xp: ModuleType, shift: Array) -> Array:
    """−inf, where there is no key yet, as 0; NaN stays."""
    return xp.where(shift == -math.inf, 0.0, shift)


def _fade(xp: ModuleType, old: Array, new: Array) -> Array:
    """exp(old − new) for every feature, shape (..., m or 1, 1)."""
    return xp.matrix_transpose(xp.exp(old - _finite(xp, new)))


def _divide(xp: ModuleType, numerator: Array, denominator: Array) -> Array:
    """Zero where the denominator is: the row sees nothing."""
    nothing = denominator == 0
    return numerator / xp.where(nothing, xp.ones_like(denominator), denominator)
