"""The causal depthwise convolution in plain Array API: one sum of `width` shifted and weighted copies of the input.

y[t] = act(bias + Σ_k weight[:, width − 1 − k] x[t − k]),    k = 0 … width − 1
"""

from __future__ import annotations

from types import ModuleType

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.dtypes import compute_dtype
from subquad.core.kernel import kernel
from subquad.kernels.sigmoid import sigmoid


def outputs(
    x: Array,
    weight: Array,
    bias: Array | None,
    initial_state: Array | None,
    resets: Array | None,
    /,
    *,
    silu: bool,
    reverse: bool,
) -> tuple[Like, ...]:
    """Shapes and dtypes of the outputs of `causal_conv1d`: y and the last inputs."""
    batch, _, d = x.shape
    compute = compute_dtype(namespace_of(x), x)
    return Like(tuple(x.shape), x.dtype), Like((batch, weight.shape[1] - 1, d), compute)


@kernel(outputs=outputs, reads_half=True)
def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None,
    initial_state: Array | None,
    resets: Array | None,
    /,
    *,
    silu: bool,
    reverse: bool,
) -> tuple[Array, Array]:
    """(y, state) of arrays of one real dtype; with `silu`, y is s / (1 + exp(−s)) of the sum s.

        x               (batch, n, d)
        weight, bias    (d, width), (d,)
        initial_state   (batch, width − 1, d), the inputs before the first step
        resets          (batch, n), bool: a step where it is True, and those after it, see no input before that step

    The state holds the last width − 1 inputs, 0 in place of those before the last reset. With `reverse`, time runs from
    the end, and the rows of both states are in the order in which time passes them. x may have half precision in place
    of float32, and y then has it too.
    """
    xp = namespace_of(x)
    batch, n, d = x.shape
    history = weight.shape[1] - 1
    if reverse:
        x, resets = xp.flip(x, axis=1), None if resets is None else xp.flip(resets, axis=1)
    if initial_state is None:
        initial_state = xp.zeros((batch, history, d), dtype=x.dtype, device=place_of(x))
    inputs = xp.concat([initial_state, x], axis=1)  # the input k steps before step t is at history + t − k
    out = x * weight[:, history] + (0.0 if bias is None else bias)
    state = xp.concat([inputs[:, n:, :]], axis=1)  # a copy: a view would keep all of the inputs in memory
    for k, seen in zip(range(1, history + 1), _seen(xp, resets, n, history), strict=True):
        term = inputs[:, history - k : history - k + n, :]
        out = out + weight[:, history - k] * (term if seen is None else _where(xp, seen, term))
    if resets is not None and history:
        state = _where(xp, xp.stack(_seen_at_end(xp, resets, n, history), axis=1), state)
    if silu:
        out = out * sigmoid(xp, out)
    return xp.flip(out, axis=1) if reverse else out, state


def _seen(xp: ModuleType, resets: Array | None, n: int, history: int) -> list[Array | None]:
    """For each k = 1 … history, (batch, n): whether no reset separates step t from the input k steps before it."""
    if resets is None:
        return [None] * history
    before = xp.zeros((resets.shape[0], history), dtype=resets.dtype, device=place_of(resets))
    padded = xp.logical_not(xp.concat([before, resets], axis=1))
    seen: list[Array] = []
    for k in range(history):
        none_here = padded[:, history - k : history - k + n]
        seen.append(none_here if k == 0 else seen[-1] & none_here)
    return list(seen)


def _seen_at_end(xp: ModuleType, resets: Array, n: int, history: int) -> list[Array]:
    """For each row of the last state, (batch,): whether no reset came after its input."""
    before = xp.zeros((resets.shape[0], history), dtype=resets.dtype, device=place_of(resets))
    padded = xp.logical_not(xp.concat([before, resets], axis=1))
    seen = [xp.ones_like(padded[:, 0])]
    for i in range(1, history):
        seen.append(seen[-1] & padded[:, n + history - i])
    return seen[::-1]


def _where(xp: ModuleType, seen: Array, x: Array) -> Array:
    """x where it is seen, else 0; what is not seen may be NaN, and gets no gradient."""
    return xp.where(xp.expand_dims(seen, axis=-1), x, xp.zeros_like(x))
