"""Causal attention through features after a state, on NumPy arrays by a compiled kernel: `step`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from subquad.kernels.feature_attention import feature_step
from subquad_numpy.features.operand import Rows, keys_of, operand_from, queries_of
from subquad_numpy.features.runs import Array, Arrays, New, Planned, center_batch, mask_batch
from subquad_numpy.runtime.arguments import Forms, Run, fix_items, fix_rows, fixed, row_step, straight
from subquad_numpy.runtime.stored import common, rounded, stored_word, widened, widest


class Trace(NamedTuple):
    """What the gradient of `step` reads of the forward pass, beside inputs and outputs."""

    level: Array  # (..., n), log Σ_j w[i, j], ∞ where the row sees no key
    shifts: Array  # (..., blocks, m), the shift before each block


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
        k.shape[:-2], v.shape[:-2], mask_batch(key_mask), state_batch, keys.batch, center_batch(weights)
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


step = Forms(_plan_step)
