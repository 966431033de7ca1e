"""The linear scan in plain Array API: no loop over time steps, the same recurrence at every step.

    h[t] = a[t] h[t−1] + b[t]

The sequence is cut into runs of at most `RUN` steps that advance side by side, one step of all runs at a time: first
from zero, to learn what each run leaves behind and the product of its factors; then, from the right initial states,
with output. Between the two passes a scan of logarithmic depth joins the runs.
"""

from __future__ import annotations

from array_api_compat import array_namespace, device

from subquad._blocks import scan_blocks
from subquad._dispatch import Array, kernel
from subquad.kernels._runs import cut_runs, join_runs, run_sizes

RUN = 16  # steps of a run: the length of the loop over steps, twice; the joining costs log₂(n / RUN) / RUN of a pass


@kernel
def linear_scan(a: Array, b: Array, initial_state: Array | None, /, *, reverse: bool) -> Array:
    """h of checked arrays of one dtype: a, b, h are (batch, n, d), initial_state (batch, d)."""
    xp = array_namespace(a)
    batch, n, d = b.shape
    if n == 0:
        return b
    if initial_state is None:
        initial_state = xp.zeros((batch, d), dtype=b.dtype, device=device(b))
    if reverse:
        a, b = (xp.flip(x, axis=1) for x in (a, b))
    columns, steps = run_sizes(n, RUN)
    # a padded step has a = b = 0; it is behind the end, and no run comes after it
    runs = [cut_runs(xp, x, columns, steps) for x in (a, b)]

    def learn(carry: tuple[Array, Array], a: Array, b: Array) -> tuple[tuple[Array, Array], None]:
        decay, h = carry
        return (a * decay, a * h + b), None

    def emit(h: Array, a: Array, b: Array) -> tuple[Array, Array]:
        h = a * h + b
        return h, h

    before = xp.reshape(initial_state, (batch, 1, 1, d))
    if columns > 1:
        zero = xp.zeros((batch, columns, 1, d), dtype=b.dtype, device=device(b))
        (decay, left), _ = scan_blocks(learn, (xp.ones_like(zero), zero), runs, 1, xp=xp, exact=True)
        before = join_runs(xp, decay, left, before)
    _, h = scan_blocks(emit, before, runs, 1, xp=xp, exact=True)
    h = xp.reshape(h, (batch, columns * steps, d))[:, :n, :]
    return xp.flip(h, axis=1) if reverse else h
