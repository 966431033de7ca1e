"""The selective scan in plain Array API, without a Python loop over all n time steps.

    h[t] = exp(Δ[t] A) h[t−1] + Δ[t] B[t] u[t],    y[t] = C[t]·h[t] + D u[t]    (2 Re(C[t]·h[t]) for complex A)

A span of the sequence is cut into `columns` equal runs. All runs advance together, one step at a time, in two passes.
The first pass starts every run from 0 and finds its last state; a scan of log₂(columns) steps then joins the runs,
which gives the state before each of them; the second pass starts from these and gives the output. No array of size
(n, d, d_state) exists.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import fold_blocks, rows_per_block
from subquad.core.dtypes import cast, is_half
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.kernels.parallel_prefix import cut_runs, join_runs
from subquad.kernels.sigmoid import sigmoid

RUN = 32  # steps of a run: each span loops over them twice
# Target size of the states of all runs together: large enough that arithmetic outweighs the calls of each step.
STEP_ELEMENTS = 2**15


class Inputs(NamedTuple):
    """The inputs of the scan in the order of its arguments; an optional input may be None."""

    u: Array
    delta: Array
    A: Array
    B: Array
    C: Array
    D: Array | None
    z: Array | None
    delta_bias: Array | None
    initial_state: Array | None
    resets: Array | None = None


class Gradients(Inputs):
    """The gradient of a loss by each input; None for an input that is None, and for `resets`."""


def outputs(*arrays: Array, delta_softplus: bool, reverse: bool) -> tuple[Like, ...]:
    """Shapes and dtypes of the outputs of `selective_scan`: y and the last state."""
    u, _, A, *_ = arrays
    return Like(tuple(u.shape), u.dtype), Like((u.shape[0], *A.shape), A.dtype)


@kernel(outputs=outputs)
def selective_scan(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    delta_bias: Array | None,
    initial_state: Array | None,
    resets: Array | None,
    /,
    *,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Array, Array]:
    """(y, last state) of checked arrays: y is real, the state has the dtype of A.

        u, delta, z     (batch, n, d)
        A               (d, d_state), real or complex
        B, C            (batch or 1, n, groups, d_state), or (d, d_state) if constant
        D, delta_bias   (d,)
        initial_state   (batch, d, d_state)
        resets          (batch, n), bool

    Before a step whose reset is True, 0 takes the place of the state, by selection: no value, NaN included, passes it.
    u, delta and z may all be of one half-precision dtype, and B and C then too. The computation is in float32 or wider;
    the generic form returns y in the dtype of u, an override may return it wider.
    """
    xp, stored = namespace_of(u), u.dtype
    u, delta, A, B, C, D, z, delta_bias, initial_state, resets = widened(
        xp, Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state, resets)
    )
    batch, n, d = u.shape
    state = initial_state
    if state is None:
        state = xp.zeros((batch, d, A.shape[-1]), dtype=A.dtype, device=place_of(u))
    if n == 0:
        return u, state
    delta = step_sizes(xp, delta, delta_bias, delta_softplus)
    rows = [u, delta, *(_as_rows(xp, x) for x in (B, C)), None if resets is None else resets[..., None]]
    if reverse:
        rows = [None if x is None else xp.flip(x, axis=-2) for x in rows]

    def advance(state: Array, *span: Array | None) -> tuple[Array, Array]:
        return _span(xp, state, A, B, C, span)

    width = batch * d * A.shape[-1] * backend_of(xp).items_behind(u, delta, A, B)
    columns = max(1, min(64, STEP_ELEMENTS // max(1, width)))
    state, y = fold_blocks(advance, state, rows, RUN * columns, xp=xp)
    if reverse:
        y = xp.flip(y, axis=-2)
    return cast(xp, skip_and_gate(xp, y, u, D, z), stored), state


def widened(xp: ModuleType, inputs: Inputs) -> Inputs:
    """The inputs with half precision cast to float32, in which the scan computes; inputs of other dtypes stay."""
    stored = inputs.u.dtype
    if not is_half(xp, stored):
        return inputs
    return Inputs(*(cast(xp, x, xp.float32) if x is not None and x.dtype == stored else x for x in inputs))


def step_sizes(
    xp: ModuleType, delta: Array, delta_bias: Array | None, softplus: bool, limits: tuple[float, float] | None = None
) -> Array:
    """Δ = delta + delta_bias, then, with `softplus`, max(x, 0) + log1p(exp(−|x|)) of it, which cannot overflow.

    At last Δ is clipped to the `limits` (low, high).
    """
    if delta_bias is not None:
        delta = delta + delta_bias
    if softplus:
        positive = delta > 0
        small = xp.where(positive, -delta, delta)
        delta = xp.where(positive, delta, 0.0) + xp.log1p(xp.exp(small))
    return delta if limits is None else xp.clip(delta, *limits)


def skip_and_gate(xp: ModuleType, y: Array, u: Array, D: Array | None, z: Array | None) -> Array:
    """(y + D u) silu(z); D or z may be None, which leaves out its factor or term."""
    if D is not None:
        y = y + D * u
    return y if z is None else _gated(xp, y, z)


def _gated(xp: ModuleType, y: Array, z: Array) -> Array:
    """y silu(z) of arrays (batch, n, ...); on a library that fills in place, no temporary is as large as they are."""
    if y.shape != z.shape or y.ndim < 3 or not backend_of(xp).fills_in_place:
        return y * z * sigmoid(xp, z)
    batch, n, *tail = y.shape
    width = math.prod(tail)
    rows = [xp.reshape(x, (batch, n, width)) for x in (y, z)]
    size = rows_per_block(batch * width)
    _, out = fold_blocks(lambda carry, y, z: (carry, y * z * sigmoid(xp, z)), None, rows, size, xp=xp)
    return xp.reshape(out, y.shape)


def read_out(xp: ModuleType, h: Array, C: Array, is_complex: bool) -> Array:
    """C·h, summed over the state axis; 2 Re(C·h) if A is complex."""
    if not is_complex:
        return xp.sum(h * C, axis=-1)
    return 2 * xp.real(xp.sum(h * C, axis=-1))


def spread_groups(xp: ModuleType, x: Array, d: int) -> Array:
    """Repeat (..., groups, d_state) to (..., d, d_state): channel c reads group c // (d / groups).

    One group stays as it is, (..., 1, d_state), and broadcasts.
    """
    groups = x.shape[-2]
    return x if groups in (1, d) else xp.repeat(x, d // groups, axis=-2)


def _as_rows(xp: ModuleType, x: Array) -> Array | None:
    """Reshape maps (batch, n, groups, d_state) to rows (batch, n, groups · d_state); None for a constant map."""
    return None if x.ndim == 2 else xp.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3]))


def _maps_of_step(xp: ModuleType, maps: Array, rows: Array | None, d: int) -> Array:
    """B or C at one step of every run, (batch or 1, columns, d or 1, d_state), cut from `rows`; `maps` if constant."""
    if rows is None:
        return maps
    return spread_groups(xp, xp.reshape(rows, (*rows.shape[:2], *maps.shape[-2:])), d)


def _span(xp: ModuleType, state: Array, A: Array, B: Array, C: Array, span: tuple[Any, ...]) -> tuple[Array, Array]:
    """(state after a span, output of the span), where `span` holds rows of u, delta, B, C and resets."""
    batch, n, d = span[0].shape
    columns, steps = backend_of(xp).run_sizes(n, RUN)
    # a padded step has Δ = 0: the state passes through it unchanged
    runs = [None if x is None else cut_runs(xp, x, columns, steps) for x in span]
    is_complex = xp.isdtype(A.dtype, "complex floating")

    def advanced(h: Array, u: Array, delta: Array, B_rows: Array | None, anew: Array | None) -> Array:
        size = xp.matrix_transpose(delta)
        h = h if anew is None else xp.where(anew, 0.0, h)
        return xp.exp(size * A) * h + _maps_of_step(xp, B, B_rows, d) * (size * xp.matrix_transpose(u))

    def learn(
        h: Array, u: Array, delta: Array, B_rows: Array | None, _: Array | None, anew: Array | None
    ) -> tuple[Array, None]:
        return advanced(h, u, delta, B_rows, anew), None

    def emit(
        h: Array, u: Array, delta: Array, B_rows: Array | None, C_rows: Array | None, anew: Array | None
    ) -> tuple[Array, Array]:
        h = advanced(h, u, delta, B_rows, anew)
        y = read_out(xp, h, _maps_of_step(xp, C, C_rows, d), is_complex)
        return h, xp.expand_dims(y, axis=-2)

    before = xp.expand_dims(state, axis=1)
    if columns > 1:
        zero = xp.zeros((batch, columns, *state.shape[1:]), dtype=state.dtype, device=place_of(state))
        left, _ = fold_blocks(learn, zero, runs, 1, xp=xp, exact=True)
        total = xp.matrix_transpose(xp.sum(runs[1], axis=-2, keepdims=True))
        cut = None if runs[4] is None else xp.any(runs[4], axis=-2, keepdims=True)
        total = total if cut is None else xp.where(cut, 0.0, total)
        before = join_runs(xp, xp.exp(total * A), left, before, cut)
    h, y = fold_blocks(emit, before, runs, 1, xp=xp, exact=True)
    return h[:, -1, ...], xp.reshape(y, (batch, columns * steps, d))[:, :n, :]
