"""The matrix of weights of a method, out = W v: read column by column from values that are one-hot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from subquad.attention.checks import check_rows
from subquad.attention.exact import Exact
from subquad.attention.find import find_method
from subquad.attention.method import Method
from subquad.backend import Array
from subquad.core.beside import namespace_of, place_of
from subquad.core.checks import check_flag
from subquad.core.dtypes import common_dtype, is_dtype
from subquad.core.host import to_host
from subquad.core.loading import backend_of

ELEMENTS = 2**22  # of one block of columns, values or output


def attention_weights(
    q: Array,
    k: Array,
    /,
    method: str | Method = "exact",
    *,
    rows: Sequence[int] | Array | None = None,
    causal: bool = False,
    key_mask: Array | None = None,
    scale: float | None = None,
    **options: Any,
) -> Array:
    """Compute the matrix W of a method, with which its output is W v for any values v, or some rows of it.

    Parameters
    ----------
    q : array, shape (..., n, d)
        Queries.
    k : array, shape (..., n_kv, d)
        Keys.
    method : str or method object, default "exact"
        As in `subquad.attention`.
    rows : sequence or array of int, shape (r,), optional
        Numbers of queries, 0 to n − 1, in any order. Default: all.
    causal : bool, default False
        As in `subquad.attention`: rows keep the places that they have among all n queries.
    key_mask : array of bool, broadcastable to (..., n_kv), optional
        True = keep; the columns of other keys are 0.
    scale : float, optional
        As in `subquad.attention`.
    **options
        Options of the method.

    Returns
    -------
    array, shape (..., r, n_kv)
        The weights, in the common dtype of q and k. They are what the method computes: rows of "exact", "window",
        "bigbird" and "lsh" are at least 0 and add up to 1 where they see a key, rows of approximations need not be.

    Raises
    ------
    TypeError, ValueError
        As `subquad.attention`, and for `rows` that are no integers or out of range.
    NotImplementedError
        As `subquad.attention`, and for a method whose output is no W v: a window with `global_qkv`, whose rows read
        other values, and Nyström attention with ``pinv="ridge-fit"`` that chooses λ by the values.

    See Also
    --------
    subquad.attention : The output itself, in memory that does not grow with n · n_kv.

    Notes
    -----
    The method runs on columns of the identity in place of v, a block of columns at a time, so that memory beyond the
    result does not grow with n · n_kv. "exact" computes no other rows than those asked for, the other methods all.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q = k = np.zeros((4, 2))
    >>> subquad.attention_weights(q, k, "window", left=1, rows=[0, 2])
    array([[0.5       , 0.5       , 0.        , 0.        ],
           [0.        , 0.33333333, 0.33333333, 0.33333333]])
    """
    made = find_method(method, options)
    xp = check_rows({"key_mask": key_mask}, q=q, k=k)
    reason = made.why_no_matrix()
    if reason is not None:
        raise NotImplementedError(reason)
    given: dict[str, Any] = {"causal": check_flag("causal", causal), "key_mask": key_mask, "scale": scale}
    n, n_kv, where = q.shape[-2], k.shape[-2], place_of(q)
    chosen = None
    if rows is not None:
        numbers = _row_numbers(rows, n)
        if isinstance(made, Exact):  # a row depends on no other query
            numbers, back = np.unique(numbers, return_inverse=True)
            q = xp.take(q, xp.asarray(numbers.astype(np.int32), device=where), axis=-2)
            if causal:
                counts = np.clip(numbers + n_kv - n + 1, 0, n_kv).astype(np.int32)
                given |= {"causal": False, "visible": xp.asarray(counts, device=where)}
            numbers = back
        chosen = xp.asarray(numbers.astype(np.int32), device=where)
    width = max(64, ELEMENTS // max(math.prod(q.shape[:-2]) * max(q.shape[-2], n_kv), 1))
    place = xp.arange(n_kv, dtype=xp.int32, device=where)
    columns = []
    for first in range(0, max(n_kv, 1), width):
        one = xp.astype(place[:, None] == place[first : min(first + width, n_kv)], common_dtype(xp, q, k))
        part = made(q, k, one, **given)
        columns.append(part if chosen is None else xp.take(part, chosen, axis=-2))
    return columns[0] if len(columns) == 1 else xp.concat(columns, axis=-1)


def _row_numbers(rows: Any, n: int) -> Any:
    """The numbers of queries in NumPy; TypeError unless they are integers, ValueError unless they are 0 to n − 1."""
    if isinstance(rows, list | tuple | range):
        host = np.asarray(rows, dtype=None if len(rows) else np.int64)
    else:
        try:
            xp = namespace_of(rows)
        except TypeError:
            msg = f"rows must be a sequence or an array of integers, got {rows!r} of type {type(rows).__name__}"
            raise TypeError(msg) from None
        if not is_dtype(xp, rows.dtype, "integral"):
            msg = f"rows has dtype {rows.dtype}, expected integers"
            raise TypeError(msg)
        if not backend_of(xp).is_concrete(rows):
            msg = "rows of a program that is traced have no values; pass them as constants"
            raise ValueError(msg)
        host = to_host(rows)
    if host.dtype.kind not in "iu":
        msg = f"rows holds {host.dtype}, expected integers"
        raise TypeError(msg)
    if host.ndim != 1:
        msg = f"rows has shape {host.shape}, expected (r,)"
        raise ValueError(msg)
    wrong = host[(host < 0) | (host >= n)]
    if wrong.size:
        msg = f"rows names query {wrong[0]}, but there are {n} queries, 0 to {n - 1}"
        raise ValueError(msg)
    return host.astype(np.int64)
