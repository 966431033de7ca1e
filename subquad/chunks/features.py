"""Attention through features on chunks: a chunk of keys is summed up once, a chunk of queries reads a state."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from subquad.backend import Array
from subquad.chunks.blocks import Blocks, Pair, Rows, before_each, by_chunk, of_each, whole
from subquad.core.beside import namespace_of
from subquad.core.shapes import broadcast_batch
from subquad.core.states import merge_by_shift
from subquad.kernels import feature_attention as kernels
from subquad.kernels.feature_sums import keys_batch


def feature_summarize(
    blocks: Blocks, k: Array, v: Array, shift: Any, numerator: Any, denominator: Any, /, *weights: Array, phi: Any,
    key_mask: Any = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """The kernel `feature_summarize`: a task for each chunk of keys, and one that merges their states."""
    rows = Rows(blocks, [k, v, key_mask], [-2, -2, -1])
    _, after = _states(blocks, rows.pairs, k, v, (shift, numerator, denominator), weights, phi, key_mask)
    return _unpacked(after, phi.sizes(k.shape[-1], *weights)[1])


def feature_attend(
    blocks: Blocks, q: Array, shift: Array, numerator: Array, denominator: Array, /, *weights: Array, phi: Any
) -> Array:
    """The kernel `feature_attend`: a task for each chunk of queries."""
    batch = broadcast_batch(q=q.shape[:-2], state=denominator.shape[:-2], center=phi.batch(*weights))
    (pair,) = Rows(blocks, [q], [-2]).pairs
    given = [pair, *_whole(blocks, (shift, numerator, denominator, *weights))]
    return by_chunk(blocks, partial(_attend, phi=phi), given, len(batch), numerator.shape[-1], q.dtype)


def feature_step(
    blocks: Blocks, q: Array, k: Array, v: Array, shift: Any, numerator: Any, denominator: Any, /, *weights: Array,
    phi: Any, key_mask: Any = None,
) -> tuple[Array, ...]:  # fmt: skip
    """The kernel `feature_step`: a task sums up each chunk, one more finds its output after the state before it."""
    rows = Rows(blocks, [q, k, v, key_mask], [-2, -2, -2, -1])
    state = shift, numerator, denominator
    before, after = _states(blocks, rows.pairs[1:], k, v, state, weights, phi, key_mask)
    width = phi.sizes(k.shape[-1], *weights)[1]
    batch = broadcast_batch(q=q.shape[:-2], state=before.shape[:-2])
    pairs = [*rows.pairs, of_each(before), *_whole(blocks, weights)]
    out = by_chunk(blocks, partial(_step, phi=phi, width=width), pairs, len(batch), v.shape[-1], q.dtype)
    return out, *_unpacked(after, width)


def _states(
    blocks: Blocks, pairs: Any, k: Array, v: Array, state: tuple[Any, ...], weights: tuple[Any, ...], phi: Any,
    key_mask: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """(the states before each chunk, the state after the last), packed as (..., m, shift + numerator + denominator)."""
    m, _ = phi.sizes(k.shape[-1], *weights)
    batch = len(keys_batch(phi, weights, k, v, key_mask, state[2]))
    summaries = by_chunk(
        blocks,
        partial(_summarize, phi=phi),
        [*pairs, *_whole(blocks, weights)],
        batch,
        v.shape[-1] + 2,
        k.dtype,
        rows=m,
    )
    starts = _whole(blocks, state)
    return before_each(blocks, _merged, _first, summaries, starts, rows=m, batch=batch, reverse=False)


def _whole(blocks: Blocks, arrays: tuple[Any, ...]) -> list[Pair]:
    return [whole(blocks, x, 2) for x in arrays]


def _first(summary: Any, shift: Any, numerator: Any, denominator: Any) -> Any:
    """The state before the first chunk, packed; without one, that of no keys."""
    xp = namespace_of(summary)
    if denominator is None:
        sums = xp.zeros_like(summary[..., 1:])
        return xp.concat([xp.full_like(summary[..., :1], -math.inf), sums], axis=-1)
    return xp.concat([xp.broadcast_to(x, (*summary.shape[:-1], x.shape[-1])) for x in (shift, numerator, denominator)],
                     axis=-1)  # fmt: skip


def _summarize(k: Any, v: Any, mask: Any, *weights: Any, phi: Any) -> Any:
    state = kernels.feature_summarize(k, v, None, None, None, *weights, phi=phi, key_mask=mask)
    xp, (*batch, m, _) = namespace_of(k), state[1].shape
    return xp.concat([xp.broadcast_to(state[0], (*batch, m, 1)), *state[1:]], axis=-1)


def _attend(q: Any, shift: Any, numerator: Any, denominator: Any, *weights: Any, phi: Any) -> Any:
    return kernels.feature_attend(q, shift, numerator, denominator, *weights, phi=phi)


def _step(q: Any, k: Any, v: Any, mask: Any, before: Any, *weights: Any, phi: Any, width: int) -> Any:
    return kernels.feature_step(q, k, v, *_unpacked(before, width), *weights, phi=phi, key_mask=mask)[0]


def _unpacked(state: Any, width: int) -> tuple[Any, Any, Any]:
    return state[..., :width, :1], state[..., 1:-1], state[..., -1:]


def _merged(parts: list[Any]) -> list[Any]:
    """The states after each of the parts."""
    xp, found = namespace_of(parts[0]), [parts[0]]
    for part in parts[1:]:
        left, right = ({"shift": x[..., :1], "sums": x[..., 1:]} for x in (found[-1], part))
        merged = merge_by_shift(xp, left, right)
        found.append(xp.concat([merged["shift"], merged["sums"]], axis=-1))
    return found
