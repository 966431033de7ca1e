"""Attention through features, and softmax attention with a small number of keys or of queries, as launches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.core.shapes import broadcast_batch
from subquad.kernels import feature_step
from subquad.kernels.feature_map import Elu, Exponential
from subquad.kernels.max_shift import finite_shift
from subquad_numpy.block_attention.whole import launch_whole
from subquad_numpy.features.operand import hide
from subquad_numpy.runtime.launch import Launch, Run, threads_for

State = tuple[Array, Array, Array]  # shift (..., m, 1), numerator (..., m, d_v), denominator (..., m, 1)


class Side(NamedTuple):
    """Features exp(factor x W − h |x|²) of x = row − center; without W they are elu(factor x) + 1."""

    W: Array | None = None  # (..., d, m), or (..., m, d) if `turned`
    factor: float = 1.0
    half_scale: float = 0.0  # h
    center: Array | None = None  # (..., 1, d)
    turned: bool = False

    @property
    def phi(self) -> str:
        """The name of the feature map in `features.phi.MAPS`."""
        return "elu" if self.W is None else "exponential"

    def width(self, d: int) -> int:
        """The number of features m of rows of d numbers."""
        return d if self.W is None else self.W.shape[-2 if self.turned else -1]

    @property
    def batch(self) -> tuple[int, ...]:
        """The common batch shape of directions and center."""
        W, center = (() if x is None else tuple(x.shape[:-2]) for x in (self.W, self.center))
        return broadcast_batch(weights=W, center=center)

    def sizes(self, d: int) -> dict[str, int]:
        """The strides of an argument record, for contiguous rows of d numbers."""
        steps = {} if self.W is None else {"W_row": self.W.shape[-1], "W_column": 1}
        if self.turned:
            steps = {"W_row": 1, "W_column": d}
        return {"x_row": d, **steps}

    def operands(self, xp: ModuleType, x: Array) -> dict[str, Array | None]:
        """The arrays of an argument record, for rows x."""
        center = None if self.center is None else self.center[..., 0, :]
        numbers = xp.asarray(np.array([self.factor, self.half_scale]), dtype=x.dtype)
        return {"x": x, "W": self.W, "center": center, "numbers": numbers}


def sides_of(xp: ModuleType, phi: Exponential | Elu, weights: Sequence[Array]) -> tuple[Side, Side]:
    """(keys, queries) of a feature map; with centers, W_k takes up the term scale q̄ · x of log φ."""
    if isinstance(phi, Elu):
        return Side(factor=phi.scale_k), Side(factor=phi.scale_q)
    W_k, W_q, *center = weights
    if not center:
        return Side(W_k, half_scale=abs(phi.scale) / 2), Side(W_q)
    q_mean, k_mean = center
    if phi.scale == 0:
        return Side(W_k), Side(W_q, center=q_mean)
    W = W_k + xp.matrix_transpose(phi.scale * q_mean)
    return Side(W, half_scale=abs(phi.scale) / 2, center=k_mean), Side(W_q, center=q_mean)


def launch_summarize(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The outputs of the kernel `feature_summarize`."""
    k, v, shift, numerator, denominator, *weights, key_mask = arrays
    keys, _ = sides_of(array_namespace(k), static["phi"], weights)
    return _with_keys(k, v, keys, key_mask, (shift, numerator, denominator), run)


def launch_attend(arrays: Sequence[Any], static: Mapping[str, Any], run: Run) -> tuple[Array, ...]:
    """The output of the kernel `feature_attend`."""
    q, shift, numerator, denominator, *weights = arrays
    xp = array_namespace(q)
    _, queries = sides_of(xp, static["phi"], weights)
    return (_read(q, queries, shift, numerator, denominator, run, is_shift=True),)


def launch_step(arrays: Sequence[Any], static: Mapping[str, Any], run: Run, *, save: bool = False) -> tuple[Array, ...]:
    """The outputs of the kernel `feature_step`; rows beyond the range of compiled code are left to the generic form.

    What is saved is `step_calls.Trace`, as (…, n, 1) and (…, blocks, m). Items with such a row have levels of NaN.
    """
    from subquad_numpy.features.step import STEP_RECORD, block_rows, step_kernel

    q, k, v, shift, numerator, denominator, *weights, key_mask = arrays
    xp = array_namespace(q)
    keys, queries = sides_of(xp, static["phi"], weights)
    (n, d), d_v, m = q.shape[-2:], v.shape[-1], keys.width(q.shape[-1])
    kept = broadcast_batch(
        k=k.shape[:-2],
        v=v.shape[:-2],
        key_mask=None if key_mask is None else key_mask.shape[:-1],
        state=None if shift is None else shift.shape[:-2],
        weights=keys.batch,
        center=queries.batch,
    )
    batch = broadcast_batch(q=q.shape[:-2], keys=kept)
    alone = kept == batch  # else heads of queries share their keys, and another launch computes the state
    state: dict[str, tuple[int, ...]] = {"new_shift": (m, 1), "new_kv": (m, d_v), "new_k_sum": (m, 1)} if alone else {}
    if save:
        state |= {"level": (n,), "shifts": (-(-n // block_rows(np.dtype(q.dtype))), m)}
    of_queries = {f"q_{name}": x for name, x in queries.operands(xp, q).items()}
    made = Launch(
        step_kernel,
        (np.dtype(q.dtype), keys.phi),
        STEP_RECORD | {"undone": 1},  # its numbers are pairs here
        # `undone` is a number of 64 bits, which a library may not have: a pair of 32 bits, of which the first counts
        {"out": Like((*batch, n, d_v), q.dtype), "undone": Like((*batch, 2), np.dtype(np.int32))}
        | {name: Like((*batch, *tail), q.dtype) for name, tail in state.items()},
        {
            "n": n,
            "d": d,
            "m": m,
            "d_v": d_v,
            "chunks": 1,
            "chunk": n,
            "v_row": d_v,
            "keeps": int(alone),
            **keys.sizes(d),
            **{f"q_{name}": size for name, size in queries.sizes(d).items()},
        },
        batch,
        threads=threads_for(math.prod(batch) * 4 * n * d * m),
    )
    before = {"shift": shift, "kv": numerator, "k_sum": denominator}
    found = run(made, {**keys.operands(xp, k), **of_queries, "v": v, "mask": key_mask, **before})
    undone = found["undone"][..., 0][..., None, None]
    trace = (xp.where(undone == n, found["level"][..., None], math.nan), found["shifts"]) if save else ()
    if alone:
        after = tuple(found[name] for name in ("new_shift", "new_kv", "new_k_sum"))
    else:
        after = _with_keys(k, v, keys, key_mask, (shift, numerator, denominator), run)

    # rows that the kernel left undone, and states of items with one, from the generic form
    def complete(out: Array, *after: Array) -> tuple[Array, ...]:
        whole, *sums = feature_step.generic(*arrays[:-1], key_mask=key_mask, **static)
        done = xp.reshape(xp.arange(n, dtype=xp.int32), (n, 1)) < undone
        if alone:
            sums = [xp.where(undone == n, x, other) for x, other in zip(after, sums, strict=True)]
        return xp.where(done, out, whole), *sums

    return (*run.where_any(xp.any(undone != n), complete, (found["out"], *after)), *trace)


def launch_softmax(
    arrays: Sequence[Any], static: Mapping[str, Any], run: Run, *, save: bool = False
) -> tuple[Array, ...]:
    """The output of the kernel `softmax_attention`.

    What is saved is `softmax_calls.RowSums`, nothing for a small number of keys, or the log-sum-exp if it is by tiles.
    """
    from subquad_numpy.features.softmax_calls import is_by_keys, is_by_tiles

    q, k, v, key_mask = arrays
    xp, scale, n, n_kv = array_namespace(q), static["scale"], q.shape[-2], k.shape[-2]
    if is_by_tiles(n, n_kv, static, save):
        return launch_whole(arrays, static, run, save=save)
    if is_by_keys(n, n_kv):
        k, v, start = hide(xp, k, v, key_mask)
        out = _read(q, Side(k, scale, turned=True), start, v, None, run)
        if key_mask is not None:  # a row without a visible key is 0, even if its query is NaN
            out = xp.where(xp.any(key_mask, axis=-1)[..., None, None], out, 0.0)
        return (out,)
    shift, numerator, denominator = _sums(k, v, Side(q, scale, turned=True), key_mask, run)
    total = xp.where(denominator == 0, 1.0, denominator)  # a row without a visible key is 0
    return numerator / total, *((finite_shift(xp, shift), total) if save else ())


def _with_keys(
    k: Array, v: Array, side: Side, key_mask: Array | None, state: tuple[Array | None, ...], run: Run
) -> State:
    """The `state` with the keys k added."""
    xp = array_namespace(k)
    sums = _sums(k, v, side, key_mask, run)
    shift, *before = state
    if shift is None:
        return sums
    largest = xp.maximum(shift, sums[0])
    finite = finite_shift(xp, largest)
    old, new = xp.exp(shift - finite), xp.exp(sums[0] - finite)
    numerator, denominator = (x * old + y * new for x, y in zip(before, sums[1:], strict=True))
    return largest, numerator, denominator


def _sums(k: Array, v: Array, side: Side, key_mask: Array | None, run: Run) -> State:
    """The state of the keys k alone; the shift is −∞ where the mask shows no key."""
    from subquad_numpy.features.runs import MAX_CHUNKS, QUERIES, SMALL_KEYS, SUMMARY_CHUNK
    from subquad_numpy.features.summarize import SUMMARIZE_RECORD, summarize_kernel

    xp, (n, d), d_v, m = array_namespace(k), k.shape[-2:], v.shape[-1], side.width(k.shape[-1])
    mask_batch = None if key_mask is None else key_mask.shape[:-1]
    batch = broadcast_batch(k=k.shape[:-2], v=v.shape[:-2], key_mask=mask_batch, weights=side.batch)
    most = m if side.W is None else QUERIES
    # Chunks of keys have partial sums, so that one long sequence occupies all threads. Their memory is small beside
    # that of the keys, as long as m is.
    chunks = max(1, min(MAX_CHUNKS, n // SUMMARY_CHUNK)) if m <= SMALL_KEYS else 1
    items = math.prod(batch)
    found = run(
        Launch(
            summarize_kernel,
            (np.dtype(k.dtype), side.phi),
            SUMMARIZE_RECORD,
            {
                name: Like((chunks, *batch, m, width), k.dtype)
                for name, width in (("shift", 1), ("kv", d_v), ("k_sum", 1))
            },
            {
                "n": n,
                "d": d,
                "m": m,
                "d_v": d_v,
                "chunks": chunks,
                "chunk": -(-n // chunks),
                "most": most,
                "chunk_step": items * m,
                "v_row": d_v,
                **side.sizes(d),
            },
            batch,
            tasks=-(-m // most) * chunks,
            threads=threads_for(items * n * d * m),
        ),
        {**side.operands(xp, k), "v": v, "mask": key_mask},
    )
    shift, numerator, denominator = found["shift"], found["kv"], found["k_sum"]
    if chunks == 1:
        return shift[0, ...], numerator[0, ...], denominator[0, ...]
    largest = xp.max(shift, axis=0)
    fade = xp.exp(shift - finite_shift(xp, largest))
    return largest, xp.sum(fade * numerator, axis=0), xp.sum(fade * denominator, axis=0)


def _read(
    q: Array, side: Side, start: Array | None, numerator: Array, denominator: Array | None, run: Run, *,
    is_shift: bool = False,
) -> Array:  # fmt: skip
    """φᵀ numerator / φᵀ denominator of queries, where `start`, (..., m, 1), is added to the exponents.

    A denominator of None stands for 1, a start of None for 0. If `is_shift`, a start of −∞ counts as 0.
    """
    from subquad_numpy.features.attend import ATTEND_RECORD, attend_kernel
    from subquad_numpy.features.runs import READING_CHUNK

    xp, (n, d), d_v, m = array_namespace(q), q.shape[-2:], numerator.shape[-1], side.width(q.shape[-1])
    start_batch = None if start is None else start.shape[:-2]
    batch = broadcast_batch(q=q.shape[:-2], state=numerator.shape[:-2], start=start_batch, weights=side.batch)
    chunks = max(1, -(-n // READING_CHUNK))
    made = Launch(
        attend_kernel,
        (np.dtype(q.dtype), side.phi),
        ATTEND_RECORD,
        {"out": Like((*batch, n, d_v), q.dtype)},
        {
            "n": n,
            "d": d,
            "m": m,
            "d_v": d_v,
            "chunks": chunks,
            "chunk": READING_CHUNK,
            "kv_row": d_v,
            "is_shift": int(is_shift),
            **side.sizes(d),
        },
        batch,
        tasks=chunks,
        threads=threads_for(math.prod(batch) * n * d * m),
    )
    operands = {**side.operands(xp, q), "start": start, "kv": numerator, "k_sum": denominator}
    return run(made, operands)["out"]
