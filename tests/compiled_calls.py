"""Compiled kernels by their records, on NumPy arrays: whole calls made of verbs, and the gradients of these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from subquad.kernels.feature_map import FeatureMap
from subquad.kernels.selective_scan import Gradients, Inputs
from subquad.kernels.visibility import alignment
from subquad_numpy.compiled import COMPILED

Array = np.ndarray
Pull = Callable[..., Any]  # gradients by the arrays, from those by the outputs


def run(
    name: str, *arrays: Array | None, key_mask: Array | None = None, threads: int | None = None, save: bool = False,
    new: Callable[..., Array] = np.empty, **static: Any,
) -> tuple[tuple[Array, ...], Pull]:  # fmt: skip
    """Outputs of a kernel, and a function that gives the gradients by its positional arguments."""
    record = COMPILED[name]
    given = (*arrays, key_mask) if "key_mask" in record.accepts.options else arrays
    outputs, saved = record.forward(given, static, new=new, save=save, threads=threads)

    def pull(*grads: Array | None, need: Sequence[bool] | None = None) -> Any:
        assert record.backward is not None
        asked = [x is not None for x in given] if need is None else need
        found = record.backward(given, static, saved, outputs, grads, asked, threads=threads)
        return None if found is None else found[: len(arrays)]

    return outputs, pull


def features(
    q: Array, k: Array, v: Array, *weights: Array, phi: FeatureMap, key_mask: Array | None = None,
    causal: bool = False, threads: int | None = None, **options: Any,
) -> Array:  # fmt: skip
    """Attention through features."""
    options |= {"key_mask": key_mask, "causal": causal, "threads": threads}
    out, _ = features_and_pull(q, k, v, *weights, phi=phi, **options)
    return out


def features_and_pull(
    q: Array, k: Array, v: Array, *weights: Array, phi: FeatureMap, key_mask: Array | None = None,
    causal: bool = False, by_weights: bool = False, **options: Any,
) -> tuple[Array, Pull]:  # fmt: skip
    """The output, and the gradients by q, k, v and, if asked for, the weights; None where the kernel has none."""
    options |= {"phi": phi}
    asked = [by_weights] * len(weights)
    ahead, early = alignment(q.shape[-2], k.shape[-2]) if causal else (k.shape[-2], 0)
    now = slice(ahead, None)
    state: tuple[Any, ...] = (None, None, None)
    of_keys: Pull | None = None
    if ahead or not causal:
        head = None if key_mask is None else key_mask[..., :ahead]
        state, of_keys = run("feature_summarize", k[..., :ahead, :], v[..., :ahead, :], None, None, None, *weights,
                             key_mask=head, **options)  # fmt: skip
    if causal:
        tail = None if key_mask is None else key_mask[..., now]
        rows = q[..., early:, :], k[..., now, :], v[..., now, :]
        (out, *_), of_rows = run("feature_step", *rows, *state, *weights, key_mask=tail, **options)
        out = np.concatenate([np.zeros((*out.shape[:-2], early, out.shape[-1]), out.dtype), out], axis=-2)
    else:
        (out,), of_rows = run("feature_attend", q, *state, *weights, **options)

    def pull(grad: Array) -> Any:
        held = [x is not None for x in state]
        if causal:
            found = of_rows(grad[..., early:, :], None, None, None, need=[True] * 3 + held + asked + [False])
            if found is None:
                return None
            by_q, by_k, by_v, _, *by_state = found
            by_q = np.concatenate([np.zeros_like(q[..., :early, :]), by_q], axis=-2)
        else:
            by_q, _, *by_state = of_rows(grad, need=[True, *held, *asked])
        by_weights_ = by_state[2:]
        if of_keys is None:
            return [by_q, by_k, by_v, *by_weights_]
        need = [True, True, False, False, False, *asked, False]
        by_ahead, by_v_ahead, _, _, _, *more = of_keys(None, *by_state[:2], need=need)
        by_k, by_v = ((by_ahead, by_v_ahead) if not causal else
                      (np.concatenate(pair, axis=-2) for pair in ((by_ahead, by_k), (by_v_ahead, by_v))))  # fmt: skip
        return [by_q, by_k, by_v, *map(added, by_weights_, more)]

    return out, pull


def added(x: Array | None, y: Array | None) -> Array | None:
    """The sum of two gradients; None is zero."""
    return y if x is None else x if y is None else x + y


def softmax(q: Array, k: Array, v: Array, **options: Any) -> Array:
    """Softmax attention; options are scale, key_mask, threads, new."""
    return softmax_and_pull(q, k, v, **options)[0]


def softmax_and_pull(q: Array, k: Array, v: Array, *, scale: float, **options: Any) -> tuple[Array, Pull]:
    """The output, and the gradients by q, k and v."""
    (out,), pull = run("softmax_attention", q, k, v, scale=scale, visible=None, **options)
    return out, pull


def scan_forward(
    *, delta_softplus: bool = False, reverse: bool = False, threads: int | None = None, **given: Any
) -> tuple[Array, Array]:
    """y and the last state of a selective scan."""
    arrays = (given.get(name) for name in Inputs._fields)
    (y, state), _ = run("selective_scan", *arrays, delta_softplus=delta_softplus, reverse=reverse, threads=threads)
    return y, state


def scan_backward(
    *, delta_softplus: bool, reverse: bool, grad_y: Array, grad_state: Array | None = None, threads: int | None = None,
    **given: Any,
) -> Gradients:  # fmt: skip
    """Gradients by the inputs of a selective scan."""
    arrays = (given.get(name) for name in Inputs._fields)
    static = {"delta_softplus": delta_softplus, "reverse": reverse}
    _, pull = run("selective_scan", *arrays, save=True, threads=threads, **static)
    return Gradients(*pull(grad_y, grad_state))


def linear_scan_and_pull(
    a: Array, b: Array, initial_state: Array | None, reverse: bool, *, threads: int | None = None
) -> tuple[Array, Pull]:
    """h of a linear scan, and the gradients by a, b and the initial state."""
    (h,), pull = run("linear_scan", a, b, initial_state, reverse=reverse, threads=threads, save=True)
    return h, pull


def iterative_pinv(a: Array, *, iterations: int, threads: int | None = None) -> Array:
    """Z ≈ A⁺."""
    (z,), _ = run("iterative_pinv", a, iterations=iterations, threads=threads)
    return z
