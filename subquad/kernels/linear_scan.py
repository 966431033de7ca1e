"""The linear scan in plain Array API, without a Python loop over all n time steps.

    h[t] = a[t] h[t−1] + b[t]

The sequence is cut into runs of at most `RUN` steps. All runs advance together, one step at a time, in two passes. The
first pass starts every run from 0 and finds its last state and the product of its factors; a scan of logarithmic depth
then joins the runs, which gives the state before each of them; the second pass starts from these and gives the output.
"""

from __future__ import annotations

from types import ModuleType

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import fold_blocks
from subquad.core.dtypes import compute_dtype
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.kernels.parallel_prefix import cut_runs, join_runs

# Steps of a run, so the loop over steps has 2 RUN iterations. Joining costs log₂(n / RUN) / RUN of a pass: shorter runs
# spend more on joining, longer ones on the loop.
RUN = 16


def outputs(
    a: Array, b: Array, initial_state: Array | None, resets: Array | None, /, *, reverse: bool
) -> tuple[Like, ...]:
    """Shape and dtype of the output of `linear_scan`."""
    return (Like(tuple(b.shape), compute_dtype(namespace_of(b), b) if a.dtype != b.dtype else b.dtype),)


@kernel(
    outputs=outputs,
    gradient=lambda arrays, outputs, grads, **static: _gradient(arrays, outputs, grads, **static),
    reads_half=True,
)
def linear_scan(a: Array, b: Array, initial_state: Array | None, resets: Array | None, /, *, reverse: bool) -> Array:
    """h (batch, n, d) of a and b (batch, n, d) and initial_state (batch, d) or None; one dtype, real or complex.

    Each of a and b may have half precision in place of float32; h has it if both have the same.
    With `reverse`, time runs from the end: h[t] = a[t] h[t+1] + b[t]. Where `resets`, bool (batch, n) or None, is True,
    0 stands in place of the state before the step, by selection: no value, NaN included, passes it.
    """
    xp = namespace_of(a)
    batch, n, d = b.shape
    if n == 0:
        return b
    if initial_state is None:
        initial_state = xp.zeros((batch, d), dtype=b.dtype, device=place_of(b))
    anew = None if resets is None else resets[..., None]
    if reverse:
        a, b, anew = (None if x is None else xp.flip(x, axis=1) for x in (a, b, anew))
    columns, steps = backend_of(xp).run_sizes(n, RUN)
    # padding has a = b = 0; it stands after the last step, in the last run, so that no state passes through it
    runs = [None if x is None else cut_runs(xp, x, columns, steps) for x in (a, b, anew)]

    def learn(carry: tuple[Array, Array], a: Array, b: Array, anew: Array | None) -> tuple[tuple[Array, Array], None]:
        decay, h = (started(xp, x, anew) for x in carry)
        return (a * decay, a * h + b), None

    def emit(h: Array, a: Array, b: Array, anew: Array | None) -> tuple[Array, Array]:
        h = a * started(xp, h, anew) + b
        return h, h

    before = xp.reshape(initial_state, (batch, 1, 1, d))
    if columns > 1:
        zero = xp.zeros((batch, columns, 1, d), dtype=b.dtype, device=place_of(b))
        (decay, left), _ = fold_blocks(learn, (xp.ones_like(zero), zero), runs, 1, xp=xp, exact=True)
        cut = None if runs[2] is None else xp.any(runs[2], axis=2, keepdims=True)
        before = join_runs(xp, decay, left, before, cut)
    _, h = fold_blocks(emit, before, runs, 1, xp=xp, exact=True)
    h = xp.reshape(h, (batch, columns * steps, d))[:, :n, :]
    return xp.flip(h, axis=1) if reverse else h


def _gradient(
    arrays: tuple[Array | None, ...], outputs: tuple[Array, ...], grads: tuple[Array, ...], *, reverse: bool
) -> tuple[Array | None, ...]:
    """Gradients by a, b and the initial state, with the arguments of `Kernel.gradient`."""
    a, _, initial_state, resets = arrays
    return *linear_scan_gradient(a, outputs[0], initial_state, resets, grads[0], reverse=reverse), None


def linear_scan_gradient(
    a: Array, h: Array, initial_state: Array | None, resets: Array | None, grad_h: Array, /, *, reverse: bool
) -> tuple[Array, Array, Array | None]:
    """Gradients by a, b and the initial state, ∂/∂Re + i ∂/∂Im of a real loss; n ≥ 1.

        G[t] = ∂h[t] + conj(a[t+1]) G[t+1],    ∂b = G,    ∂a[t] = G[t] conj(h[t−1]),    ∂h[−1] = conj(a[0]) G[0]

    At a reset of step t, 0 stands for h[t−1], and for G[t] in G[t−1]. The gradient is itself a linear scan, so it can
    be differentiated again. Shapes: a, h and grad_h are (batch, n, d), initial_state is (batch, d) or None; h is the
    output of the scan.
    """
    xp = namespace_of(a)
    batch, _, d = a.shape
    zero = xp.zeros((batch, 1, d), dtype=a.dtype, device=place_of(a))
    start = zero if initial_state is None else xp.reshape(initial_state, (batch, 1, d))
    tail, head = slice(1, None), slice(None, -1)
    next_a = xp.concat([zero, a[:, head, :]] if reverse else [a[:, tail, :], zero], axis=1)
    previous_h = xp.concat([h[:, tail, :], start] if reverse else [start, h[:, head, :]], axis=1)
    next_resets = None
    if resets is not None:
        last = xp.zeros_like(resets[:, :1])
        next_resets = xp.concat([last, resets[:, head]] if reverse else [resets[:, tail], last], axis=1)
        next_a = started(xp, next_a, next_resets[..., None])  # it multiplies 0, and may be NaN
        previous_h = started(xp, previous_h, resets[..., None])
    G = linear_scan(_conj(next_a), grad_h, None, next_resets, reverse=not reverse)
    grad_state = None
    if initial_state is not None:
        first = a.shape[1] - 1 if reverse else 0
        grad_state = _conj(a[:, first, :]) * G[:, first, :]
        grad_state = grad_state if resets is None else started(xp, grad_state, resets[:, first, None])
    return G * _conj(previous_h), G, grad_state


def started(xp: ModuleType, h: Array, anew: Array | None) -> Array:
    """h, with 0 where the state starts anew; no value of h passes there, NaN included. None: nowhere."""
    return h if anew is None else xp.where(anew, 0.0, h)


def _conj(x: Array) -> Array:
    """conj(x) of a complex array, x of a real one: the standard defines conj for complex dtypes alone."""
    xp = namespace_of(x)
    return xp.conj(x) if xp.isdtype(x.dtype, "complex floating") else x
