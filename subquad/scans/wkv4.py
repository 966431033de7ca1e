"""The recurrence of RWKV-4: averages of values, weighed by exp(k) and forgotten at a rate for each channel.

    wkv[t] = (Σ_{s<t} exp((t−1−s) w + k[s]) v[s] + exp(u + k[t]) v[t]) / (Σ_{s<t} exp((t−1−s) w + k[s]) + exp(u + k[t]))

Sums are kept relative to exp(P[t]), where P[t] = max over s ≤ t of (t−s) w + k[s] is the largest exponent: they are
then linear scans of factors at most 1, and the term of the largest exponent is 1, so that no divisor vanishes.
"""

from __future__ import annotations

from types import ModuleType

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.block_loop import fold_blocks
from subquad.kernels.linear_scan import linear_scan

BLOCK = 256  # steps that are computed together: their largest exponents take log₂ of that many passes
LOWEST = -1e38  # the largest exponent of no token, within the range of float32


def wkv4(
    xp: ModuleType, k: Array, v: Array, w: Array, u: Array, state: Array | None, resets: Array | None,
    mask: Array | None, *, implementation: str,
) -> tuple[Array, Array]:  # fmt: skip
    """(wkv, last state) of k and v (batch, n, d), w and u (d,), the state (batch, 3, d), resets and mask (batch, n).

    The state has the rows Σ exp(k − P) v, Σ exp(k − P) and P. Where `mask` is False, k and v do not count.
    """
    batch, n, d = v.shape
    if state is None:
        zero = xp.zeros((batch, 2, d), dtype=v.dtype, device=place_of(v))
        state = xp.concat([zero, xp.full((batch, 1, d), LOWEST, dtype=v.dtype, device=place_of(v))], axis=1)
    if n == 0:
        return v, state
    counts = None if mask is None else xp.astype(xp.broadcast_to(mask[..., None], (batch, n, 1)), v.dtype)
    marks = None if resets is None else xp.astype(resets[..., None], v.dtype)

    def advance(carry: Array, k: Array, v: Array, counts: Array | None, marks: Array | None) -> tuple[Array, Array]:
        return _block(xp, carry, k, v, w, u, counts, marks, implementation)

    state, out = fold_blocks(advance, state, (k, v, counts, marks), BLOCK, xp=xp)
    return out, state


def _block(
    xp: ModuleType, carry: Array, k: Array, v: Array, w: Array, u: Array, counts: Array | None, marks: Array | None,
    implementation: str,
) -> tuple[Array, Array]:  # fmt: skip
    """(state after a block, its output); `marks` is 1 where the state starts anew, `counts` 0 at a padded step."""
    anew = None if marks is None else marks > 0
    top = largest_exponents(xp, carry[:, 2:, :], k, w, counts, marks)
    before, after = top[:, :-1, :], top[:, 1:, :]
    if anew is not None:
        before = xp.where(anew, LOWEST, before)
    # differences of exponents first: they are exact where they matter, however large the exponents are
    factors = xp.exp((w if counts is None else xp.where(counts > 0, w, 0.0)) + (before - after))
    weights = xp.exp(k - after if counts is None else xp.where(counts > 0, k - after, LOWEST))
    sums, reads = [], []
    for row, terms in enumerate((weights * v, weights)):
        start = carry[:, row, :]
        total = linear_scan(
            factors, terms, start, None if anew is None else anew[..., 0], reverse=False, implementation=implementation
        )
        read = xp.concat([start[:, None, :], total[:, :-1, :]], axis=1)
        reads.append(read if anew is None else xp.where(anew, 0.0, read))
        sums.append(total[:, -1:, :])
    lead = (before - k) - u
    past, present = xp.exp(xp.clip(lead, max=0.0)), xp.exp(xp.clip(-lead, max=0.0))
    out = (past * reads[0] + present * v) / (past * reads[1] + present)
    return xp.concat([*sums, top[:, -1:, :]], axis=1), out


def largest_exponents(
    xp: ModuleType, start: Array, k: Array, w: Array, counts: Array | None, marks: Array | None
) -> Array:
    """P[−1] = `start`, P[t] = max(P[t−1] + w, k[t]), from −1 on, (batch, n + 1, d).

    Windows of steps double in log₂ n passes, and no sum of decays is taken off again: w may be −∞. The rounding of P
    does not matter: sums are relative to whatever P comes out.
    """
    n = k.shape[1]
    passed = None  # steps that count, up to each
    if counts is not None:
        k = xp.where(counts > 0, k, LOWEST)
        passed = xp.concat([xp.zeros_like(counts[:, :1, :]), xp.cumulative_sum(counts, axis=1)], axis=1)
    top = xp.concat([start, k], axis=1)
    segment = None
    if marks is not None:
        segment = xp.concat([xp.zeros_like(marks[:, :1, :]), xp.cumulative_sum(marks, axis=1)], axis=1)
    step = 1
    while step <= n:
        earlier, decay = top[:, :-step, :], step * w
        if passed is not None:
            between = passed[:, step:, :] - passed[:, :-step, :]
            decay = xp.where(between > 0, between * w, 0.0)
        earlier = earlier + decay
        if segment is not None:
            earlier = xp.where(segment[:, step:, :] == segment[:, :-step, :], earlier, LOWEST)
        top, step = xp.concat([top[:, :step, :], xp.maximum(top[:, step:, :], earlier)], axis=1), 2 * step
    return top
