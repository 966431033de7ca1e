"""Nyström attention (Xiong et al., "Nyströmformer", 2021).

    softmax(q kᵀ/√d) v  ≈  F A⁺ (B v)
    F = softmax(q k̃ᵀ/√d),    A = softmax(q̃ k̃ᵀ/√d),    B = softmax(q̃ kᵀ/√d)

with landmarks q̃, k̃: m rows each. B v is exact attention at the landmark queries, and F (A⁺ B v) is exact attention to m
landmark keys whose values are A⁺ B v: two calls of one kernel and a small matrix. O(n m (d + d_v)) time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from subquad import _arrays
from subquad._blocks import rows_per_block, scan_blocks
from subquad._dispatch import Array, backend_of
from subquad.attention import _door
from subquad.attention._convolution import add_convolution
from subquad.attention._landmarks import count_visible, segment_means, uniform_rows
from subquad.attention._method import Streaming
from subquad.attention._pinv import PINVS, check_tuning, pinv_times
from subquad.attention._rows import self_attention_mask
from subquad.kernels._online import State, divide, fade
from subquad.kernels.softmax_attention import absorb_keys, no_keys, softmax_attention

LANDMARKS = ("segment-means", "uniform")


@dataclass(frozen=True)
class Nystrom(Streaming):
    """Nyström attention: out = F A⁺ (B v), in O(n m (d + d_v)).

    Parameters
    ----------
    num_landmarks : int, default 64
        m. With n ≤ m or n_kv ≤ m the output is exact attention.
    landmarks : {"segment-means", "uniform"} or (array, array), default "segment-means"
        Means of m segments of the visible rows, of any length; or one random row from each of m strata; or the
        arrays (q̃, k̃) themselves, (..., m, d) each.
    seed : int, default 0
        Seed of the uniform landmarks.
    pinv : {"iterative", "exact", "ridge"}, default "iterative"
        How A⁺ is found: the paper's third-order iteration, started for each matrix on its own; the singular value
        decomposition with a cut-off; or Tikhonov's (AᵀA + λ I)⁻¹ Aᵀ.
    iterations : int, default 6
        Steps of the iteration. It damps small singular values: more steps amplify noise on real attention.
    rcond : float, default 1e-3
        Cut-off of "exact", relative to the largest singular value.
    ridge : float, default 0.01
        λ of "ridge".
    conv_weights : array, shape (..., taps), optional
        Depth-wise convolution of v along the sequence, one odd kernel per head, added to the output. Needs n = n_kv.
    query_mask : array of bool, broadcastable to (..., n), optional
        Queries that enter the landmarks. Default: `key_mask` in self-attention (n = n_kv), otherwise all.

    Notes
    -----
    Not causal: a landmark mixes rows of all positions, so `causal=True` raises. A value of A⁺ that is large makes
    single rows large; the output is not a convex combination of values. Kernels: `softmax_attention`, `iterative_pinv`.

    References
    ----------
    .. [1] Y. Xiong et al., "Nyströmformer", 2021, eqs. (13)–(15), (17) (iteration), section 3.2.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> rng = np.random.default_rng(0)
    >>> q, k, v = rng.standard_normal((3, 100, 8)) / 4
    >>> exact = subquad.attention(q, k, v, "exact")
    >>> bool(np.abs(subquad.attention(q, k, v, "nystrom", num_landmarks=100) - exact).max() < 1e-12)
    True
    >>> error = subquad.attention(q, k, v, "nystrom", num_landmarks=20) - exact
    >>> bool(np.linalg.norm(error) < 0.2 * np.linalg.norm(exact))
    True
    """

    holds = ("max", "sum", "acc")

    num_landmarks: int | None = None
    landmarks: str | tuple[Array, Array] = "segment-means"
    seed: int | None = None
    pinv: str = "iterative"
    iterations: int | None = None
    rcond: float | None = None
    ridge: float | None = None
    conv_weights: Array | None = None
    query_mask: Array | None = None

    def __post_init__(self) -> None:
        _arrays.check_choice("pinv", self.pinv, PINVS)
        if isinstance(self.landmarks, str):
            _arrays.check_choice("landmarks", self.landmarks, LANDMARKS)
        elif not isinstance(self.landmarks, tuple) or len(self.landmarks) != 2:
            msg = (
                f"landmarks must be one of {LANDMARKS} or a pair (q, k) of arrays, got {type(self.landmarks).__name__}"
            )
            raise TypeError(msg)
        if self.num_landmarks is not None:
            _arrays.check_count("num_landmarks", self.num_landmarks)
        if self.seed is not None:
            _arrays.check_seed(self.seed)
            if self.landmarks != "uniform":
                msg = f'seed={self.seed} would have no effect: only landmarks="uniform" are random'
                raise ValueError(msg)
        check_tuning(self.pinv, self._tuning())
        if not isinstance(self.landmarks, str) and self.query_mask is not None:
            msg = "query_mask chooses the rows of landmarks, which are given; leave one out"
            raise ValueError(msg)

    def with_landmarks(self, q: Array, k: Array, /, *, key_mask: Array | None = None) -> Nystrom:
        """This method with the landmarks of these queries and keys, no more than visible rows, as fixed arrays."""
        inputs = _door.enter(q, k, k, causal=False, key_mask=key_mask, scale=None)
        chosen = replace(self, num_landmarks=self._fitting(inputs)) if isinstance(self.landmarks, str) else self
        with backend_of(inputs.xp).full_precision(inputs.q):
            q_land, _, k_land, _ = chosen._landmarks(inputs)
        pair = inputs.heads.unfold(q_land), inputs.heads.unfold(k_land)
        return replace(self, landmarks=pair, num_landmarks=None, seed=None, query_mask=None)

    def evaluate(self, inputs: _door.Inputs) -> Array:
        if inputs.causal:
            msg = (
                "Nyström attention has no causal form: a landmark is made of rows of all positions, so later "
                "tokens would reach earlier rows; use 'favor', 'linear' or 'exact'"
            )
            raise NotImplementedError(msg)
        query_mask = self._query_mask(inputs)
        xp, k, v, key_mask, scale = inputs.xp, inputs.k, inputs.v, inputs.key_mask, inputs.scale
        if isinstance(self.landmarks, str) and min(inputs.q.shape[-2], k.shape[-2]) <= self._m():
            out = softmax_attention(inputs.q, k, v, scale=scale, key_mask=key_mask)
            if query_mask is not None:  # nothing but its shape counts here
                out = xp.broadcast_to(out, (*inputs.batch(query_mask=query_mask.shape[:-1]), *out.shape[-2:]))
            return add_convolution(inputs, out, self.conv_weights)
        q_land, q_valid, k_land, k_valid = self._landmarks(inputs)
        at_landmarks = softmax_attention(q_land, k, v, scale=scale, key_mask=key_mask)
        values = self._landmark_values(xp, q_land, q_valid, k_land, k_valid, at_landmarks, scale)
        if k_valid is not None:  # no more visible keys than landmarks: each is its own landmark, and F v is exact
            few = count_visible(xp, key_mask)[..., None] <= self._m()
            visible, _ = self._choose(xp, v, key_mask)
            values = xp.where(few, visible, values)
        out = softmax_attention(inputs.q, k_land, values, scale=scale, key_mask=k_valid)
        return add_convolution(inputs, out, self.conv_weights)

    def summarize_keys(
        self, xp: ModuleType, k: Array, v: Array, *, key_mask: Array | None, scale: float, pair: Any
    ) -> State:
        q_land = pair[0] * scale
        mask = None if key_mask is None else key_mask[..., None]
        batch = _arrays.broadcast_batch(
            landmarks=q_land.shape[:-2],
            k=k.shape[:-2],
            v=v.shape[:-2],
            key_mask=None if mask is None else mask.shape[:-2],
        )
        carry = no_keys(xp, q_land, (*batch, q_land.shape[-2]), v.shape[-1])

        def absorb(carry: Any, *block: Array) -> tuple[Any, None]:
            return absorb_keys(xp, carry, q_land, *block), None

        if k.shape[-2]:
            size = rows_per_block(math.prod(batch) * q_land.shape[-2])
            carry, _ = scan_blocks(absorb, carry, [k, v, mask], size, xp=xp)
        return dict(zip(self.holds, carry, strict=True))

    def merge_states(self, xp: ModuleType, left: State, right: State) -> State:
        new = xp.maximum(left["max"], right["max"])
        one, other = fade(xp, left["max"], new), fade(xp, right["max"], new)
        return {"max": new} | {name: left[name] * one + right[name] * other for name in ("sum", "acc")}

    def read_state(self, xp: ModuleType, q: Array, state: Mapping[str, Any], *, scale: float, pair: Any) -> Array:
        if self.conv_weights is not None:
            msg = "the convolution of conv_weights reads v, which a state does not hold; add it to the output yourself"
            raise NotImplementedError(msg)
        q_land, k_land = pair
        m = q_land.shape[-2]
        _door.check_tails("state", state, {"max": (m, 1), "sum": (m, 1), "acc": (m, None)})
        batches = {"q": q, "state": state["acc"], "landmarks_q": q_land, "landmarks_k": k_land}
        _arrays.broadcast_batch(**{name: x.shape[:-2] for name, x in batches.items()})
        at_landmarks = divide(xp, state["acc"], state["sum"])
        values = self._landmark_values(xp, q_land, None, k_land, None, at_landmarks, scale)
        return softmax_attention(q, k_land, values, scale=scale)

    def _m(self) -> int:
        return self.num_landmarks or 64

    def _fitting(self, inputs: _door.Inputs) -> int:
        """m, or the number of visible rows where it is smaller: an empty segment has no mean."""
        xp, m = inputs.xp, min(self._m(), inputs.q.shape[-2], inputs.k.shape[-2])
        for name, mask in (("key_mask", inputs.key_mask), ("query_mask", self._query_mask(inputs))):
            if mask is None or 0 in mask.shape or not backend_of(xp).concrete(mask):
                continue
            count = count_visible(xp, mask)
            most = int(xp.max(count))
            if name == "key_mask":  # an item without keys has an output of 0, whatever its landmarks
                most = max(most, 1)
                count = xp.where(count == 0, most, count)
            least = int(xp.min(count))
            if least < min(m, most):
                msg = (
                    f"num_landmarks is {self._m()}, but {name} leaves between {least} and {most} rows to the items "
                    f"of the batch; take num_landmarks={max(least, 1)}, or fix the landmarks of each item on its own"
                )
                raise ValueError(msg)
            m = min(m, least)
        if m == 0:
            msg = "with_landmarks needs at least one visible query and one key, got none"
            raise ValueError(msg)
        return m

    def _tuning(self) -> dict[str, float | None]:
        return {"iterations": self.iterations, "rcond": self.rcond, "ridge": self.ridge}

    def _choose(self, xp: ModuleType, x: Array, mask: Array | None) -> tuple[Array, Array | None]:
        if self.landmarks == "uniform":
            return uniform_rows(xp, x, mask, self._m(), self.seed or 0)
        return segment_means(xp, x, mask, self._m())

    def _landmarks(self, inputs: _door.Inputs) -> tuple[Array, Array | None, Array, Array | None]:
        """q̃ and k̃ with the landmarks that hold a row; None: all do."""
        xp = inputs.xp
        if not isinstance(self.landmarks, str):
            q_land, k_land = map(inputs.heads.fold, self.given_rows(xp, inputs.q))
            inputs.batch(landmarks_q=q_land.shape[:-2], landmarks_k=k_land.shape[:-2])
            return q_land, None, k_land, None
        q_mask = self_attention_mask(inputs) if self.query_mask is None else self._query_mask(inputs)
        q_land, q_valid = self._choose(xp, inputs.q, q_mask)
        k_land, k_valid = self._choose(xp, inputs.k, inputs.key_mask)
        # a query that is not finite spoils its own row of the output, not the landmark that all rows read
        return xp.where(xp.isfinite(q_land), q_land, 0.0), q_valid, k_land, k_valid

    def given_rows(self, xp: ModuleType, like: Array) -> tuple[Array, Array]:
        if isinstance(self.landmarks, str):
            msg = (
                "a state needs landmarks that do not depend on the chunk: use method.with_landmarks(q, k), "
                "or pass landmarks=(q, k) as arrays"
            )
            raise ValueError(msg)
        q_land, k_land = self.landmarks
        _arrays.check_arrays(q=like, landmarks_q=q_land, landmarks_k=k_land)
        _arrays.check_floating(xp, landmarks_q=q_land, landmarks_k=k_land)
        m = self.num_landmarks
        for name, x in (("q", q_land), ("k", k_land)):
            fits = x.ndim >= 2 and x.shape[-1] == like.shape[-1] and x.shape[-2] == q_land.shape[-2]
            if not fits or (m is not None and x.shape[-2] != m):
                expected = f"(..., {m or 'm'}, {like.shape[-1]})"
                msg = f"landmarks for {name} have shape {tuple(x.shape)}, expected {expected}, as many for q as for k"
                raise ValueError(msg)
        return _arrays.cast(xp, q_land, like.dtype), _arrays.cast(xp, k_land, like.dtype)

    def _query_mask(self, inputs: _door.Inputs) -> Array | None:
        if self.query_mask is None:
            return None
        _arrays.check_arrays(q=inputs.q, query_mask=self.query_mask)
        mask = _door.check_mask(inputs.xp, "query_mask", self.query_mask, inputs.q.shape[-2], "queries")
        mask = inputs.heads.fold(mask, tail=1)
        inputs.batch(query_mask=mask.shape[:-1])
        return mask

    def _landmark_values(
        self,
        xp: ModuleType,
        q_land: Array,
        q_valid: Array | None,
        k_land: Array,
        k_valid: Array | None,
        at_landmarks: Array,
        scale: float,
    ) -> Array:
        """A⁺ (B v)."""
        logits = (q_land * scale) @ xp.matrix_transpose(k_land)
        if k_valid is not None:
            logits = xp.where(k_valid[..., None, :], logits, -math.inf)
        weights = fade(xp, logits, xp.max(logits, axis=-1, keepdims=True))
        total = xp.sum(weights, axis=-1, keepdims=True)
        # what is not finite, a whole row, comes back with B v; decompositions would raise or never end
        keep = xp.isfinite(total) if q_valid is None else xp.isfinite(total) & q_valid[..., :, None]
        a = xp.where(keep, divide(xp, weights, total), 0.0)
        return pinv_times(xp, a, at_landmarks, self.pinv, self._tuning())
