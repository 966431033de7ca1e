"""Attention through features, and softmax attention, on NumPy arrays by compiled kernels.

`summarize`, `attend`, `step` and `softmax` are each a forward pass, with a backward pass of its name, as described by
`subquad_numpy.compiled.Compiled`. A state consists of these arrays, each after the batch axes:

    shift (m, 1)    numerator (m, d_v)    denominator (m, 1)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np

from subquad.kernels.feature_attention import feature_step
from subquad.kernels.max_shift import finite_shift
from subquad_numpy.block_attention import whole
from subquad_numpy.features.operand import Operand, Rows, hide, keys_of, operand_from, queries_of
from subquad_numpy.plain import attention
from subquad_numpy.runtime.arguments import (
    Forms,
    Run,
    fix_items,
    fix_rows,
    fixed,
    row_step,
    straight,
)
from subquad_numpy.runtime.stored import common, computed, rounded, stored_word, widened, widest

Array = np.ndarray[Any, Any]
Arrays = Sequence[Any]  # arrays, or None where there is none
New = Callable[[tuple[int, ...], Any], Array]
Planned = Callable[[Arrays, New, Any], tuple[tuple[Array, ...], Any] | None]  # see `runtime.arguments.Forms`

SUMMARY_CHUNK, MAX_CHUNKS = 4096, 16  # minimum keys of a task of `summarize`; maximum chunks, whose sums take memory
READING_CHUNK = 512  # queries of a task of `attend`
TILE = 8  # queries that fill a tile
SMALL_KEYS, QUERIES = 512, 256  # maximum keys whose values stay in cache; maximum features of a task of `summarize`


class Trace(NamedTuple):
    """What the gradient of `step` reads of the forward pass, beside inputs and outputs."""

    level: Array  # (..., n), log Σ_j w[i, j], ∞ where the row sees no key
    shifts: Array  # (..., blocks, m), the shift before each block


class RowSums(NamedTuple):
    """Sums of softmax attention for each query: its largest logit, and the sum of its weights over exp(that logit)."""

    shift: Array  # (..., n, 1), finite
    total: Array  # (..., n, 1), positive


# Forward passes ---------------------------------------------------------------------------------------------------


def _plan_summarize(arrays: Arrays, static: Mapping[str, Any], save: bool) -> Planned:
    """`feature_summarize`: the state with the keys k added."""
    k, v, old_shift, _, _, *weights, key_mask = arrays
    keys = keys_of(static["phi"], weights)
    operand = operand_from(keys_of, static["phi"], weights)
    batch = np.broadcast_shapes(k.shape[:-2], v.shape[:-2], _mask_batch(key_mask), keys.batch)
    sums = _Sums(batch, k, v, keys, key_mask)

    if old_shift is None and not weights and sums.is_straight:
        return straight(partial(sums.of_rows))

    def summarize(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array, ...], None]:
        k, v, _, _, _, *weights, key_mask = arrays
        return sums(k, v, key_mask, *operand(weights), new, threads), None

    if old_shift is None:
        return straight(summarize) if sums.is_straight and len(weights) <= 2 else summarize
    whole = np.broadcast_shapes(batch, old_shift.shape[:-2])
    column, matrix, dtype = (*whole, *sums.column[-2:]), (*whole, *sums.matrix[-2:]), sums.dtype

    def merge(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array, ...], None]:
        shift, numerator, denominator = arrays[2:5]
        (more_shift, more_numerator, more_denominator), _ = summarize(arrays, np.empty, threads)
        outputs = new(column, dtype), new(matrix, dtype), new(column, dtype)
        finite = finite_shift(np, np.maximum(shift, more_shift, out=outputs[0]))
        fade, fade_more = np.exp(shift - finite), np.exp(more_shift - finite)
        for old, more, out in ((numerator, more_numerator, outputs[1]), (denominator, more_denominator, outputs[2])):
            np.multiply(old, fade, out=out)
            out += more * fade_more
        return outputs, None

    return merge


def _plan_attend(arrays: Arrays, static: Mapping[str, Any], save: bool) -> Planned:
    """`feature_attend`: the output of queries that all read the whole state."""
    q, shift, numerator, denominator, *weights = arrays
    operand = operand_from(queries_of, static["phi"], weights)
    queries = queries_of(static["phi"], weights)
    batch = np.broadcast_shapes(q.shape[:-2], queries.batch, _center_batch(weights), numerator.shape[:-2])
    shape, dtype = (*batch, q.shape[-2], numerator.shape[-1]), q.dtype
    read = _Reading(batch, q, queries, shift, numerator, denominator, is_shift=True)

    def attend_by_rows(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], None]:
        out = new(shape, dtype)
        run((*arrays, out), threads)
        return (out,), None

    if not weights and read.is_straight:
        run = read.run_of(("x", "start", "kv", "k_sum", "out"))
        return straight(attend_by_rows, short=run.small)

    def attend(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], None]:
        q, shift, numerator, denominator, *weights = arrays
        out = new(shape, dtype)
        read(q, *operand(weights), shift, numerator, denominator, out, threads)
        return (out,), None

    return straight(attend) if read.is_straight and len(weights) <= 2 else attend


def _plan_step(arrays: Arrays, static: Mapping[str, Any], save: bool) -> Planned:
    """`feature_step`: the causal output of rows after a state, and the state after the rows.

    The generic form computes what exceeds the range of the compiled kernel: rows that the kernel leaves undone, and the
    state of an item with a key or value that is not finite. A call with such an item saves nothing.
    """
    from subquad_numpy.features.step import STEP_RECORD, block_rows, step_kernel

    q, k, v, *state, key_mask = arrays
    state, weights, phi = state[:3], state[3:], static["phi"]
    keys, queries = keys_of(phi, weights), queries_of(phi, weights)
    of_keys, of_queries = operand_from(keys_of, phi, weights), operand_from(queries_of, phi, weights)
    (n, d), d_v, dtype, out_dtype = q.shape[-2:], v.shape[-1], widest(q, k, v), common(q, k, v)
    m = keys.width(d)
    state_batch = () if state[0] is None else state[0].shape[:-2]
    kept = np.broadcast_shapes(
        k.shape[:-2], v.shape[:-2], _mask_batch(key_mask), state_batch, keys.batch, _center_batch(weights)
    )
    batch = np.broadcast_shapes(q.shape[:-2], queries.batch, kept)
    # where heads of queries share their keys, the first head writes the state
    own = (1,) * (len(batch) - len(kept)) + kept
    first = tuple(slice(0, 1) if size == 1 else slice(None) for size in own)
    writes = np.zeros(batch, np.int64)
    writes[first] = 1
    no_queries = 0 in batch  # which leave the state to nobody
    rows_k, rows_q = Rows(k, keys), Rows(q, queries)
    fix_v, fix_mask = fix_rows(v), None if key_mask is None else fix_items(key_mask, 1)
    fix_state = [None if x is None else fix_items(x, 2) for x in state]
    must_fix = any(fix is not None for fix in fix_state)
    shape, column, matrix, blocks = (*batch, n, d_v), (*kept, m, 1), (*kept, m, d_v), -(-n // block_rows(dtype))
    like_v, like_state = fixed(fix_v, v), [fixed(fix, x) for fix, x in zip(fix_state, state, strict=True)]
    likes = {"out": np.empty(shape, out_dtype), "undone": np.empty(batch, np.int64)}
    likes |= {"new_shift": np.empty(column, dtype), "new_kv": np.empty(matrix, dtype)}
    likes |= {"new_k_sum": likes["new_shift"]}
    if save:
        likes |= {"level": np.empty((*batch, n), dtype), "shifts": np.empty((*batch, blocks, m), dtype)}
    if n == 1 and not save:
        from subquad_numpy.features.token import token_kernel as step_kernel
    advance_of = partial(
        Run, step_kernel(dtype, keys.phi), STEP_RECORD, batch, 1, 4 * n * d * m,
        {
            **rows_k.fields(k, keys), **rows_q.fields(q, queries, "q_"), **likes,
            "v": like_v, "v_row": row_step(like_v),
            "mask": None if key_mask is None else fixed(fix_mask, key_mask),
            **dict(zip(("shift", "kv", "k_sum"), like_state, strict=True)),
            "n": n, "d": d, "m": m, "d_v": d_v, "chunks": 1, "chunk": n, "keeps": writes.reshape(-1),
            "stored": stored_word((k, v, q, likes["out"])),
        },
    )  # fmt: skip
    all_done = np.full(batch, n, np.int64).tobytes()

    def token(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array, ...], None] | None:
        outputs = new(shape, out_dtype), new(column, dtype), new(matrix, dtype), new(column, dtype)
        undone = np.empty(batch, np.int64)
        advance((*arrays, undone, *outputs), threads)
        return (outputs, None) if undone.tobytes() == all_done else completed(arrays, outputs, undone)

    def completed(arrays: Arrays, outputs: tuple[Array, ...], undone: Array) -> tuple[tuple[Array, ...], None] | None:
        out, *after = outputs
        if not isinstance(out, np.ndarray):
            return None
        with np.errstate(all="ignore"):  # numbers that are not finite come through compiled code in silence too
            wide = [None if x is None else widened(x) for x in arrays[:-1]]
            whole, *state = feature_step.generic(*wide, phi=phi, key_mask=arrays[-1])
        mine = np.arange(n)[:, None] < undone[..., None, None]
        out[...] = np.where(mine, out, rounded(whole, out_dtype))
        is_right = False if no_queries else (undone[first].reshape(kept) == n)[..., None, None]
        for x, other in zip(after, state, strict=True):
            x[...] = np.where(is_right, x, other)
        return outputs, None

    def step(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array, ...], Trace | None] | None:
        q, k, v, shift, numerator, denominator, *weights, key_mask = arrays
        if fix_v is not None:
            v = fix_v(v)
        if fix_mask is not None:
            key_mask = fix_mask(key_mask)
        if must_fix:
            shift, numerator, denominator = map(fixed, fix_state, (shift, numerator, denominator))
        outputs = out, *after = new(shape, out_dtype), new(column, dtype), new(matrix, dtype), new(column, dtype)
        undone = np.empty(batch, np.int64)
        level = shifts = trace = None
        if save:
            level, shifts = np.full((*batch, n), math.nan, dtype), np.empty((*batch, blocks, m), dtype)
        advance(
            (
                *rows_k(k, *of_keys(weights)), v, key_mask, *rows_q(q, *of_queries(weights)),
                shift, numerator, denominator, out, undone, level, shifts, *after,
            ),
            threads,
        )  # fmt: skip
        if (undone.tobytes() != all_done or no_queries) and completed(arrays, outputs, undone) is None:
            return None
        if level is not None and shifts is not None and not np.isnan(level).any():
            trace = Trace(level, shifts)
        return outputs, trace

    is_straight = fix_v is fix_mask is None and not must_fix and rows_k.is_straight and rows_q.is_straight
    if not is_straight or len(weights) > 2 or save or no_queries:
        advance = advance_of()
        return straight(step) if is_straight and len(weights) <= 2 and not save else step
    of_weights = ("W", "q_W") if weights else ()
    given = ("q_x", "x", "v", "shift", "kv", "k_sum", *of_weights, "mask")
    advance = advance_of((*given, "undone", "out", "new_shift", "new_kv", "new_k_sum"))
    return straight(token, short=advance.small)


def _plan_softmax(arrays: Arrays, static: Mapping[str, Any], save: bool) -> Planned:
    """`softmax_attention`; where one side is small, perhaps by features: see `is_by_tiles`."""
    q, k, v, key_mask = arrays
    scale, dtype = static["scale"], q.dtype
    n, n_kv, d_v = q.shape[-2], k.shape[-2], v.shape[-1]
    batch = np.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2], _mask_batch(key_mask))
    shape = *batch, n, d_v
    if is_by_tiles(n, n_kv, static, save):
        return whole.plan(arrays, static, save)
    are_wide = widened(k) is k and widened(v) is v
    if is_by_keys(n, n_kv):  # a small number of keys: they are the directions of the queries
        shown_k, shown_v, start = hide(np, widened(k), widened(v), key_mask)
        operand = Operand(shown_k.swapaxes(-1, -2), scale)
        read = _Reading(batch, q, operand, start, shown_v, None, is_shift=False)

        def of_all_queries(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], None]:
            q, k, v, key_mask = arrays
            if not are_wide:
                k, v = widened(k), widened(v)
            k, v, start = hide(np, k, v, key_mask)
            out = new(shape, dtype)
            read(q, k.swapaxes(-1, -2), None, start, v, None, out, threads)
            if key_mask is not None and not (seen := key_mask.any(axis=-1)).all():
                out[np.broadcast_to(~seen, batch)] = 0  # even where the query is NaN
            return (out,), None

        def of_rows(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], None]:
            q, k, v, _ = arrays
            out = new(shape, dtype)
            run((q, k, v, out), threads)  # a transpose begins where its matrix does
            return (out,), None

        if key_mask is not None or not are_wide or not read.is_straight:
            return of_all_queries
        run = read.run_of(("x", "W", "kv", "out"))
        return straight(of_rows, short=run.small)
    if not save:

        def of_one_query(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], None]:
            *rows, key_mask = arrays
            out = new(shape, dtype)
            found = attention.softmax_attention(*map(widened, rows), scale=scale, key_mask=key_mask)
            out[...] = rounded(found, dtype)
            return (out,), None

        return of_one_query
    sums = _Sums(batch, k, v, Operand(widened(q).swapaxes(-1, -2), scale), key_mask)
    is_wide = dtype == sums.dtype

    def of_all_keys(arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array], RowSums | None]:
        q, k, v, key_mask = arrays
        out = new(shape, dtype)
        found = out if is_wide else np.empty(shape, sums.dtype)
        shift, _, total = sums(k, v, key_mask, widened(q).swapaxes(-1, -2), None, np.empty, threads, found)
        total[total == 0] = 1  # a row without a visible key is 0
        found /= total
        if not is_wide:
            out[...] = rounded(found, dtype)
        return (out,), RowSums(finite_shift(np, shift), total) if save else None

    return of_all_keys


def is_by_tiles(n: int, n_kv: int, static: Mapping[str, Any], save: bool) -> bool:
    """Whether softmax attention goes by the tiles of block attention, and not by features.

    Queries of a small number of keys go by features, which turn no rows: with 64 keys that takes two thirds of the time
    of tiles. For a gradient, small numbers of rows go by features too. One query would fill one lane of a vector: it
    reads many keys by products of the library.
    """
    if static.get("visible") is not None:
        return True
    return n > SMALL_KEYS < n_kv if save else n > 1 and not (n >= 2 * TILE and is_by_keys(n, n_kv))


def is_by_keys(n: int, n_kv: int) -> bool:
    """Whether keys are the directions of queries, rather than queries those of keys: the keys stay in cache.

    Rows come in tiles, so that one query or a few of them would leave most of a tile empty.
    """
    return n_kv <= SMALL_KEYS and n >= TILE


summarize, attend, step, softmax = map(Forms, (_plan_summarize, _plan_attend, _plan_step, _plan_softmax))


# Runs of one kernel -------------------------------------------------------------------------------------------------


class _Sums:
    """The state of keys, planned for arrays of one form; the shift is −∞ where the mask shows no key."""

    def __init__(self, batch: tuple[int, ...], k: Array, v: Array, side: Operand, mask: Array | None) -> None:
        from subquad_numpy.features.summarize import SUMMARIZE_RECORD, summarize_kernel

        (n, d), d_v, self.dtype = k.shape[-2:], v.shape[-1], widest(k, v)
        m, most = side.width(d), side.width(d) if side.W is None else QUERIES
        self.rows, self.fix_v = Rows(k, side), fix_rows(v)
        self.fix_mask = None if mask is None else fix_items(mask, 1)
        # Chunks of keys have partial sums, so that one long sequence occupies all threads. Their memory is small
        # beside that of the keys, as long as m is.
        self.chunks = chunks = max(1, min(MAX_CHUNKS, n // SUMMARY_CHUNK)) if m <= SMALL_KEYS else 1
        self.column, self.matrix = (*batch, m, 1), (*batch, m, d_v)
        self.is_straight = self.rows.is_straight and self.fix_v is self.fix_mask is None and chunks == 1
        v, column = fixed(self.fix_v, v), np.empty(self.column, self.dtype)
        self.run = Run(
            summarize_kernel(self.dtype, side.phi), SUMMARIZE_RECORD, batch, -(-m // most) * chunks, n * d * m,
            {
                "n": n, "d": d, "m": m, "d_v": d_v, "chunks": chunks, "chunk": -(-n // chunks), "most": most,
                "chunk_step": math.prod(batch) * m, **self.rows.fields(k, side), "v": v, "v_row": row_step(v),
                "mask": None if mask is None else fixed(self.fix_mask, mask),
                "shift": column, "kv": np.empty(self.matrix, self.dtype), "k_sum": column,
                "stored": stored_word((k, v)),
            },
        )  # fmt: skip

    def of_rows(self, arrays: Arrays, new: New, threads: Any) -> tuple[tuple[Array, ...], None]:
        """The state of keys without weights, for arrays that a kernel can read as they are."""
        dtype, column = self.dtype, self.column
        whole = new(column, dtype), new(self.matrix, dtype), new(column, dtype)
        self.run((arrays[0], None, None, None, arrays[1], arrays[5], *whole), threads)
        return whole, None

    def __call__(
        self, k: Array, v: Array, mask: Array | None, W: Array | None, center: Array | None, new: New, threads: Any,
        numerator: Array | None = None,
    ) -> tuple[Array, Array, Array]:  # fmt: skip
        if self.fix_v is not None:
            v = self.fix_v(v)
        if self.fix_mask is not None:
            mask = self.fix_mask(mask)
        dtype, column = self.dtype, self.column
        whole = new(column, dtype), new(self.matrix, dtype) if numerator is None else numerator, new(column, dtype)
        rows = self.rows(k, W, center)
        if self.chunks == 1:
            self.run((*rows, v, mask, *whole), threads)
            return whole
        shift, part, k_sum = (np.empty((self.chunks, *x.shape), dtype) for x in whole)
        self.run((*rows, v, mask, shift, part, k_sum), threads)
        np.max(shift, axis=0, out=whole[0])
        fade = np.exp(shift - finite_shift(np, whole[0]))
        np.einsum("c...,c...v->...v", fade[..., 0], part, out=whole[1])
        np.sum(fade * k_sum, axis=0, out=whole[2])
        return whole


class _Reading:
    """φᵀ kv / φᵀ k_sum of queries, with `start` added to the exponents, planned for arrays of one form.

    A start of None stands for 0, a k_sum of None for 1. If `is_shift`, a start of −∞ counts as 0.
    """

    def __init__(
        self, batch: tuple[int, ...], q: Array, side: Operand, start: Array | None, kv: Array, k_sum: Array | None, *,
        is_shift: bool,
    ) -> None:  # fmt: skip
        from subquad_numpy.features.attend import ATTEND_RECORD, attend_kernel

        (n, d), d_v = q.shape[-2:], kv.shape[-1]
        m, chunks = side.width(d), max(1, -(-n // READING_CHUNK))
        self.rows, self.fix_kv = Rows(q, side), fix_rows(kv)
        self.fix_start, self.fix_k_sum = (None if x is None else fix_items(x, 2) for x in (start, k_sum))
        self.is_straight = self.rows.is_straight and self.fix_kv is self.fix_start is self.fix_k_sum is None
        kv = fixed(self.fix_kv, kv)
        self.run_of = partial(
            Run, attend_kernel(computed(q.dtype), side.phi), ATTEND_RECORD, batch, chunks, n * d * m,
            {
                "n": n, "d": d, "m": m, "d_v": d_v, "chunks": chunks, "chunk": READING_CHUNK,
                **self.rows.fields(q, side),
                "start": None if start is None else fixed(self.fix_start, start), "is_shift": int(is_shift),
                "kv": kv, "kv_row": row_step(kv), "k_sum": None if k_sum is None else fixed(self.fix_k_sum, k_sum),
                "out": np.empty((*batch, n, d_v), q.dtype), "stored": stored_word((None, None, q, q)),
            },
        )  # fmt: skip

    @cached_property
    def run(self) -> Run:
        """The run that is given every array of the record."""
        return self.run_of()

    def __call__(
        self, q: Array, W: Array | None, center: Array | None, start: Array | None, kv: Array, k_sum: Array | None,
        out: Array, threads: Any,
    ) -> None:  # fmt: skip
        if self.fix_kv is not None:
            kv = self.fix_kv(kv)
        if self.fix_start is not None:
            start = self.fix_start(start)
        if self.fix_k_sum is not None:
            k_sum = self.fix_k_sum(k_sum)
        self.run((*self.rows(q, W, center), start, kv, k_sum, out), threads)


def _mask_batch(key_mask: Array | None) -> tuple[int, ...]:
    """The batch shape of a key mask; () where there is none."""
    return () if key_mask is None else key_mask.shape[:-1]


def _center_batch(weights: Sequence[Array]) -> tuple[int, ...]:
    """The common batch shape of both centers; () where there are none."""
    return np.broadcast_shapes(*(x.shape[:-2] for x in weights[2:]))
