"""The selective scan in plain Array API: no loop over time steps, the same recurrence at every step.

    h[t] = exp(Δ[t] A) h[t−1] + Δ[t] B[t] u[t],    y[t] = C[t]·h[t] + D u[t]    (2 Re(C[t]·h[t]) for complex A)

A span of the sequence is cut into `columns` equal runs that advance side by side, one step of all runs at a time:
first from zero, to learn what each run leaves behind; then, from the right initial states, with output. Between the
two passes a scan of log₂(columns) steps joins the runs. Nothing of size (n, d, d_state) is ever held.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from array_api_compat import array_namespace, device

from subquad._blocks import BLOCK_ELEMENTS, scan_blocks
from subquad._dispatch import Array, kernel

RUN = 32  # steps of a run: the length of the unrolled loop, twice per span


@kernel
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
    /,
    *,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Array, Array]:
    """(y, last state) of checked arrays: u, delta, z (batch, n, d); B, C (batch or 1, n, groups, d_state) or (d, d_state);
    initial_state (batch, d, d_state). y is real, the state has the dtype of A.
    """
    xp = array_namespace(u)
    batch, n, d = u.shape
    state = initial_state
    if state is None:
        state = xp.zeros((batch, d, A.shape[-1]), dtype=A.dtype, device=device(u))
    if n == 0:
        return u, state
    delta = step_sizes(xp, delta, delta_bias, delta_softplus)
    rows = [u, delta, *(_as_rows(xp, x) for x in (B, C))]
    if reverse:
        rows = [None if x is None else xp.flip(x, axis=-2) for x in rows]

    def advance(state: Array, u: Array, delta: Array, B_rows: Array, C_rows: Array) -> tuple[Array, Array]:
        return _span(xp, state, u, delta, A, _Maps(xp, B, B_rows, d), _Maps(xp, C, C_rows, d))

    columns = max(1, min(64, BLOCK_ELEMENTS // (batch * d * A.shape[-1])))
    state, y = scan_blocks(advance, state, rows, RUN * columns, xp=xp)
    if reverse:
        y = xp.flip(y, axis=-2)
    return skip_and_gate(xp, y, u, D, z), state


def step_sizes(xp: ModuleType, delta: Array, delta_bias: Array | None, softplus: bool) -> Array:
    """Δ, after the bias and softplus(x) = max(x, 0) + log1p(exp(−|x|))."""
    if delta_bias is not None:
        delta = delta + delta_bias
    if softplus:
        positive = delta > 0
        small = xp.where(positive, -delta, delta)
        delta = xp.where(positive, delta, 0.0) + xp.log1p(xp.exp(small))
    return delta


def skip_and_gate(xp: ModuleType, y: Array, u: Array, D: Array | None, z: Array | None) -> Array:
    """(y + D u) silu(z)."""
    if D is not None:
        y = y + D * u
    if z is not None:
        e = xp.exp(xp.where(z > 0, -z, z))  # never overflows
        y = y * z * (xp.where(z > 0, xp.ones_like(e), e) / (1 + e))
    return y


def read_out(xp: ModuleType, h: Array, C: Array, is_complex: bool) -> Array:
    """C·h over the state axis; 2 Re of it for a complex A."""
    if not is_complex:
        return xp.sum(h * C, axis=-1)
    return 2 * xp.real(xp.sum(h * C, axis=-1))


class _Maps:
    """B or C of a span by position: (columns of one step) → (batch or 1, columns, d or 1, d_state)."""

    def __init__(self, xp: ModuleType, full: Array, rows: Array | None, d: int) -> None:
        self.xp, self.rows, self.d = xp, rows, d
        self.constant = full if rows is None else None
        self.groups = None if rows is None else full.shape[-2]

    def at(self, columns: list[Any]) -> Array:
        """The maps of one step of every run; `columns` selects its rows."""
        if self.constant is not None:
            return self.constant
        x = self.rows[tuple(columns)]
        shape = (*x.shape[:-1], self.groups, x.shape[-1] // self.groups)
        return spread_groups(self.xp, self.xp.reshape(x, shape), self.d)


def spread_groups(xp: ModuleType, x: Array, d: int) -> Array:
    """(..., groups, d_state) → (..., d or 1, d_state): channel c reads group c // (d / groups)."""
    groups = x.shape[-2]
    return x if groups in (1, d) else xp.repeat(x, d // groups, axis=-2)


def _as_rows(xp: ModuleType, x: Array) -> Array | None:
    """(batch, n, groups, d_state) → (batch, n, groups · d_state); None for a constant map."""
    return None if x.ndim == 2 else xp.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3]))


def _span(
    xp: ModuleType, state: Array, u: Array, delta: Array, A: Array, B: _Maps, C: _Maps
) -> tuple[Array, Array]:
    """Output of a span of rows and the state after it."""
    batch, n, d = u.shape
    columns = -(-n // RUN) if n > RUN else 1
    steps = -(-n // columns)
    columns = -(-n // steps)
    ragged = columns * steps - n
    # a padded step has Δ = 0: the state passes through it unchanged
    u, delta = (_runs(xp, x, columns, steps, ragged) for x in (u, delta))
    for maps in (B, C):
        if maps.rows is not None:
            maps.rows = _runs(xp, maps.rows, columns, steps, ragged)
    is_complex = xp.isdtype(A.dtype, "complex floating")

    def step(h: Array | None, t: int) -> Array:
        at = [slice(None), slice(None), t, slice(None)]
        size = xp.expand_dims(delta[:, :, t, :], axis=-1)
        drive = B.at(at) * (size * xp.expand_dims(u[:, :, t, :], axis=-1))
        return drive if h is None else xp.exp(size * A) * h + drive

    if columns > 1:
        h = None
        for t in range(steps):
            h = step(h, t)
        total = xp.expand_dims(xp.sum(delta, axis=-2), axis=-1)
        state = _join(xp, xp.exp(total * A), h, state)  # the state before every run
    else:
        state = xp.expand_dims(state, axis=1)
    h, ys = state, []
    for t in range(steps):
        h = step(h, t)
        ys.append(read_out(xp, h, C.at([slice(None), slice(None), t, slice(None)]), is_complex))
    y = xp.reshape(xp.stack(ys, axis=2), (batch, columns * steps, d))
    return h[:, -1, ...], y[:, :n, :]


def _runs(xp: ModuleType, x: Array, columns: int, steps: int, ragged: int) -> Array:
    """(batch, n, ·) → (batch, columns, steps, ·), zeros behind the end."""
    if ragged:
        zeros = xp.zeros((x.shape[0], ragged, x.shape[-1]), dtype=x.dtype, device=device(x))
        x = xp.concat([x, zeros], axis=1)
    return xp.reshape(x, (x.shape[0], columns, steps, x.shape[-1]))


def _join(xp: ModuleType, decay: Array, left: Array, initial: Array) -> Array:
    """The state before each run from what every run does: h ← decay h + left. Log-depth; no division."""
    initial = xp.expand_dims(initial, axis=1)
    a, b = decay[:, :-1, ...], left[:, :-1, ...]
    b = xp.concat([initial, b], axis=1)  # the initial state acts as a run before the first
    a = xp.concat([xp.zeros_like(initial), a], axis=1)
    for reach in (1 << i for i in range(math.ceil(math.log2(a.shape[1])))):
        b = xp.concat([b[:, :reach, ...], a[:, reach:, ...] * b[:, :-reach, ...] + b[:, reach:, ...]], axis=1)
        a = xp.concat([a[:, :reach, ...], a[:, reach:, ...] * a[:, :-reach, ...]], axis=1)
    return b
