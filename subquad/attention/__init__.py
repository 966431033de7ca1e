"""Attention: the functions `attention` and `attention_weights`, and one file for each method."""

from __future__ import annotations

from typing import Any

import numpy as np

from subquad.attention.auto import Auto
from subquad.attention.bigbird import BigBird
from subquad.attention.clustered import Clustered
from subquad.attention.crossover import Crossover, measure_crossover
from subquad.attention.estimate import ErrorEstimate, PoorApproximation, estimate_error
from subquad.attention.exact import Exact
from subquad.attention.favor import Favor
from subquad.attention.find import find_method
from subquad.attention.linear import Linear
from subquad.attention.linformer import Linformer
from subquad.attention.lsh import LSH
from subquad.attention.method import Method
from subquad.attention.nystrom import Nystrom
from subquad.attention.weights import attention_weights
from subquad.attention.window import Window
from subquad.backend import Array
from subquad.registry import METHODS

__all__ = [
    "LSH",
    "METHODS",
    "Auto",
    "BigBird",
    "Clustered",
    "Crossover",
    "ErrorEstimate",
    "Exact",
    "Favor",
    "Linear",
    "Linformer",
    "Method",
    "Nystrom",
    "PoorApproximation",
    "Window",
    "attention",
    "attention_weights",
    "estimate_error",
    "find_method",
    "measure_crossover",
]


def attention(
    q: Array,
    k: Array,
    v: Array,
    /,
    method: str | Method,
    *,
    causal: bool = False,
    key_mask: Array | None = None,
    scale: float | None = None,
    segments: Array | tuple[Array, Array] | None = None,
    visible: Array | None = None,
    return_lse: bool = False,
    mask: Array | None = None,
    bias: Array | None = None,
    softcap: float | None = None,
    sinks: Array | int | None = None,
    **options: Any,
) -> Any:
    """Compute attention of queries to keys by any method, on any array library.

        out[i] ≈ Σ_j exp(scale q[i]·k[j]) v[j] / Σ_j exp(scale q[i]·k[j])

    Parameters
    ----------
    q : array, shape (..., n, d)
        Queries, of a real floating dtype. The axes before the last two are batch axes, heads included.
    k, v : array, shape (..., n_kv, d) and (..., n_kv, d_v)
        Keys and values, of the library and on the device of `q`. Batch axes broadcast. The number of key heads
        (axis −3) may also divide the number of query heads (grouped queries).
    method : str or method object
        "auto", "bigbird", "clustered", "exact", "favor" ("performer"), "linear", "linformer", "lsh" ("reformer"),
        "nystrom" ("nystromformer"), "window" ("longformer"), or an instance such as ``subquad.Favor(num_features=8)``.
    causal : bool, default False
        Query i sees the keys 0 … i + (n_kv − n): queries and keys are aligned at their ends. A method that has no
        causal form raises NotImplementedError.
    key_mask : array of bool, broadcastable to (..., n_kv), optional
        True = keep. A masked key has no influence at all, even if it is NaN. A row that sees no key is 0.
    scale : float, optional
        Factor of the logits q·k. Default: d ** -0.5 (1 for "linear").
    segments : array of int, broadcastable to (..., n), or a pair of them for q and k, optional
        Numbers of documents that are packed into one sequence: a query sees the keys with its own number alone, and
        causality, windows and blocks are counted within the document: its output is that of the document alone. Rows of
        a document must lie together. Every method takes it.
    visible : array of int, broadcastable to (..., n), optional
        How many keys, from the first, each query sees: numbers that do not decrease. Not together with `causal`.
        "exact", "window", "bigbird", "lsh", "favor" and "linear" take it.
    return_lse : bool, default False
        Whether to return the log-sum-exp of the logits that each query sees as well ("clustered", "exact", "window").
    mask : array of bool, broadcastable to (..., n, n_kv), optional
        True = the query sees the key ("exact").
    bias : array, broadcastable to (..., n, n_kv), optional
        A term that is added to the logits ("exact").
    softcap : float, optional
        A bound c > 0: logits become c tanh(logits / c) before `bias` is added ("exact").
    sinks : array, broadcastable to (..., heads), optional
        One more logit for each head, in the denominator alone: weights add up to less than 1 ("exact"). A number is the
        option of "clustered" of that name.
    **options
        Options of the method, such as ``num_features=512``: the parameters of its class.

    Returns
    -------
    array, shape (..., n, d_v)
        The output, of the library and on the device of the inputs, in the common dtype of q, k and v. float16 and
        bfloat16 are computed in float32. With `return_lse`, a pair: the output, and the natural logarithm (..., n) of
        Σ_j exp(logit[i, j]), of dtype float32 or float64, −∞ for a row that sees no key; a sink is one of the terms.

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a real floating dtype, or an option that does not exist.
    ValueError
        For an unknown method, or for shapes, devices or option values that do not fit; the message names the argument
        and what was expected.
    NotImplementedError
        If the method has no form for the call, such as causal Nyström attention.

    See Also
    --------
    subquad.attention_weights : The matrix that a method multiplies v with, or rows of it.
    subquad.estimate_error : The error of a method on these arrays, estimated from some rows.
    subquad.explain : Say which implementation a call uses.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 8, 1000, 64), dtype=np.float32)
    >>> subquad.attention(q, k, v, "nystrom", num_landmarks=32).shape
    (8, 1000, 64)
    >>> subquad.attention(q, k, v, subquad.Favor(num_features=128), causal=True).dtype
    dtype('float32')
    """
    if sinks is not None and isinstance(
        sinks, (int, np.integer)
    ):  # an option of "clustered"; the restriction is an array
        options, sinks = options | {"sinks": sinks}, None
    return find_method(method, options).__call__(  # the function: keywords of an object's call cost CPython 1 µs more
        q, k, v, causal=causal, key_mask=key_mask, scale=scale, segments=segments, visible=visible,
        return_lse=return_lse, mask=mask, bias=bias, softcap=softcap, sinks=sinks,
    )  # fmt: skip
