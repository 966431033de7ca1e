"""Exact softmax attention in blocks, with an online softmax (Milakov & Gimelshein, 2018; Dao et al., 2022).

    out[i] = Σ_j exp(s q[i]·k[j]) v[j] / Σ_j exp(s q[i]·k[j]),    j over the keys that row i sees

No n × n matrix exists: a block of rows keeps (m, l, acc) = (max, Σ exp(· − m), Σ exp(· − m) v) while the keys pass by.
"""

from __future__ import annotations

import math
from types import ModuleType

from array_api_compat import array_namespace, device

from subquad._arrays import broadcast_batch
from subquad._blocks import rows_per_block, scan_blocks, take_rows
from subquad._dispatch import Array, backend_of, kernel
from subquad.kernels._online import divide, finite

Carry = tuple[Array, Array, Array]

MANY_KEYS = 256  # from here on both axes are blocked
TRACED_BLOCKS = 16  # the causal loop over blocks of rows is unrolled while tracing; no more than this


@kernel
def softmax_attention(
    q: Array, k: Array, v: Array, /, *, scale: float, causal: bool = False, key_mask: Array | None = None
) -> Array:
    """Softmax attention of checked, floating arrays; see the module for the formula.

    Causal: row i sees keys up to i + (n_kv − n). A row that sees no key gives 0.
    """
    xp = array_namespace(q)
    n, n_kv = q.shape[-2], k.shape[-2]
    mask = None if key_mask is None else key_mask[..., None]
    batch = broadcast_batch(
        q=q.shape[:-2], k=k.shape[:-2], v=v.shape[:-2], key_mask=None if mask is None else mask.shape[:-2]
    )
    heads = max(1, math.prod(batch))
    size = rows_per_block(heads * min(max(n_kv, 1), MANY_KEYS))

    def attend(rows: Array, first: int | None) -> Array:
        """Output of a block of rows; `first` is the position of its first row, None where all keys are seen."""
        rows = rows * scale
        count = rows.shape[-2]
        carry = no_keys(xp, rows, (*batch, count), v.shape[-1])
        seen = n_kv if first is None else min(max(first + n_kv - n + 1, 0), n_kv)
        seen_by_some = n_kv if first is None else min(max(first + count + n_kv - n, 0), n_kv)
        size_kv = rows_per_block(heads * max(count, 1))

        def absorb(carry: Carry, *block: Array) -> tuple[Carry, None]:
            return absorb_keys(xp, carry, rows, *block), None

        if seen:
            carry, _ = scan_blocks(absorb, carry, take_rows([k, v, mask], 0, seen), size_kv, xp=xp)
        if seen_by_some > seen:
            some_k, some_v, some_mask = take_rows([k, v, mask], seen, seen_by_some)
            # row r of the block sees key c of `block` where c < (r + first + n_kv − n + 1) − seen
            where = device(rows)
            limit = xp.arange(count, device=where)[:, None] + (first + n_kv - n + 1 - seen)
            visible = xp.arange(seen_by_some - seen, device=where) < limit
            carry = absorb_keys(xp, carry, rows, some_k, some_v, some_mask, visible)
        _, total, acc = carry
        return divide(xp, acc, total)

    if not causal:
        _, out = scan_blocks(lambda _, rows: (None, attend(rows, None)), None, [q], size, xp=xp)
        return out
    if not backend_of(xp).concrete(q):
        size = max(size, -(-n // TRACED_BLOCKS))
    blocks = [attend(q[..., i : min(i + size, n), :], i) for i in range(0, n, size)] or [attend(q, 0)]
    return blocks[0] if len(blocks) == 1 else xp.concat(blocks, axis=-2)


def no_keys(xp: ModuleType, like: Array, shape: tuple[int, ...], d_v: int) -> Carry:
    """(m, l, acc) of rows of shape `shape` before any key."""
    where = device(like)
    return (
        xp.full((*shape, 1), -math.inf, dtype=like.dtype, device=where),
        xp.zeros((*shape, 1), dtype=like.dtype, device=where),
        xp.zeros((*shape, d_v), dtype=like.dtype, device=where),
    )


def absorb_keys(
    xp: ModuleType,
    carry: Carry,
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None,
    visible: Array | None = None,
) -> Carry:
    """(m, l, acc) after the keys k; `mask` (..., n_kv, 1) hides keys, `visible` (n, n_kv) hides them from rows."""
    maximum, total, acc = carry
    poison = None
    if mask is not None:  # 0 · NaN is NaN, in products and in their gradients: a hidden key enters none
        k, v = xp.where(mask, k, 0.0), xp.where(mask, v, 0.0)
    logits = q @ xp.matrix_transpose(k)
    if mask is not None:
        logits = xp.where(xp.matrix_transpose(mask), logits, -math.inf)
    if visible is not None:
        logits = xp.where(visible, logits, -math.inf)
        # 0 · NaN is NaN: a value that is not finite must reach the rows that see it and no others
        bad = ~xp.all(xp.isfinite(v), axis=-1, keepdims=True)
        poison = xp.any(visible & xp.matrix_transpose(bad), axis=-1, keepdims=True)
        v = xp.where(bad, 0.0, v)
    new = xp.maximum(maximum, xp.max(logits, axis=-1, keepdims=True))
    reference = finite(xp, new)
    weights = xp.exp(logits - reference)
    fade = xp.exp(maximum - reference)
    total = total * fade + xp.sum(weights, axis=-1, keepdims=True)
    acc = acc * fade + weights @ v
    if poison is not None:
        acc = xp.where(poison, math.nan, acc)
    return new, total, acc
