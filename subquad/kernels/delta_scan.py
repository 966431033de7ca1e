"""The scan of the delta rule in plain Array API, in chunks of matrix products (the WY form of a chunk).

    S[t] = (I − β[t] k[t] k[t]ᵀ) diag(w[t]) S[t−1] + β[t] k[t] v[t]ᵀ        with beta
    S[t] = (diag(w[t]) + b[t] a[t]ᵀ) S[t−1] + k[t] v[t]ᵀ                    with a and b
    o[t] = scale S[t]ᵀ q[t],    w[t] = exp(g[t])

A step adds k[t] x[t]ᵀ to the decayed state, with x[t] = β[t] (v[t] − S[t−1]ᵀ (w[t] ∘ k[t])), or it adds
b[t] u[t]ᵀ + k[t] v[t]ᵀ, with u[t] = S[t−1]ᵀ a[t]. Within a chunk that begins with the state S₀, the rows x (or u) solve
a triangular system: with w(s, t) = w[s+1] ∘ … ∘ w[t],

    (I − M) X = R,    M[t, s] = −β[t] Σᵢ k[t] k[s] w(s, t),    R[t] = β[t] (v[t] − S₀ᵀ (w(−1, t) ∘ k[t]))

and outputs and state are matrix products of X. Logarithms of decays are summed from step to step and never subtracted:
a decay may be 0 (g = −∞), and no product of decays is divided by.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, NamedTuple

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import fold_blocks
from subquad.core.dtypes import common_dtype, compute_dtype
from subquad.core.kernel import kernel

CHUNK = 64  # steps of a chunk, for which the products of pairs of steps cost about as much as those with the state
CHANNEL_CHUNK = 16  # with a decay for each channel, where each pair of steps has d decays of its own


def outputs(*arrays: Array, scale: float, reverse: bool) -> tuple[Like, ...]:
    """Shapes and dtypes of the outputs of `delta_scan`: o and the last state."""
    q, k, v, *_ = arrays
    (batch, _, heads, d), xp = q.shape, namespace_of(q)
    state = Like((batch, heads, d, v.shape[-1]), compute_dtype(xp, q, k, v))
    return Like(tuple(v.shape), common_dtype(xp, q, k, v)), state


@kernel(outputs=outputs, reads_half=True)
def delta_scan(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    beta: Array | None,
    a: Array | None,
    b: Array | None,
    initial_state: Array | None,
    resets: Array | None,
    /,
    *,
    scale: float,
    reverse: bool,
) -> tuple[Array, Array]:
    """(o, last state) of checked arrays of one dtype, float32 or wider; either `beta`, or `a` and `b`.

        q, k, a, b      (batch, n, heads, d)
        v, o            (batch, n, heads, d_v)
        g               (batch, n, heads, d or 1), logarithm of the decay, or None: no decay
        beta            (batch, n, heads)
        initial_state   (batch, heads, d, d_v) or None
        resets          (batch, n), bool, or None: the state starts from 0 before a step where it is True

    Arrays over time may have half precision in place of float32; o has it if q, k and v have the same. With `reverse`,
    time runs from the end. A number that is not finite makes the outputs NaN that depend on it, and
    changes no other. Finite numbers whose products overflow may reach all of their chunk here, past a reset too.
    """
    xp, n = namespace_of(q), q.shape[1]
    made = outputs(q, k, v, scale=scale, reverse=reverse)
    state = initial_state
    if state is None:
        state = xp.zeros(made[1].shape, dtype=made[1].dtype, device=place_of(q))
    if n == 0:
        return v, state
    rows = [None if x is None else xp.permute_dims(x, (0, 2, 1, 3)) for x in (q, k, v, g, a, b)]
    rows.append(None if beta is None else xp.expand_dims(xp.permute_dims(beta, (0, 2, 1)), axis=-1))
    rows.append(None if resets is None else xp.reshape(resets, (resets.shape[0], 1, n, 1)))
    if reverse:
        rows = [None if x is None else xp.flip(x, axis=-2) for x in rows]

    def advance(state: Array, *span: Array | None) -> tuple[Array, Array]:
        return _chunk(xp, state, Steps(*span), scale)

    size = CHUNK if g is None or g.shape[-1] == 1 else CHANNEL_CHUNK
    state, o = fold_blocks(advance, state, rows, size, xp=xp, exact=True)
    if reverse:
        o = xp.flip(o, axis=-2)
    return xp.permute_dims(o, (0, 2, 1, 3)), state


class Steps(NamedTuple):
    """The arrays of a chunk, (batch, heads, steps, ·); `resets` has one head."""

    q: Array
    k: Array
    v: Array
    g: Array | None
    a: Array | None
    b: Array | None
    beta: Array | None
    resets: Array | None


def _chunk(xp: ModuleType, state: Array, steps: Steps, scale: float) -> tuple[Array, Array]:
    """(state after a chunk, output of its steps)."""
    sees, from_start = _visible(xp, steps)
    lost, lost_state = _lost(xp, state, steps, sees, from_start)
    state, q, k, v, a, b, beta = (
        None if x is None else xp.where(xp.isfinite(x), x, 0.0)
        for x in (state, steps.q, steps.k, steps.v, steps.a, steps.b, steps.beta)
    )
    g = steps.g if steps.g is None else xp.where(_is_decay(xp, steps.g), steps.g, 0.0)
    decay = Decays(xp, g, sees, from_start)
    if beta is not None:
        M = xp.where(decay.before, -beta * decay.pairs(k, k), 0.0)
        X = _unit_inverse(xp, M) @ (beta * (v - decay.since_start(k) @ state))
        o = decay.since_start(q) @ state + decay.pairs(q, k) @ X
        state = decay.whole(state) + xp.matrix_transpose(decay.to_end(k)) @ X
    else:
        assert a is not None
        assert b is not None
        M = decay.pairs(a, b, late=1)
        U = _unit_inverse(xp, M) @ (decay.since_start(a, late=1) @ state + decay.pairs(a, k, late=1) @ v)
        o = decay.since_start(q) @ state + decay.pairs(q, b) @ U + decay.pairs(q, k) @ v
        state = decay.whole(state) + xp.matrix_transpose(decay.to_end(b)) @ U + xp.matrix_transpose(decay.to_end(k)) @ v
    return xp.where(lost_state, math.nan, state), xp.where(lost, math.nan, scale * o)


class Decays:
    """The decays w(s, t) between the steps of a chunk, 0 where step t does not see step s.

    `late` 1 takes the decay only up to the step before t, as the state has it that step t finds, and leaves out s = t.
    """

    def __init__(self, xp: ModuleType, g: Array | None, sees: Array, from_start: Array) -> None:
        self.xp, self.g, self.sees, self.from_start = xp, g, sees, from_start
        count = sees.shape[-1]
        step = xp.arange(count, device=place_of(sees))
        self.before = sees & (xp.expand_dims(step, axis=-1) > step)
        if g is None:
            return
        after = xp.expand_dims(xp.expand_dims(step, axis=-1) > step, axis=-1)
        # sums[t, s] = g[s+1] + … + g[t]
        sums = xp.cumulative_sum(xp.where(after, xp.expand_dims(g, axis=-2), 0.0), axis=-3)
        none = xp.zeros_like(sums[..., :1, :, :])
        self.between = [
            xp.exp(xp.where(xp.expand_dims(seen, axis=-1), x, -math.inf))
            for seen, x in ((sees, sums), (self.before, xp.concat([none, sums[..., :-1, :, :]], axis=-3)))
        ]
        totals = xp.cumulative_sum(g, axis=-2)
        found = xp.concat([xp.zeros_like(totals[..., :1, :]), totals[..., :-1, :]], axis=-2)
        self.start = [xp.exp(xp.where(from_start, x, -math.inf)) for x in (totals, found)]

    def pairs(self, rows: Array, columns: Array, late: int = 0) -> Array:
        """Σᵢ rows[t, i] columns[s, i] w(s, t)[i], (…, t, s)."""
        xp = self.xp
        if self.g is None:
            return xp.where(self.before if late else self.sees, rows @ xp.matrix_transpose(columns), 0.0)
        between = self.between[late]
        if between.shape[-1] == 1:
            return rows @ xp.matrix_transpose(columns) * between[..., 0]
        decayed = between * xp.expand_dims(columns, axis=-3)
        return (decayed @ xp.expand_dims(rows, axis=-1))[..., 0]

    def since_start(self, rows: Array, late: int = 0) -> Array:
        """rows[t] ∘ w(−1, t), and 0 where step t does not see the state before the chunk."""
        return self.xp.where(self.from_start, rows, 0.0) if self.g is None else rows * self.start[late]

    def to_end(self, rows: Array) -> Array:
        """rows[s] ∘ w(s, last), and 0 where the last step does not see step s."""
        if self.g is None:
            return self.xp.where(self.xp.matrix_transpose(self.sees[..., -1:, :]), rows, 0.0)
        return rows * self.between[0][..., -1, :, :]

    def whole(self, state: Array) -> Array:
        """The state before the chunk, decayed to its end; 0 if the last step does not see it."""
        if self.g is None:
            return self.xp.where(self.from_start[..., -1:, :], state, 0.0)
        return self.xp.matrix_transpose(self.start[0][..., -1:, :]) * state


def _visible(xp: ModuleType, steps: Steps) -> tuple[Array, Array]:
    """Whether step t sees what step s ≤ t added (…, t, s), and whether it sees the state before the chunk (…, t, 1)."""
    count, where = steps.q.shape[-2], place_of(steps.q)
    step = xp.arange(count, device=where)
    past = xp.expand_dims(step, axis=-1) >= step
    if steps.resets is None:
        return past, xp.ones((count, 1), dtype=xp.bool, device=where)
    number = xp.cumulative_sum(xp.astype(steps.resets, xp.int32), axis=-2)  # of resets up to a step
    return past & (number == xp.matrix_transpose(number)), number == 0


def _lost(xp: ModuleType, state: Array, steps: Steps, sees: Array, from_start: Array) -> tuple[Array, Array]:
    """Where outputs (…, steps, d_v) and the state after the chunk (…, 1, d_v) depend on a number that is not finite.

    A product with 0 would carry such a number to outputs that do not depend on it: to earlier steps, and past a reset.
    """

    def bad(x: Array) -> Array:
        """Whether a row has a number that is not finite, (…, steps, 1)."""
        return xp.any(~xp.isfinite(x), axis=-1, keepdims=True)

    of_row = bad(steps.k)
    for x in (steps.a, steps.b, steps.beta):
        of_row = of_row if x is None else of_row | bad(x)
    if steps.g is not None:
        of_row = of_row | xp.any(~_is_decay(xp, steps.g), axis=-1, keepdims=True)
    added = of_row | ~xp.isfinite(steps.v)
    before = xp.any(~xp.isfinite(state), axis=-2, keepdims=True)
    reached = xp.astype(sees, state.dtype) @ xp.astype(added, state.dtype) > 0
    lost = reached | (from_start & before)
    return lost | bad(steps.q), lost[..., -1:, :]


def _is_decay(xp: ModuleType, g: Array) -> Array:
    """Whether the logarithms are finite, or −∞, the logarithm of the decay 0."""
    return xp.isfinite(g) | (g == -math.inf)


def _unit_inverse(xp: ModuleType, M: Array) -> Array:
    """(I − M)⁻¹ of strictly lower triangular matrices, by halves: each merge joins the inverses of two blocks.

        [A    ]⁻¹   [A⁻¹           ]
        [−B  D]   = [D⁻¹ B A⁻¹  D⁻¹]

    Powers of M, which would need no blocks, grow like binomial coefficients for keys that are alike.
    """
    size, step = M.shape[-1], xp.arange(M.shape[-1], device=place_of(M))
    inverse: Any = xp.eye(size, dtype=M.dtype, device=place_of(M))
    width = 1
    while width < size:
        block = step // width
        row = xp.expand_dims(block, axis=-1)
        corner = xp.where((row % 2 == 1) & (row == block + 1), M, 0.0)
        inverse = inverse + (corner if width == 1 else inverse @ corner @ inverse)
        width *= 2
    return inverse
