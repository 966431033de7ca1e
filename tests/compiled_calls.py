"""Whole calls built from the compiled kernels, with their gradients, as the drivers of `subquad.attention` build them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from subquad.kernels import feature_map
from subquad.kernels.selective_scan import Gradients
from subquad.kernels.visibility import alignment
from subquad_numpy.table import COMPILED

Array = np.ndarray
SUMMARIZE, ATTEND, STEP, SOFTMAX = (
    COMPILED[name] for name in ("feature_summarize", "feature_attend", "feature_step", "softmax_attention")
)
NO_STATE = None, None, None


class Mapped(NamedTuple):
    """A feature map and its weights."""

    phi: Any
    weights: tuple[Array, ...] = ()

    @property
    def static(self) -> dict[str, Any]:
        return {"phi": self.phi}


def exponential(W_k: Array, W_q: Array, scale: float, center: tuple[Array, Array] | None = None) -> Mapped:
    return Mapped(feature_map.Exponential(scale), (W_k, W_q, *(center or ())))


def elu(scale_k: float, scale_q: float) -> Mapped:
    return Mapped(feature_map.Elu(scale_k, scale_q))


class Done(NamedTuple):
    """A finished call: its output, and the inputs, saved arrays and outputs of each kernel for the gradient."""

    out: Array
    verbs: tuple[tuple[Any, tuple[Any, ...], Any, tuple[Array, ...]], ...]
    early: int = 0  # rows before the first key


def feature_product(q: Array, k: Array, v: Array, *, causal: bool = False, **options: Any) -> Array:
    """Attention through features."""
    return (causal_product if causal else product)(q, k, v, **options).out


def product(
    q: Array, k: Array, v: Array, *, phi: Mapped, key_mask: Array | None = None, save: bool = False, **options: Any
) -> Done:
    """Attention through features, not causal."""
    first = (k, v, *NO_STATE, *phi.weights, key_mask)
    state, left = SUMMARIZE.forward(first, phi.static, save=save, **options)
    second = (q, *state, *phi.weights)
    outputs, saved = ATTEND.forward(second, phi.static, save=save, **options)
    return Done(outputs[0], ((SUMMARIZE, first, left, state), (ATTEND, second, saved, outputs)))


def causal_product(
    q: Array, k: Array, v: Array, *, phi: Mapped, key_mask: Array | None = None, save: bool = False, **options: Any
) -> Done:
    """Causal attention through features; nothing is saved if the compiled gradient cannot take the call."""
    ahead, early = alignment(q.shape[-2], k.shape[-2])
    before, after = (None if key_mask is None else key_mask[..., x] for x in (slice(ahead), slice(ahead, None)))
    state, verbs = NO_STATE, ()
    if ahead:
        first = (k[..., :ahead, :], v[..., :ahead, :], *NO_STATE, *phi.weights, before)
        state, left = SUMMARIZE.forward(first, phi.static, save=save, **options)
        verbs = ((SUMMARIZE, first, left, state),)
    second = (q[..., early:, :], k[..., ahead:, :], v[..., ahead:, :], *state, *phi.weights, after)
    outputs, saved = STEP.forward(second, phi.static, save=save, **options)
    out = outputs[0]
    if early:
        out = np.concatenate([np.zeros((*out.shape[:-2], early, out.shape[-1]), out.dtype), out], axis=-2)
    return Done(out, (*verbs, (STEP, second, saved, outputs)), early)


def gradients(done: Done, phi: Mapped, grad: Array, *, threads: int | None = None) -> list[Array]:
    """Gradients by q, k and v, then by the weights as far as the kernels give them."""
    verb, arrays, saved, outputs = done.verbs[-1]
    grads = (grad[..., done.early :, :], *(None for _ in outputs[1:]))
    by_weights = verb is ATTEND
    need = [True] * len(arrays)
    if not by_weights:
        need[6:] = [False] * len(need[6:])
    found = verb.backward(arrays, phi.static, saved, outputs, grads, need, threads=threads)
    assert found is not None
    by_q, *by_last = found
    if done.early:
        by_q = np.concatenate([np.zeros((*by_q.shape[:-2], done.early, by_q.shape[-1]), by_q.dtype), by_q], axis=-2)
    by_state = found[1:4] if verb is ATTEND else found[3:6]
    if len(done.verbs) == 1:
        return [by_q, *by_last[:2]]
    _, arrays, saved, state = done.verbs[0]
    need = [True] * 5 + [by_weights] * len(phi.weights) + [False]
    sums = SUMMARIZE.backward(arrays, phi.static, saved, state, (None, *by_state[1:]), need, threads=threads)
    if verb is STEP:
        return [by_q, *(np.concatenate(pair, axis=-2) for pair in zip(sums[:2], found[1:3], strict=True))]
    by_map = [_sum(x, y) for x, y in zip(sums[5:-1], found[4:], strict=True)]
    return [by_q, *sums[:2], *by_map]


def softmax(q: Array, k: Array, v: Array, *, scale: float, key_mask: Array | None = None, **options: Any) -> Array:
    """Softmax attention."""
    return SOFTMAX.forward((q, k, v, key_mask), {"scale": scale}, **options)[0][0]


def softmax_gradients(
    q: Array, k: Array, v: Array, grad: Array, *, scale: float, key_mask: Array | None = None
) -> Sequence[Array]:
    """Gradients of softmax attention by q, k and v."""
    arrays, static = (q, k, v, key_mask), {"scale": scale}
    outputs, saved = SOFTMAX.forward(arrays, static, save=True)
    return SOFTMAX.backward(arrays, static, saved, outputs, (grad,), [True, True, True, False])[:3]


def scan_forward(
    u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None = None, z: Array | None = None,
    delta_bias: Array | None = None, initial_state: Array | None = None, delta_softplus: bool = False,
    reverse: bool = False, resets: Array | None = None, **options: Any,
) -> tuple[Array, ...]:  # fmt: skip
    """(y, last state) of the selective scan."""
    arrays = u, delta, A, B, C, D, z, delta_bias, initial_state, resets
    static = {"delta_softplus": delta_softplus, "reverse": reverse}
    return COMPILED["selective_scan"].forward(arrays, static, **options)[0]


def scan_backward(
    u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None, z: Array | None,
    delta_bias: Array | None, initial_state: Array | None, delta_softplus: bool, reverse: bool, grad_y: Array,
    grad_state: Array | None = None, resets: Array | None = None, saves: bool = False, **options: Any,
) -> Gradients:  # fmt: skip
    """Gradients of the selective scan, from the states that the forward pass saves if asked; outputs are not needed."""
    arrays = u, delta, A, B, C, D, z, delta_bias, initial_state, resets
    static, need = {"delta_softplus": delta_softplus, "reverse": reverse}, [x is not None for x in arrays]
    grads, scan = (grad_y, grad_state), COMPILED["selective_scan"]
    saved = scan.forward(arrays, static, save=True, **options)[1] if saves else None
    return Gradients(*scan.backward(arrays, static, saved, (), grads, need, **options))


def linear_scan_forward(
    a: Array, b: Array, initial_state: Array | None = None, reverse: bool = False, resets: Array | None = None,
    **options: Any,
) -> Array:  # fmt: skip
    """h of the linear scan."""
    return COMPILED["linear_scan"].forward((a, b, initial_state, resets), {"reverse": reverse}, **options)[0][0]


def linear_scan_backward(
    a: Array, h: Array, initial_state: Array | None, reverse: bool, grad_h: Array, resets: Array | None = None,
    **options: Any,
) -> tuple[Array | None, ...] | None:  # fmt: skip
    """Gradients of the linear scan; b is not needed."""
    arrays, need = (a, h, initial_state, resets), [True, True, initial_state is not None, False]
    found = COMPILED["linear_scan"].backward(arrays, {"reverse": reverse}, None, (h,), (grad_h,), need, **options)
    return None if found is None else found[:3]


def _sum(x: Array | None, y: Array | None) -> Array | None:
    if x is None or y is None:
        return y if x is None else x
    return x + y
