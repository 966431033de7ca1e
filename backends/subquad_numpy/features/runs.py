"""Runs of two kernels for all calls through features: `Sums` makes a state of keys, `Reading` an output of queries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

from subquad.kernels.max_shift import finite_shift
from subquad_numpy.features.operand import Operand, Rows
from subquad_numpy.runtime.arguments import Run, fix_items, fix_rows, fixed, row_step
from subquad_numpy.runtime.stored import computed, stored_word, widest

Array = np.ndarray[Any, Any]
Arrays = Sequence[Any]  # arrays, or None where there is none
New = Callable[[tuple[int, ...], Any], Array]
Planned = Callable[[Arrays, New, Any], tuple[tuple[Array, ...], Any] | None]  # see `runtime.arguments.Forms`

SUMMARY_CHUNK, MAX_CHUNKS = 4096, 16  # minimum keys of a task of `Sums`; maximum chunks, whose sums take memory
READING_CHUNK = 512  # queries of a task of `Reading`
SMALL_KEYS, QUERIES = 512, 256  # maximum keys whose values stay in cache; maximum features of a task of `Sums`


class Sums:
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


class Reading:
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


def mask_batch(key_mask: Array | None) -> tuple[int, ...]:
    """The batch shape of a key mask; () where there is none."""
    return () if key_mask is None else key_mask.shape[:-1]


def center_batch(weights: Sequence[Array]) -> tuple[int, ...]:
    """The common batch shape of both centers; () where there are none."""
    return np.broadcast_shapes(*(x.shape[:-2] for x in weights[2:]))
