"""Recurrences on chunks: each chunk says what it does to the state before it, then runs from the state it finds.

The summary of a chunk is (state from 0, decay, whether a reset cuts off what was before), side by side.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from subquad.backend import Array
from subquad.chunks.blocks import Blocks, Rows, before_each, by_chunk, of_each, whole
from subquad.core.beside import namespace_of
from subquad.kernels.linear_scan import linear_scan as linear_kernel
from subquad.kernels.selective_scan import selective_scan as selective_kernel
from subquad.kernels.selective_scan import step_sizes


def selective_scan(
    blocks: Blocks, u: Array, delta: Array, A: Array, B: Array, C: Array, D: Any, z: Any, delta_bias: Any,
    initial_state: Any, resets: Any, /, *, delta_softplus: bool, reverse: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """The kernel `selective_scan`: two tasks for each chunk, and one that finds the states between them."""
    # a map (batch, n, d_state) has got an axis of groups, which its blocks can get as well
    maps = [None if x.ndim == 2 else getattr(x, "before_new_axes", x) for x in (B, C)]
    axes = [-2 if x is None or x.ndim == 3 else -3 for x in maps]
    rows = Rows(blocks, [u, delta, *maps, z, resets], [-2, -2, *axes, -2, -1])
    at_u, at_delta, at_B, at_C, at_z, at_resets = rows.pairs
    at_B, at_C = (whole(blocks, x, 2) if x.ndim == 2 else at for at, x in ((at_B, B), (at_C, C)))
    at_A, at_D, at_bias = whole(blocks, A, 2), whole(blocks, D, 1), whole(blocks, delta_bias, 1)
    static = {"delta_softplus": delta_softplus, "reverse": reverse}
    d, d_state = A.shape
    pairs = [at_u, at_delta, at_A, at_B, at_C, at_bias, at_resets]
    summaries = by_chunk(blocks, partial(_effect, **static), pairs, 1, 3 * d_state, A.dtype, rows=d)
    starts = [whole(blocks, initial_state, 2)]
    before, after = before_each(blocks, _states, _first, summaries, starts, rows=d, batch=1, reverse=reverse)
    pairs = [at_u, at_delta, at_A, at_B, at_C, at_D, at_z, at_bias, of_each(before), at_resets]
    return by_chunk(blocks, partial(_emit, **static), pairs, 1, d, u.dtype), after[..., :d_state]


def linear_scan(blocks: Blocks, a: Array, b: Array, initial_state: Any, resets: Any, /, *, reverse: bool) -> Array:
    """The kernel `linear_scan`: two tasks for each chunk, and one that finds the states between them."""
    at_a, at_b, at_resets = Rows(blocks, [a, b, resets], [-2, -2, -1]).pairs
    d = a.shape[-1]
    effect, emit = (partial(function, reverse=reverse) for function in (_linear_effect, _linear_emit))
    summaries = by_chunk(blocks, effect, [at_a, at_b, at_resets], 1, 3 * d, a.dtype, rows=1)
    starts = [whole(blocks, initial_state, 1)]
    before, _ = before_each(blocks, _states, _first, summaries, starts, rows=1, batch=1, reverse=reverse)
    return by_chunk(blocks, emit, [at_a, at_b, of_each(before), at_resets], 1, d, a.dtype)


def _first(summary: Any, state: Any) -> Any:
    """The first state as a summary: that of a linear scan has no axis of rows."""
    xp = namespace_of(summary)
    if state is None:
        return xp.zeros_like(summary)
    state = state[:, None, :] if state.ndim < summary.ndim else state
    return xp.concat([state, xp.zeros_like(summary[..., state.shape[-1] :])], axis=-1)


def _states(parts: list[Any]) -> list[Any]:
    """The state after each of the parts, as summaries that only have a state."""
    xp, (h, *others) = namespace_of(parts[0]), parts
    width = h.shape[-1] // 3
    found = [h]
    for part in others:
        left, decay, cut = (part[..., i * width : (i + 1) * width] for i in range(3))
        h = xp.where(cut != 0, left, decay * found[-1][..., :width] + left)
        found.append(xp.concat([h, xp.zeros_like(part[..., width:])], axis=-1))
    return found


def _summary(left: Any, decay: Any, resets: Any) -> Any:
    xp = namespace_of(left)
    cut = xp.zeros_like(left)
    if resets is not None:
        cut = cut + xp.astype(xp.any(resets, axis=-1), left.dtype)[:, None, None]
    return xp.concat([left, decay, cut], axis=-1)


def _effect(u: Any, delta: Any, A: Any, B: Any, C: Any, bias: Any, resets: Any, **static: Any) -> Any:
    xp, B, C = namespace_of(u), _with_groups(B), _with_groups(C)
    _, left = selective_kernel(u, delta, A, B, C, None, None, bias, None, resets, **static)
    total = xp.sum(step_sizes(xp, delta, bias, static["delta_softplus"]), axis=-2)[..., None]
    return _summary(left, xp.exp(total * A), resets)


def _emit(
    u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any, before: Any, resets: Any, **static: Any
) -> Any:
    B, C, state = _with_groups(B), _with_groups(C), before[..., : A.shape[-1]]
    y, _ = selective_kernel(u, delta, A, B, C, D, z, bias, state, resets, **static)
    return namespace_of(u).astype(y, u.dtype)


def _with_groups(maps: Any) -> Any:
    return maps[:, :, None, :] if maps.ndim == 3 else maps


def _linear_effect(a: Any, b: Any, resets: Any, *, reverse: bool) -> Any:
    h = linear_kernel(a, b, None, resets, reverse=reverse)
    last = slice(0, 1) if reverse else slice(-1, None)
    return _summary(h[:, last, :], namespace_of(a).prod(a, axis=1, keepdims=True), resets)


def _linear_emit(a: Any, b: Any, before: Any, resets: Any, *, reverse: bool) -> Any:
    return linear_kernel(a, b, before[:, 0, : a.shape[-1]], resets, reverse=reverse)
