"""The scan of outer products in plain Array API: a matrix state that decays, takes in k vᵀ and is read by q.

    S[t] = diag(exp g[t]) S[t−1] + w[t] k[t] v[t]ᵀ,    o[t] = scale · S[t]ᵀ q[t] + skip ∘ v[t]

A span of the sequence is cut into chunks. Within a chunk every output is a sum over the earlier steps s of the chunk,

    o[t] = Σ_s (Σ_c q[t, c] k[s, c] exp(Σ_{s < r ≤ t} g[r, c])) w[s] v[s]

by products of matrices where g is one number per head. The exponents are sums of g between two steps, computed as sums:
no difference of long sums and no quotient of decays is taken, so that nothing overflows and g may be −∞. A loop over
the chunks of the span carries the state from one to the next.

A reset is a selection: whatever crosses it is replaced by 0 before it is multiplied, in the sums and so in the
gradients, so that no number of one segment, NaN included, reaches another.
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
from subquad.core.loading import backend_of
from subquad.kernels.not_finite import causal_product, with_care
from subquad.kernels.parallel_prefix import cut_runs

CHUNK = 64  # steps of a chunk by products of matrices: its pairs cost as much as reading the state of 64 channels
PAIRED = 16  # steps of a chunk whose pairs are formed channel by channel
SPAN_ELEMENTS = 2**18  # target size of the largest temporary of a span
MOST_CHUNKS = 64  # of a span


class Inputs(NamedTuple):
    """The inputs of the scan in the order of its arguments; those from `g` on may be None."""

    q: Array
    k: Array
    v: Array
    g: Array | None
    weight: Array | None
    bonus: Array | None
    skip: Array | None
    initial_state: Array | None
    resets: Array | None


class Sizes(NamedTuple):
    """The sizes of the inputs; `shared` heads read one group of q and k."""

    batch: int
    n: int
    groups: int
    shared: int
    d: int
    d_v: int


def outputs(*arrays: Array, scale: float, reverse: bool) -> tuple[Like, ...]:
    """Shapes and dtypes of the outputs of `outer_scan`: o and the last state."""
    q, k, v, *_ = arrays
    (batch, n, heads, d_v), xp = v.shape, namespace_of(v)
    state = Like((batch, heads, q.shape[-1], d_v), compute_dtype(xp, q, k, v))
    return Like((batch, n, heads, d_v), common_dtype(xp, q, k, v)), state


@kernel(outputs=outputs, reads_half=True)
def outer_scan(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    weight: Array | None,
    bonus: Array | None,
    skip: Array | None,
    initial_state: Array | None,
    resets: Array | None,
    /,
    *,
    scale: float,
    reverse: bool,
) -> tuple[Array, Array]:
    """(o, last state) of checked arrays of one real dtype, float32 or wider; heads share q and k in groups.

        q, k            (batch, n, groups, d); head h reads group h // (heads / groups)
        v               (batch, n, heads, d_v)
        g               (batch, n, heads, 1 or d), logarithms of the decays; None: no decay
        weight          (batch, n, heads), factors w of k vᵀ; None: 1
        bonus           (1 or batch, heads, d): then o[t] = scale · (S[t−1] + diag(bonus) w[t] k[t] v[t]ᵀ)ᵀ q[t]
        skip            (heads, 1 or d_v): factors of v that are added to o; None: 0
        initial_state   (batch, heads, d, d_v); None: 0
        resets          (batch, n), bool: the state is 0 before a step where it is True; None: nowhere

    o is (batch, n, heads, d_v) and the state (batch, heads, d, d_v). q, k, v, g and weight may have half precision in
    place of float32; o has it if q, k and v have the same. With `reverse`, time runs from the end.
    """
    xp = namespace_of(q)
    sizes = _sizes(q, v)
    batch, n, groups, shared, d, d_v = sizes
    heads = groups * shared
    state = initial_state
    if state is None:
        state = xp.zeros((batch, heads, d, d_v), dtype=v.dtype, device=place_of(v))
    if 0 in (batch, n, heads):
        return v, state
    rows = [None if x is None else xp.reshape(x, (batch, n, -1)) for x in (q, k, v, g, weight)]
    if resets is not None:
        rows.append(xp.astype(xp.expand_dims(resets, axis=-1), v.dtype))
    else:
        rows.append(None)
    if reverse:
        rows = [None if x is None else xp.flip(x, axis=1) for x in rows]
    by_channel = g is not None and g.shape[-1] > 1
    chunk = PAIRED if by_channel or resets is not None else CHUNK
    pairs = heads * chunk * chunk * (max(d, d_v) if chunk == PAIRED else 1)
    width = batch * max(pairs, heads * d * d_v) * backend_of(xp).items_behind(q, k, v)
    columns = max(1, min(MOST_CHUNKS, SPAN_ELEMENTS // max(1, width)))

    def scan(careful: bool) -> tuple[Array, Array]:
        def advance(state: Array, *span: Array | None) -> tuple[Array, Array]:
            return _span(xp, sizes, chunk, state, bonus, span, careful)

        return fold_blocks(advance, state, rows, chunk * columns, xp=xp)

    # pairs of steps are masked one by one in chunks of `PAIRED`, which need no care
    state, o = scan(False) if chunk == PAIRED or n == 1 else with_care(xp, scan, q, k, v, g, weight, state)
    if reverse:
        o = xp.flip(o, axis=1)
    o = xp.reshape(o, (batch, n, heads, d_v))
    if scale != 1:
        o = o * scale
    return o if skip is None else o + skip * v, state


def _sizes(q: Array, v: Array) -> Sizes:
    batch, n, heads, d_v = v.shape
    groups, d = q.shape[-2:]
    return Sizes(batch, n, groups, heads // groups, d, d_v)


class Chunks(NamedTuple):
    """The chunks of a span, axes (batch, chunks, groups, heads of a group, steps, width); q and k have 1 such head."""

    q: Array
    k: Array
    v: Array  # times the weights
    g: Array | None
    segment: Array | None  # (batch, chunks, 1, 1, steps): resets up to and including a step, from the chunk's first


def _span(
    xp: ModuleType, sizes: Sizes, chunk: int, state: Array, bonus: Array | None, span: tuple[Any, ...], careful: bool
) -> tuple[Array, Array]:
    """(state after a span, output of the span (batch, n, heads · d_v))."""
    batch, _, groups, shared, d, d_v = sizes
    n = span[0].shape[1]
    columns, steps = backend_of(xp).run_sizes(n, chunk, chunks=True)
    # a padded step has k = v = g = 0: the state passes through it unchanged
    runs = [None if x is None else cut_runs(xp, x, columns, steps) for x in span]

    def split(x: Array | None, heads: int) -> Array | None:
        if x is None:
            return None
        x = xp.reshape(x, (batch, columns, steps, groups, heads, -1))
        return xp.permute_dims(x, (0, 1, 3, 4, 2, 5))

    q, k, v, g, weight = (split(x, heads) for x, heads in zip(runs, (1, 1, shared, shared, shared), strict=False))
    if weight is not None:
        v = weight * v
    segment = runs[5]
    if segment is not None:
        segment = xp.reshape(xp.cumulative_sum(segment, axis=2), (batch, columns, 1, 1, steps))
    chunks = Chunks(q, k, v, g, segment)
    lag = 0 if bonus is None else 1  # with a bonus, a step reads the state before it
    own = _within(xp, chunks, lag, careful)
    if bonus is not None:
        bonus = xp.reshape(bonus, (bonus.shape[0], 1, groups, shared, 1, d))
        own = own + xp.sum(q * bonus * k, axis=-1, keepdims=True) * v
    decay, left, cut = _effect(xp, chunks)
    before, state = _carry(xp, state, decay, left, cut)
    before = xp.reshape(before, (batch, columns, groups, shared, d, d_v))
    o = own + _read(xp, chunks, before, lag)
    o = xp.reshape(xp.permute_dims(o, (0, 1, 4, 2, 3, 5)), (batch, columns * steps, groups * shared * d_v))
    return state, o[:, :n, :]


def _within(xp: ModuleType, c: Chunks, lag: int, careful: bool) -> Array:
    """The part of the outputs that comes from steps of the same chunk; `careful` as in `with_care`."""
    steps, place = c.q.shape[-2], place_of(c.q)
    t = xp.arange(steps, device=place)
    seen = t[:, None] - lag >= t[None, :]  # row t reads column s
    if c.segment is not None:
        seen = seen & (c.segment[..., :, None] == c.segment[..., None, :])
    between = None if c.g is None else _between(xp, c.g, lag)
    if c.segment is None and (c.g is None or c.g.shape[-1] == 1):
        scores = c.q @ xp.matrix_transpose(c.k)
        if between is not None:
            scores = scores * xp.exp(xp.where(seen, xp.reshape(between, between.shape[:-1]), -math.inf))
        scores = xp.where(seen, scores, 0.0)
        return causal_product(xp, lambda v: scores @ v, c.v, -2, lag) if careful else scores @ c.v
    seen = seen[..., None]
    q, k, v = (xp.where(seen, x, 0.0) for x in (c.q[..., :, None, :], c.k[..., None, :, :], c.v[..., None, :, :]))
    products = q * k
    if between is not None:
        products = products * xp.exp(xp.where(seen, between, -math.inf))
    return xp.sum(xp.sum(products, axis=-1, keepdims=True) * v, axis=-2)


def _between(xp: ModuleType, g: Array, lag: int) -> Array:
    """Σ_{s < r ≤ t − lag} g[r] for rows t and columns s, (..., steps, steps, width); of no use where t − lag < s.

    The sums run down the columns of a matrix in which g[r] stands in row r + lag of every column s < r.
    """
    steps = g.shape[-2]
    t = xp.arange(steps, device=place_of(g))
    later = (t[:, None] - lag > t[None, :])[..., None]
    g = _moved(xp, g, lag)
    return xp.cumulative_sum(xp.where(later, g[..., :, None, :], 0.0), axis=-3)


def _moved(xp: ModuleType, x: Array, by: int) -> Array:
    """x, `by` steps later (earlier if negative), filled with 0."""
    if by == 0:
        return x
    zero = xp.zeros_like(x[..., : abs(by), :])
    return xp.concat([zero, x[..., :-by, :]] if by > 0 else [x[..., -by:, :], zero], axis=-2)


def _effect(xp: ModuleType, c: Chunks) -> tuple[Array | None, Array, Array | None]:
    """What each chunk does to the state before it: its decay (..., d or 1, 1), what it adds (..., d, d_v), and whether
    a reset cuts it off."""
    k, v, g, cut, alive = c.k, c.v, c.g, None, None
    if c.segment is not None:
        alive = (c.segment == c.segment[..., -1:])[..., None]  # no reset follows
        cut = (c.segment[..., -1] > 0)[..., None, None]
        k, v = xp.where(alive, k, 0.0), xp.where(alive, v, 0.0)
    if g is None:
        return None, xp.matrix_transpose(k) @ v, cut
    after = xp.flip(xp.cumulative_sum(xp.flip(_moved(xp, g, -1), axis=-2), axis=-2), axis=-2)
    total = xp.sum(g, axis=-2, keepdims=True)
    if alive is not None:
        after, total = xp.where(alive, after, 0.0), xp.where(cut, 0.0, total)
    return xp.matrix_transpose(xp.exp(total)), xp.matrix_transpose(k * xp.exp(after)) @ v, cut


def _carry(xp: ModuleType, state: Array, decay: Array | None, left: Array, cut: Array | None) -> tuple[Array, Array]:
    """(the state before each chunk (batch, chunks, ·), the state after the last), one chunk after the other."""
    batch, columns = left.shape[:2]
    shape = tuple(state.shape)
    if backend_of(xp).holds(columns == 1):  # no loop
        return xp.expand_dims(state, axis=1), xp.reshape(
            _after(xp, xp.reshape(state, left.shape), decay, left, cut), shape
        )
    rows = [None if x is None else xp.reshape(x, (batch, columns, -1)) for x in (left, decay, cut)]
    shapes = [None if x is None else (batch, 1, *x.shape[2:]) for x in (left, decay, cut)]

    def step(h: Array, *span: Array | None) -> tuple[Array, Array]:
        left, decay, cut = (
            None if x is None or to is None else xp.reshape(x, to) for x, to in zip(span, shapes, strict=True)
        )
        after = _after(xp, h, decay, left, cut)
        return after, xp.reshape(h, (batch, 1, -1))

    h, before = fold_blocks(step, xp.reshape(state, (batch, 1, *left.shape[2:])), rows, 1, xp=xp, exact=True)
    return before, xp.reshape(h, shape)


def _after(xp: ModuleType, h: Array, decay: Array | None, left: Array, cut: Array | None) -> Array:
    """The state after a chunk that begins with h."""
    if cut is not None:
        h = xp.where(cut, 0.0, h)
    return left + (h if decay is None else decay * h)


def _read(xp: ModuleType, c: Chunks, before: Array, lag: int) -> Array:
    """The part of the outputs that comes from the state before each chunk."""
    q, passed, faded = c.q, None, None
    if c.g is not None:
        faded = _moved(xp, xp.cumulative_sum(c.g, axis=-2), lag)
    if c.segment is not None:
        passed = (c.segment == 0)[..., None]  # no reset up to this step
        q = xp.where(passed, q, 0.0)
        faded = None if faded is None else xp.where(passed, faded, 0.0)
    o = (q if faded is None else q * xp.exp(faded)) @ before
    return o if passed is None else xp.where(passed, o, 0.0)
