"""The scan of a fixed diagonal state-space model in plain Array API, in chunks of matrix products.

    h[t] = h[t−1] + r h[t−1] + B u[t],    y[t] = C·h[t] + D u[t]    (2 Re(C·h[t]) for complex r),    r = Ā − 1

With K[i] = C·(Āⁱ B), a chunk of Q steps that begins with state h has

    y[t] = Σ_{j ≤ t} K[t − j] u[j] + C·(Āᵗ⁺¹ h),    h' = Ā^Q h + Σ_j Ā^(Q−1−j) B u[j]

for each channel: three products of matrices that all chunks share, of 2 Q + 8 d_state (complex: 16) operations for each
number, where a convolution by FFT needs some hundred, slower ones. The chunks are joined by a parallel prefix.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

from subquad.backend import Array, Like
from subquad.core.beside import namespace_of, place_of
from subquad.core.block_loop import fold_blocks
from subquad.core.kernel import kernel
from subquad.core.loading import backend_of
from subquad.kernels.linear_scan import started
from subquad.kernels.not_finite import causal_product, with_care
from subquad.kernels.parallel_prefix import cut_runs, join_runs
from subquad.kernels.selective_scan import read_out

CHUNK = 64  # steps Q of a chunk: shorter ones join more states, longer ones multiply with larger K
RUN = 32  # steps of a run, where resets or a mask cut the sequence
COLUMNS, SPAN_ELEMENTS = 64, 2**20  # chunks, or runs, of a span; the numbers of all their states are bounded


def outputs(u: Array, rate: Array, *arrays: Array | None, reverse: bool) -> tuple[Like, ...]:
    """Shapes and dtypes of the outputs of `lti_scan`: y and the last state."""
    return Like(tuple(u.shape), u.dtype), Like((u.shape[0], *rate.shape), rate.dtype)


@kernel(outputs=outputs, reads_half=True)
def lti_scan(
    u: Array,
    rate: Array,
    B: Array,
    C: Array,
    D: Array | None,
    initial_state: Array | None,
    resets: Array | None,
    mask: Array | None,
    /,
    *,
    reverse: bool,
) -> tuple[Array, Array]:
    """(y, last state) of arrays of one precision; the output is real, the state has the dtype of `rate`.

        u               (batch, n, d), real
        rate, B, C      (d, d_state), all real or all complex; rate is Ā − 1
        D               (d,), real
        initial_state   (batch, d, d_state)
        resets          (batch, n), bool: the state starts from 0 before a step where it is True, by selection
        mask            (batch or 1, n), bool: a step where it is False leaves the state as it is and gives 0

    The mask is the kernel's, unlike that of other scans, since a fixed model has no step that does nothing. With
    `reverse`, time runs from the end. u may have half precision in place of float32, and y then has it too.
    """
    xp = namespace_of(u)
    batch, n, d = u.shape
    state = initial_state
    if state is None:
        state = xp.zeros((batch, *rate.shape), dtype=rate.dtype, device=place_of(u))
    if 0 in (n, batch, d, rate.shape[1]):
        return u if D is None and n == 0 else u * (0.0 if D is None else D), state
    width = batch * d * rate.shape[1] * backend_of(xp).items_behind(u, rate)
    columns = max(1, min(COLUMNS, SPAN_ELEMENTS // max(1, width)))
    by_runs = resets is not None or mask is not None
    rows = [u]
    if by_runs:
        resets = xp.zeros(u.shape[:2], dtype=xp.bool, device=place_of(u)) if resets is None else resets
        mask = xp.ones(u.shape[:2], dtype=xp.bool, device=place_of(u)) if mask is None else mask
        rows += [xp.expand_dims(x, axis=-1) for x in (resets, mask)]
    if reverse:  # a copy: products with a view whose strides are negative may round otherwise than those with a copy
        rows = [xp.concat([xp.flip(x, axis=1)], axis=1) for x in rows]
    products = None if by_runs else Products.of(xp, rate, B, C, min(n, CHUNK))

    def scan(careful: bool) -> tuple[Array, Array]:
        def advance(state: Array, u: Array, *where: Array) -> tuple[Array, Array]:
            if products is not None:
                return _chunks(xp, state, u, products, careful)
            return _runs(xp, state, (u, *where), rate, B, C)

        return fold_blocks(advance, state, rows, (RUN if by_runs else CHUNK) * columns, xp=xp)

    state, y = scan(False) if by_runs or n == 1 else with_care(xp, scan, u, rate, B, C, state)
    if D is not None:
        y = y + D * rows[0]
    if by_runs:
        y = xp.where(rows[2], y, xp.zeros_like(y))
    return xp.flip(y, axis=1) if reverse else y, state


class Products(NamedTuple):
    """The matrices of a chunk of Q steps. Complex numbers are pairs of real ones, so p = d_state or 2 d_state.

    powers (d, d_state, Q) is Āⁱ⁺¹ − 1; of inputs, within (d, Q, Q) gives the output and left (d, Q, p) the state; of
    the state before the chunk, out (d, p, Q) gives the output.
    """

    powers: Array
    within: Array
    left: Array
    out: Array

    @classmethod
    def of(cls, xp: ModuleType, rate: Array, B: Array, C: Array, steps: int) -> Products:
        """The matrices of checked arrays."""
        is_complex = xp.isdtype(rate.dtype, "complex floating")
        powers = xp.expand_dims(rate, axis=-1)
        while powers.shape[-1] < steps:  # (1 + a)(1 + b) − 1 = a + b + a b keeps the digits of slow decays
            last = powers[..., -1:]
            powers = xp.concat([powers, last + powers + last * powers], axis=-1)
        powers = powers[..., :steps]
        whole = xp.concat([xp.ones_like(powers[..., :1]), 1 + powers], axis=-1)  # Āⁱ, i = 0 … Q
        B, C = xp.expand_dims(B, axis=-1), xp.expand_dims(C, axis=-1)
        response = xp.sum(C * B * whole[..., :steps], axis=-2)
        response = 2 * xp.real(response) if is_complex else response
        place = xp.arange(steps, device=place_of(rate))
        lag = xp.expand_dims(place, axis=0) - xp.expand_dims(place, axis=1)  # of (input, output)
        within = xp.take(response, xp.reshape(xp.where(lag < 0, xp.zeros_like(lag), lag), (-1,)), axis=-1)
        within = xp.reshape(within, (rate.shape[0], steps, steps))
        within = xp.where(lag < 0, xp.zeros_like(within), within)
        left = xp.matrix_transpose(xp.flip(B * whole[..., :steps], axis=-1))
        out = C * whole[..., 1:]
        if is_complex:
            left = xp.concat([xp.real(left), xp.imag(left)], axis=-1)
            out = xp.concat([2 * xp.real(out), -2 * xp.imag(out)], axis=-2)
        return cls(powers, within, left, out)

    def shorter(self, xp: ModuleType, steps: int) -> Products:
        """The matrices of a chunk of fewer steps."""
        rows = self.left.shape[1] - steps
        return Products(
            self.powers[..., :steps], self.within[:, :steps, :steps], self.left[:, rows:, :], self.out[..., :steps]
        )


def _chunks(xp: ModuleType, state: Array, u: Array, products: Products, careful: bool) -> tuple[Array, Array]:
    """(state after a span, output of the span) by matrix products; the steps left over are one shorter chunk."""
    n, longest = u.shape[1], products.within.shape[-1]
    columns, rest = n // longest, n % longest
    parts = []
    if columns:
        state, y = _equal_chunks(xp, state, u[:, : n - rest, :], products, columns, careful)
        parts.append(y)
    if rest:
        state, y = _equal_chunks(xp, state, u[:, n - rest :, :], products.shorter(xp, rest), 1, careful)
        parts.append(y)
    return state, parts[0] if len(parts) == 1 else xp.concat(parts, axis=1)


def _equal_chunks(
    xp: ModuleType, state: Array, u: Array, products: Products, columns: int, careful: bool
) -> tuple[Array, Array]:
    """`_chunks` of a whole number of chunks; `careful` as in `with_care`."""
    batch, n, d = u.shape
    steps, p = products.left.shape[1:]
    by_channel = xp.reshape(xp.permute_dims(u, (2, 0, 1)), (d, batch * columns, steps))
    left = xp.reshape(by_channel @ products.left, (d, batch, columns, p))
    left = _complex(xp, xp.permute_dims(left, (1, 2, 0, 3)), state.dtype)
    growth = products.powers[..., -1]
    before = xp.expand_dims(state, axis=1)
    if columns > 1:
        before = join_runs(xp, xp.broadcast_to(1 + growth, left.shape), left, before)
    last = before[:, -1, ...]
    state = last + (growth * last + left[:, -1, ...])
    heads = xp.reshape(xp.permute_dims(_real(xp, before), (2, 0, 1, 3)), (d, batch * columns, p))

    def within(u: Array) -> Array:
        return u @ products.within

    y = causal_product(xp, within, by_channel, -1) if careful else within(by_channel)
    y = y + heads @ products.out
    return state, xp.permute_dims(xp.reshape(y, (d, batch, n)), (1, 2, 0))


def _real(xp: ModuleType, h: Array) -> Array:
    """States as real numbers: real parts, then imaginary parts."""
    return xp.concat([xp.real(h), xp.imag(h)], axis=-1) if xp.isdtype(h.dtype, "complex floating") else h


def _complex(xp: ModuleType, h: Array, dtype: Any) -> Array:
    """The states that `_real` made real."""
    if h.dtype == dtype:
        return h
    half = h.shape[-1] // 2
    return xp.astype(h[..., :half], dtype) + xp.astype(h[..., half:], dtype) * 1j


def _runs(
    xp: ModuleType, state: Array, span: tuple[Array, ...], rate: Array, B: Array, C: Array
) -> tuple[Array, Array]:
    """(state after a span, output of the span), step by step in runs side by side, as the selective scan goes.

    `span` holds rows of u, resets and mask, the latter two of width 1.
    """
    batch, n, d = span[0].shape
    columns, steps = backend_of(xp).run_sizes(n, RUN)
    runs = [cut_runs(xp, x, columns, steps) for x in span]  # what is padded is masked
    is_complex = xp.isdtype(rate.dtype, "complex floating")

    def learn(carry: tuple[Array, Array], u: Array, reset: Array, mask: Array) -> tuple[tuple[Array, Array], None]:
        decay, h = (started(xp, x, reset) for x in carry)
        drive = B * xp.matrix_transpose(u)
        return (xp.where(mask, decay + rate * decay, decay), xp.where(mask, h + (rate * h + drive), h)), None

    def emit(h: Array, u: Array, reset: Array, mask: Array) -> tuple[Array, Array]:
        h = started(xp, h, reset)
        h = xp.where(mask, h + (rate * h + B * xp.matrix_transpose(u)), h)
        return h, xp.expand_dims(read_out(xp, h, C, is_complex), axis=-2)

    before = xp.expand_dims(state, axis=1)
    if columns > 1:
        zero = xp.zeros((batch, columns, *state.shape[1:]), dtype=state.dtype, device=place_of(state))
        (decay, left), _ = fold_blocks(learn, (xp.ones_like(zero), zero), runs, 1, xp=xp, exact=True)
        before = join_runs(xp, decay, left, before, xp.any(runs[1], axis=2, keepdims=True))
    h, y = fold_blocks(emit, before, runs, 1, xp=xp, exact=True)
    return h[:, -1, ...], xp.reshape(y, (batch, columns * steps, d))[:, :n, :]
