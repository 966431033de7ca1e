"""Exact softmax attention in blocks, with an online softmax (Milakov & Gimelshein, 2018; Dao et al., 2022).

    out[i] = Σ_j exp(s q[i]·k[j]) v[j] / Σ_j exp(s q[i]·k[j]),    j over the keys that row i sees

No n × n matrix exists. The keys pass a block of rows in blocks too; between them, the rows keep, of their logits x,

    shift = max x,    denominator = Σ exp(x − shift),    numerator = Σ exp(x − shift) v
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import fold_blocks, rows_per_block, take_rows
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.core.shapes import broadcast_batch
from subquad.kernels.max_shift import divide_or_zero, finite_shift
from subquad.kernels.visibility import Visibility

Carry = tuple[Array, Array, Array]

MANY_KEYS = 256  # keys that a block of rows is sized for: with more keys, the keys are cut into blocks too
TRACED_BLOCKS = 16  # max blocks of rows while tracing, where the Python loop over them is unrolled into the program


def batch_shape(q: Array, k: Array, v: Array, key_mask: Array | None) -> tuple[int, ...]:
    """The common batch shape of q, k, v and the mask."""
    mask = None if key_mask is None else key_mask.shape[:-1]
    return broadcast_batch(q=q.shape[:-2], k=k.shape[:-2], v=v.shape[:-2], key_mask=mask)


def outputs(
    q: Array, k: Array, v: Array, /, *, scale: float, visible: Visibility | None = None, key_mask: Array | None = None
) -> tuple[Like, ...]:
    """Shape and dtype of the output of `softmax_attention`."""
    return (Like((*batch_shape(q, k, v, key_mask), q.shape[-2], v.shape[-1]), q.dtype),)


@kernel(outputs=outputs, options={"visible": None, "key_mask": None}, reads_half=True)
def softmax_attention(
    q: Array, k: Array, v: Array, /, *, scale: float, visible: Visibility | None = None, key_mask: Array | None = None
) -> Array:
    """Softmax attention (..., n, d_v) of checked arrays of one floating dtype, Σ_j exp(s q·k) v / Σ_j exp(s q·k).

    `visible` says which keys each row sees; None means all keys. `key_mask` (..., n_kv), True = keep, hides keys from
    all rows. A row that sees no key gives 0. Each array may have half precision in place of float32; the output has it
    if q has it.
    """
    xp = namespace_of(q)
    n, n_kv = q.shape[-2], k.shape[-2]
    mask = None if key_mask is None else key_mask[..., None]
    batch = batch_shape(q, k, v, key_mask)
    backend = backend_of(xp)
    heads = max(1, math.prod(batch)) * backend.items_behind(q, k, v)
    size = rows_per_block(heads * (max(n_kv, 1) if backend.holds(n_kv <= MANY_KEYS) else MANY_KEYS))

    def attend(rows: Array, first: int) -> Array:
        """The output of a block of rows whose first row is number `first` of q."""
        rows = rows * scale
        count = rows.shape[-2]
        carry = no_keys(xp, rows, (*batch, count), v.shape[-1])
        whole, parts = ((0, n_kv), ()) if visible is None else visible.spans(first, count, n, n_kv)
        size_kv = rows_per_block(heads * (max(count, 1) if backend.holds(count <= size) else size))

        def absorb(carry: Carry, *block: Array) -> tuple[Carry, None]:
            return absorb_keys(xp, carry, rows, *block), None

        if whole[1] > whole[0]:
            carry, _ = fold_blocks(absorb, carry, take_rows([k, v, mask], *whole), size_kv, xp=xp)
        for part in parts:
            assert visible is not None
            some_k, some_v, some_mask = take_rows([k, v, mask], *part)
            pairs = visible.pairs(xp, (first, first + count), part, n_kv - n, place_of(rows))
            carry = absorb_keys(xp, carry, rows, some_k, some_v, some_mask, pairs)
        _, denominator, numerator = carry
        return divide_or_zero(xp, numerator, denominator)

    if visible is None:
        _, out = fold_blocks(lambda _, rows: (None, attend(rows, 0)), None, [q], size, xp=xp)
        return out
    if not backend.holds(n > size):
        return attend(q, 0)
    if n > size * TRACED_BLOCKS and not backend.is_concrete(q):
        size = -(-n // TRACED_BLOCKS)
    return xp.concat([attend(q[..., i : min(i + size, n), :], i) for i in range(0, n, size)], axis=-2)


def no_keys(xp: ModuleType, like: Array, shape: tuple[int, ...], d_v: int) -> Carry:
    """The carry (shift, denominator, numerator) = (−∞, 0, 0) of rows (batch and row axes: `shape`) before any key."""
    where = place_of(like)
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
    change: Callable[[Array], Array] | None = None,
) -> Carry:
    """The carry after adding keys k and values v for scaled queries q.

    `mask` (..., n_kv, 1) hides keys from all rows, `visible` (..., n, n_kv) hides keys row by row. `change` is applied
    to the logits of all pairs first.
    """
    shift, denominator, numerator = carry
    poison = None
    if mask is not None:  # 0 · NaN is NaN: a hidden NaN would reach products and their gradients
        k, v = xp.where(mask, k, 0.0), xp.where(mask, v, 0.0)
    logits = q @ xp.matrix_transpose(k)
    if change is not None:
        logits = change(logits)
    if mask is not None:
        logits = xp.where(xp.matrix_transpose(mask), logits, -math.inf)
    if visible is not None:
        logits = xp.where(visible, logits, -math.inf)
        # 0 · NaN is NaN: a value that is not finite must reach the rows that see it and no others
        bad = ~xp.all(xp.isfinite(v), axis=-1, keepdims=True)
        poison = xp.any(visible & xp.matrix_transpose(bad), axis=-1, keepdims=True)
        v = xp.where(bad, 0.0, v)
    new = xp.maximum(shift, xp.max(logits, axis=-1, keepdims=True))
    reference = finite_shift(xp, new)
    weights = xp.exp(logits - reference)
    faded = xp.exp(shift - reference)
    denominator = denominator * faded + xp.sum(weights, axis=-1, keepdims=True)
    numerator = numerator * faded + weights @ v
    if poison is not None:
        numerator = xp.where(poison, math.nan, numerator)
    return new, denominator, numerator
