"""Gradients of attention through features, and of softmax attention, put together from runs of compiled kernels.

Each function is the backward pass of the forward pass in `calls` that has its name. What is between the runs is plain
Array API, and a `Passes` runs the kernels: NumPy's is in `gradient_runs`, that of other programs in
`gradient_launches`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

from subquad.backend import Array
from subquad.kernels.max_shift import finite_shift
from subquad_numpy.features.operand import hide
from subquad_numpy.runtime.launch import to_shape

Arrays = Sequence[Any]  # arrays, or None where there is none
Gradients = tuple[Array | None, ...]


class ByQueries(NamedTuple):
    """Gradients by the queries, the numerator and the denominator, and by the directions, (m, d), if asked for."""

    q: Array
    kv: Array
    k_sum: Array
    W: Array | None


class ByKeys(NamedTuple):
    """Gradients by the keys and the values, and by the directions, (m, d), if asked for."""

    k: Array
    v: Array
    W: Array | None


class ByStep(NamedTuple):
    """Gradients of a step by queries, keys and values, and by the numerator and denominator of the state before."""

    q: Array
    k: Array
    v: Array
    kv: Array
    k_sum: Array


class Passes(Protocol):
    """How a library runs the kernels. An operand is what one side, queries or keys, is multiplied by."""

    xp: ModuleType

    def keys(self, phi: Any, weights: Arrays) -> Any:
        """The operand of the keys of a feature map."""
        ...

    def queries(self, phi: Any, weights: Arrays) -> Any:
        """The operand of the queries of a feature map."""
        ...

    def directions(self, rows: Array, scale: float) -> Any:
        """The operand whose directions are scale · rows, (m, d)."""
        ...

    def by_queries(
        self, q: Array, side: Any, start: Array | None, kv: Array, k_sum: Array | None, out: Array, grad: Array, *,
        by_W: bool,
    ) -> ByQueries:  # fmt: skip
        """The gradients of queries that read sums; `start` is added to the exponents, and a k_sum of None is 1."""
        ...

    def by_keys(
        self, k: Array, v: Array, side: Any, mask: Array | None, shift: Array, grad_kv: Array, grad_sum: Array, *,
        by_W: bool,
    ) -> ByKeys:  # fmt: skip
        """The gradients of sums over keys; the shift must be finite, and have the batch shape of the call."""
        ...

    def by_step(self, arrays: Arrays, phi: Any, outputs: Arrays, grads: Arrays, saved: Arrays) -> ByStep:
        """The gradients of a causal step; `saved` is (level, shifts), and `grads` those by all its outputs."""
        ...


def by_summarize(
    passes: Passes, arrays: Arrays, static: Mapping[str, Any], outputs: Arrays, grads: Arrays, need: Sequence[bool]
) -> Gradients:
    """The gradients of `summarize`; the new shift counts as a constant."""
    k, v, shift, numerator, denominator, *weights, key_mask = arrays
    xp, keys = passes.xp, passes.keys(static["phi"], weights)
    finite = finite_shift(xp, outputs[0])
    by_numerator, by_denominator = (
        xp.zeros_like(x) if by is None else by for by, x in zip(grads[1:], outputs[1:], strict=True)
    )
    by_W = need[5] or len(weights) > 2
    found = passes.by_keys(k, v, keys, key_mask, finite, by_numerator, by_denominator, by_W=by_W)
    by: list[Array | None] = [found.k, found.v, None, None, None]
    if shift is not None:
        fade = xp.exp(shift - finite)
        by[3] = to_shape(xp, by_numerator * fade, numerator.shape)
        by[4] = to_shape(xp, by_denominator * fade, denominator.shape)
        by[2] = _by_shift(xp, numerator, denominator, by[3], by[4]) if need[2] else None
    by += [None] * len(weights)
    if weights and found.W is not None and need[5]:
        by[5] = _by_directions(xp, found.W, weights[0])
    if len(weights) > 2 and found.W is not None:
        q_mean, k_mean = weights[2:]
        by[7] = to_shape(xp, xp.sum(found.W, axis=-2, keepdims=True) * static["phi"].scale, q_mean.shape)
        by[8] = -to_shape(xp, xp.sum(found.k, axis=-2, keepdims=True), k_mean.shape)
    return (*by, None)


def by_attend(
    passes: Passes, arrays: Arrays, static: Mapping[str, Any], outputs: Arrays, grads: Arrays, need: Sequence[bool]
) -> Gradients:
    """The gradients of `attend`."""
    q, shift, numerator, denominator, *weights = arrays
    xp, queries = passes.xp, passes.queries(static["phi"], weights)
    found = passes.by_queries(
        q, queries, finite_shift(xp, shift), numerator, denominator, outputs[0], grads[0],
        by_W=len(weights) > 1 and need[5],
    )  # fmt: skip
    by_numerator = to_shape(xp, found.kv, numerator.shape)
    by_denominator = to_shape(xp, found.k_sum, denominator.shape)
    by: list[Array | None] = [found.q, None, by_numerator, by_denominator, *[None] * len(weights)]
    if need[1]:
        by[1] = _by_shift(xp, numerator, denominator, by_numerator, by_denominator)
    if found.W is not None:
        by[5] = _by_directions(xp, found.W, weights[1])
    if len(weights) > 2:
        by[6] = -to_shape(xp, xp.sum(found.q, axis=-2, keepdims=True), weights[2].shape)
    return tuple(by)


def by_step(
    passes: Passes, arrays: Arrays, static: Mapping[str, Any], outputs: Arrays, grads: Arrays, need: Sequence[bool],
    saved: Arrays,
) -> Gradients | None:  # fmt: skip
    """The gradients of `step`, the shift of the state after counting as a constant.

    None where weights need a gradient, or there are centers; or where the state after has a gradient, and heads of
    queries share it.
    """
    _, _, _, shift, numerator, denominator, *weights, _ = arrays
    xp, (out, _, *after), (grad, _, *by_after) = passes.xp, outputs, grads
    if len(weights) > 2 or any(need[6 : 6 + len(weights)]):
        return None
    if any(by is not None for by in by_after):
        if after[0].shape[:-2] != out.shape[:-2]:
            return None
        by_after = [xp.zeros_like(x) if by is None else by for x, by in zip(after, by_after, strict=True)]
    grad = xp.zeros_like(out) if grad is None else grad
    found = passes.by_step(arrays, static["phi"], outputs, (grad, None, *by_after), saved)
    by: list[Array | None] = [found.q, found.k, found.v, None, None, None]
    if shift is not None:
        by[4] = to_shape(xp, found.kv, numerator.shape)
        by[5] = to_shape(xp, found.k_sum, denominator.shape)
        by[3] = _by_shift(xp, numerator, denominator, by[4], by[5]) if need[3] else None
    return (*by, *[None] * len(weights), None)


def by_softmax(
    passes: Passes, arrays: Arrays, static: Mapping[str, Any], outputs: Arrays, grads: Arrays, saved: Arrays
) -> Gradients:
    """The gradients of `softmax`; `saved` is (shift, total) of each query, or () for a small number of keys."""
    q, k, v, key_mask = arrays
    (out,), (grad,), scale, xp = outputs, grads, static["scale"], passes.xp
    if not saved:  # the keys are the directions of the queries
        keys, values, start = hide(xp, k, v, key_mask)
        queries = passes.by_queries(q, passes.directions(keys, scale), start, values, None, out, grad, by_W=True)
        by_q, by_k, by_v = queries.q, scale * queries.W, queries.kv
        if key_mask is not None:
            by_q = xp.where(xp.any(key_mask, axis=-1)[..., None, None], by_q, 0.0)
            keep = key_mask[..., None]  # 0 · NaN is NaN: a query that is NaN must not reach a hidden key
            by_k, by_v = xp.where(keep, by_k, 0.0), xp.where(keep, by_v, 0.0)
    else:
        shift, total = saved
        by_kv = grad / total
        by_sum = -xp.sum(by_kv * out, axis=-1, keepdims=True)
        of_keys = passes.by_keys(k, v, passes.directions(q, scale), key_mask, shift, by_kv, by_sum, by_W=True)
        by_q, by_k, by_v = scale * of_keys.W, of_keys.k, of_keys.v
    return by_q, by_k, by_v, None


def _by_directions(xp: ModuleType, by_W: Array, weights: Array) -> Array:
    """The gradient by weights (…, d, m), from one by the directions, (…, m, d)."""
    return xp.matrix_transpose(to_shape(xp, by_W, (*weights.shape[:-2], *by_W.shape[-2:])))


def _by_shift(xp: ModuleType, numerator: Array, denominator: Array, by_numerator: Any, by_denominator: Any) -> Array:
    """The gradient by the shift of a state that is read: its sums are over exp(shift)."""
    return xp.sum(numerator * by_numerator, axis=-1, keepdims=True) + denominator * by_denominator
