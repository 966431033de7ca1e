"""Kernels as few nodes of ONNX: attention by its Softmax, the pseudo-inverse as a loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import spox.opset.ai.onnx.v21 as op

from subquad.backend import Accepts, Call, Override
from subquad.kernels.feature_attention import feature_attend, feature_summarize
from subquad.kernels.lti_scan import lti_scan as lti_kernel
from subquad_ndonnx import array_api as xp
from subquad_ndonnx.graph import Graph, graph, has_values
from subquad_ndonnx.loops import repeated, scan
from subquad_ndonnx.sizes import as_vector


def softmax_attention(q: Any, k: Any, v: Any, /, *, scale: float, visible: Any = None, key_mask: Any = None) -> Graph:
    """The kernel `softmax_attention`: two products and a Softmax; hidden keys have weights of 0, NaN among them too."""
    seen = None
    q, k, v = graph(q * scale), graph(k), graph(v)
    if key_mask is not None:
        seen = graph(key_mask)[..., None, :]
        keep = graph(key_mask)[..., None]
        k, v = xp.where(keep, k, 0.0), xp.where(keep, v, 0.0)
    logits = q @ xp.matrix_transpose(k)
    if visible is not None:
        n, n_kv = q.shape[-2], k.shape[-2]
        place = xp.arange(n)[:, None]
        pairs = xp.arange(n_kv) <= (place + (n_kv - n))
        seen = pairs if seen is None else seen & pairs
        # a value that is not finite makes the rows that see it NaN, by their logits, and no others
        spoilt = v * 0.0
        logits = logits + xp.matrix_transpose(xp.sum(spoilt, axis=-1, keepdims=True))
        v = xp.where(xp.isnan(spoilt), 0.0, v)
    if seen is not None:
        logits = xp.where(seen, logits, -math.inf)
    weights = graph(op.softmax(logits.unwrap_spox(), axis=-1), logits.shape)
    if seen is not None:  # a row that sees no key is 0, where Softmax gives NaN
        weights = xp.where(seen, weights, 0.0)
    return weights @ v


def no_keys(call: Call) -> str | None:
    """A reason to decline: without keys there is nothing to take a Softmax of."""
    n_kv = call.arrays[1].shape[-2]
    return "there are no keys" if isinstance(n_kv, int) and n_kv == 0 else None


def pinv_loop(a: Any, /, *, iterations: int) -> Graph:
    """The kernel `iterative_pinv` with its iterations as one Loop."""
    a = graph(a)
    of_rows, of_columns = (op.reduce_l1(a.unwrap_spox(), as_vector((axis,))) for axis in (-1, -2))
    # the largest product is that of the largest sums; matrices of 0 stay 0, whose norms are 0
    norms = op.reduce_max(op.mul(of_rows, of_columns), as_vector((-2, -1)))
    least = op.const(xp.finfo(a.dtype).tiny)
    z = xp.matrix_transpose(a) / graph(op.max([norms, least]), (*a.shape[:-2], 1, 1))
    eye = np.eye(a.shape[-1])
    seven, fifteen, thirteen = (xp.asarray(c * eye, dtype=a.dtype) for c in (7, 15, 13))

    def step(z: Any) -> Any:
        az = a @ z
        return z @ (thirteen - az @ (fifteen - az @ (seven - az))) / 4

    return repeated(step, z, iterations) if iterations else z


def feature_step(
    q: Any, k: Any, v: Any, shift: Any, numerator: Any, denominator: Any, /, *weights: Any, phi: Any,
    key_mask: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    """The kernel `feature_step` as one Loop over the tokens: each enters the state, then reads it."""
    q, k, v = map(graph, (q, k, v))
    mask = None if key_mask is None else graph(key_mask)[..., None]
    options = {"phi": phi}
    none_yet = None if key_mask is None else graph(key_mask)[..., :0]
    state = summarize(
        k[..., :0, :], v[..., :0, :], shift, numerator, denominator, *weights, key_mask=none_yet, **options
    )

    def step(state: tuple[Any, ...], q: Any, k: Any, v: Any, mask: Any) -> Any:
        keep = None if mask is None else mask[..., 0]
        state = summarize(k, v, *state, *weights, key_mask=keep, **options)
        return state, attend(q, *state, *weights, **options)

    state, out = scan(step, state, [q, k, v, mask])
    return out, *state


def lti_scan(
    u: Any, rate: Any, B: Any, C: Any, D: Any, initial_state: Any, resets: Any, mask: Any, /, *, reverse: bool
) -> tuple[Any, Any]:
    """The kernel `lti_scan` as one Loop over the steps; with a mask, the generic form goes step by step."""
    mask = xp.ones((1, u.shape[1]), dtype=xp.bool) if mask is None else mask
    return step_by_step(u, rate, B, C, D, initial_state, resets, mask, reverse=reverse)


step_by_step = lti_kernel.generic
summarize, attend = feature_summarize.generic, feature_attend.generic


def has_values_only(call: Call) -> str | None:
    """A reason to decline: ndonnx computes with values that are known as they come, but not through a Loop."""
    return "the values of its arrays are known" if has_values(*call.arrays, call.key_mask) else None


TRACED = frozenset({"tracing"})
OVERRIDES = (
    Override(
        "softmax_attention",
        "onnx",
        softmax_attention,
        Accepts(options=frozenset({"visible", "key_mask"}), under=TRACED, also=no_keys),
    ),
    Override("iterative_pinv", "onnx", pinv_loop, Accepts(under=TRACED, also=has_values_only)),
    Override(
        "feature_step",
        "onnx",
        feature_step,
        Accepts(options=frozenset({"key_mask"}), under=TRACED, also=has_values_only),
    ),
    Override("lti_scan", "onnx", lti_scan, Accepts(under=TRACED, also=has_values_only)),
)
