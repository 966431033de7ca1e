"""The scan of Mamba-2, structured state-space duality (Dao & Gu, 2024): one decay for each head.

h[t] = exp(Δ[t] A) h[t−1] + Δ[t] x[t] B[t]ᵀ,    y[t] = h[t] C[t] + D x[t]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np

from subquad.backend import Array
from subquad.core.beside import namespace_of
from subquad.core.checks import check_arrays, check_flag, check_floating, check_given
from subquad.core.dtypes import cast, compute_dtype, stored_dtype
from subquad.core.shapes import broadcast_batch
from subquad.core.states import StateSpec, merge_by_decay
from subquad.kernels.gated_outer_scan import gated_outer_scan
from subquad.kernels.outer_scan import outer_scan
from subquad.kernels.selective_scan import skip_and_gate, step_sizes
from subquad.registry import Host, Inputs, register_scan
from subquad.scans.call import Form, Target, check_limits, flat_target, form_of
from subquad.scans.timeline import Rows, Timeline, every, timeline

POSITIONAL = ("x", "delta", "A", "B", "C", "D")
INPUTS = (*POSITIONAL, "z", "delta_bias", "initial_state")
STEP_INPUTS = (*INPUTS[:-1], "state")


def draw(rng: np.random.Generator, n: int) -> Inputs:
    """Example inputs: a Mamba-2 layer at initialisation, with A from −1 to −16, D = 1 and Δ about 0.01."""
    heads, p, d_state = 8, 32, 32
    x, z = rng.standard_normal((2, n, heads, p))
    B, C = rng.standard_normal((2, n, 1, d_state))
    arrays = {"x": x, "delta": rng.standard_normal((n, heads)), "A": -np.linspace(1.0, 16.0, heads), "B": B, "C": C}
    bias = np.full(heads, np.log(np.expm1(0.01)))  # softplus(bias) = 0.01
    return {**arrays, "D": np.ones(heads), "z": z, "delta_bias": bias}, {"delta_softplus": True}


def activations(q: Host, k: Host, v: Host) -> Inputs:
    """A Mamba-2 layer over real activations: heads are the key heads, each a group of its own.

        x = v,    B = k,    C = q,    delta = k p / √d with a random p,    softplus(delta_bias) = 0.05,    A = −1, −2, …

    C is the first query head that shares the key head.
    """
    if q.ndim > 2:
        q, k, v = (np.moveaxis(x, -3, -2) for x in (q[..., :: q.shape[-3] // k.shape[-3], :, :], k, v))
    else:
        q, k, v = (x[:, None, :] for x in (q, k, v))
    heads, d = k.shape[-2:]
    delta = k @ np.random.Generator(np.random.PCG64(0)).standard_normal(d) / d**0.5
    arrays = {"x": v, "delta": delta, "A": -np.arange(1.0, heads + 1), "B": k, "C": q, "D": np.ones(heads)}
    return {**arrays, "delta_bias": np.full(heads, np.log(np.expm1(0.05)))}, {"delta_softplus": True}


def definition(arrays: Mapping[str, Host], options: Mapping[str, Any]) -> Host:
    """The definition: y, step by step, in float64."""
    wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    x, delta, A, B, C = (wide[name] for name in POSITIONAL[:5])
    heads = x.shape[-2]
    B, C = (np.repeat(m, heads // m.shape[-2], axis=-2) for m in (B, C))
    delta = delta + wide.get("delta_bias", 0)
    delta = np.logaddexp(0, delta) if options.get("delta_softplus") else delta
    delta = np.clip(delta, *(options.get("delta_limits") or (None, None)))
    batch = np.broadcast_shapes(*(m.shape[:-3] for m in (x, B, C)), delta.shape[:-2])
    h, y = np.zeros((*batch, *x.shape[-2:], B.shape[-1])), np.empty((*batch, *x.shape[-3:]))
    h = wide.get("initial_state", h)
    steps = range(x.shape[-3])
    for t in reversed(steps) if options.get("reverse") else steps:
        step = delta[..., t, :, None, None]
        h = np.exp(step * A[:, None, None]) * h + step * x[..., t, :, :, None] * B[..., t, :, None, :]
        y[..., t, :, :] = (h * C[..., t, :, None, :]).sum(-1)
    if "D" in wide:
        y = y + (wide["D"] if wide["D"].ndim == 2 else wide["D"][:, None]) * x
    return y * wide["z"] / (1 + np.exp(-wide["z"])) if "z" in wide else y


def decay(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Array:
    """exp(A Σ_t Δ[t]), (..., heads, 1, 1): the factor by which a chunk multiplies the state before it."""
    given = [arrays.get(name) for name in INPUTS]
    xp = namespace_of(given[0])
    compute = compute_dtype(xp, *given)
    delta, A, bias = (cast(xp, arrays.get(name), compute) for name in ("delta", "A", "delta_bias"))
    x = arrays["x"]
    batch = broadcast_batch(x=x.shape[:-3], delta=arrays["delta"].shape[:-2])
    timed = {name: options.get(name) for name in ("segments", "mask")}
    time = timeline("x", x, batch, x.shape[-3], **timed, reverse=bool(options.get("reverse")), fold=False)
    delta = time.filled(delta, axis=-2)
    steps = step_sizes(xp, delta, bias, bool(options.get("delta_softplus")), options.get("delta_limits"))
    total = xp.sum(time.filled(steps, axis=-2), axis=-2)
    return time.restarted(xp.exp(total * A)[..., None, None], 0.0)


def ssd_step(
    state: Array | None,
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    /,
    *,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    delta_limits: tuple[float, float] | None = None,
    mask: Array | None = None,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Compute one step of `ssd`, for decoding token by token; the arrays have no time axis.

        h ← exp(Δ A) h + Δ x Bᵀ,    y = (h C + D x) silu(z)

    Parameters
    ----------
    state : array, shape (..., heads, p, d_state), or None
        The state before the step; None means zero.
    x : array, shape (..., heads, p)
        Input of one token.
    delta : array, shape (..., heads)
        Step sizes.
    A : array, shape (heads,)
        One rate for each head, per unit of time.
    B, C : array, shape (..., groups, d_state)
        Input and output maps; head i reads group i // (heads / groups).
    D : array, shape (heads,) or (heads, p), optional
        Skip connection.
    z : array, shape (..., heads, p), optional
        Gate: the output is multiplied by silu(z) = z / (1 + exp(−z)).
    delta_bias : array, shape (heads,), optional
        Bias that is added to `delta`, before softplus.
    delta_softplus : bool, default False
        Apply softplus(x) = log1p(exp(x)) to the step sizes.
    delta_limits : (float, float), optional
        Least and greatest step size, after softplus.
    mask : array of bool, broadcastable to (...), optional
        False for an item whose sequence has ended: its state stays as it is, and its y is 0.
    implementation : str, default "auto"
        "auto", "generic", or the name of an override of the kernel `outer_scan`; see `subquad.explain`.

    Returns
    -------
    y : array, shape (..., heads, p)
        The output, in the dtype and on the device of `x`.
    state : array, shape (..., heads, p, d_state)
        The state after the step, at least float32. The state given is not written to.

    Raises
    ------
    TypeError, ValueError
        As `ssd` raises them.

    See Also
    --------
    ssd : The scan over a whole sequence.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> one, state = np.ones((1, 1)), None
    >>> for _ in range(3):
    ...     y, state = subquad.ssd_step(state, one, one[0], np.zeros(1), one, one)
    >>> y
    array([[3.]])
    """
    arrays = x, delta, A, B, C, D, z, delta_bias, state
    form = form_of("ssd_step", arrays, lambda: _form(arrays, time=0))
    time = form.step_time("x", x, mask, axes=2)
    return _scan(form, arrays, delta_softplus, delta_limits, time, implementation)[:2]


@overload
def ssd(
    x: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None = None, /, *, z: Array | None = None,
    delta_bias: Array | None = None, delta_softplus: bool = False, delta_limits: tuple[float, float] | None = None,
    initial_state: Array | None = None, return_state: Literal[False] = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: None = None, implementation: str = "auto",
) -> Array: ...  # fmt: skip
@overload
def ssd(
    x: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None = None, /, *, z: Array | None = None,
    delta_bias: Array | None = None, delta_softplus: bool = False, delta_limits: tuple[float, float] | None = None,
    initial_state: Array | None = None, return_state: Literal[True], reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: None = None, implementation: str = "auto",
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def ssd(
    x: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None = None, /, *, z: Array | None = None,
    delta_bias: Array | None = None, delta_softplus: bool = False, delta_limits: tuple[float, float] | None = None,
    initial_state: Array | None = None, return_state: bool = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: Sequence[int] | every,
    implementation: str = "auto",
) -> tuple[Array, ...]: ...  # fmt: skip
@register_scan(
    "ssd",
    state=StateSpec({"state": ("p", "d_state"), "decay": ("p", "d_state")}, merge_by_decay),
    decay=decay,
    draw=draw,
    cost="n heads p d_state",
    positional=POSITIONAL,
    step=ssd_step,
    activations=activations,
    reference=definition,
)
def ssd(
    x: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    /,
    *,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
    delta_limits: tuple[float, float] | None = None,
    initial_state: Array | None = None,
    return_state: bool = False,
    reverse: bool = False,
    segments: Array | None = None,
    mask: Array | None = None,
    states_at: Sequence[int] | every | None = None,
    implementation: str = "auto",
) -> Any:
    """Compute the state-space scan of Mamba-2 (SSD), with one rate of decay for each head.

        Δ[t] = clip(softplus(delta[t] + delta_bias))        (the sum itself without delta_softplus)
        h[t] = exp(Δ[t] A) h[t−1] + Δ[t] x[t] B[t]ᵀ,        h[−1] = initial_state
        y[t] = (h[t] C[t] + D x[t]) silu(z[t])

    Parameters
    ----------
    x : array, shape (..., n, heads, p)
        Input sequence, of a real floating dtype. As in mamba-ssm, time comes before the heads.
    delta : array, shape (..., n, heads)
        Step sizes, in the unit of time of `A`; they should be positive after bias and softplus.
    A : array, shape (heads,)
        One rate for each head, per unit of time; a negative one keeps h bounded.
    B, C : array, shape (..., n, groups, d_state)
        Input and output maps; `groups` divides `heads`, and head i reads group i // (heads / groups). Batch axes of all
        inputs broadcast.
    D : array, shape (heads,) or (heads, p), optional
        Factors of the skip connection D x. Default: no skip connection.
    z : array, shape (..., n, heads, p), optional
        Gate: the output is multiplied by silu(z) = z / (1 + exp(−z)).
    delta_bias : array, shape (heads,), optional
        Bias that is added to `delta`, before softplus.
    delta_softplus : bool, default False
        Apply softplus(x) = log1p(exp(x)) to the step sizes.
    delta_limits : (float, float), optional
        Least and greatest step size, applied after softplus; the greatest may be infinite. Default: no limits.
    initial_state : array, shape (..., heads, p, d_state), optional
        The state before the first step (with `reverse`, after the last). Default: zero.
    return_state : bool, default False
        Return (y, state) instead of y.
    reverse : bool, default False
        Run time from the end: h[t] = exp(Δ[t] A) h[t+1] + Δ[t] x[t] B[t]ᵀ.
    segments : array of int, broadcastable to (..., n), optional
        Numbers of the documents in a packed sequence: h starts anew from 0 where the number changes. `initial_state`
        belongs to the first document of the call.
    mask : array of bool, broadcastable to (..., n), optional
        True for a step that counts. A padded step, False, leaves the state as it is and gives 0; its values have no
        influence, nor has its number in `segments`.
    states_at : sequence of int or `every`, optional
        Positions p in 0 … n: the states after p steps are returned too. ``every(k)`` is (k, 2k, …).
    implementation : str, default "auto"
        "auto", "generic", or the name of a kernel; see `subquad.explain`.

    Returns
    -------
    y : array, shape (..., n, heads, p)
        The output, in the dtype and on the device of `x`.
    state : array, shape (..., heads, p, d_state)
        Only with `return_state`: the state after the last step (with `reverse`, the first), at least float32. As the
        `initial_state` of the next chunk, it continues this scan up to rounding.
    states : array, shape (p, ..., heads, p, d_state)
        Only with `states_at`, last: for each position the state that a call on the steps before it returns (with
        `reverse`, on as many of the last steps).

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a real floating dtype, `segments` that are not integers, a
        `mask` that is not bool, `states_at` that are no positions, and `delta_limits` that are no two numbers.
    ValueError
        If shapes or devices do not fit, a position is not in 0 … n, the limits are not in order, or `implementation`
        cannot take the call; the message names the argument and what was expected.

    See Also
    --------
    ssd_step : One step of this recurrence.
    selective_scan : The scan of Mamba-1, with a rate for each channel and state.
    gated_linear_attention : The same recurrence in the arguments of linear attention.
    summarize_scan : State and decay of a chunk, for chunks that are processed apart.

    Notes
    -----
    O(n heads p d_state) operations; no array of n states exists. float16 and bfloat16 are computed in float32. The
    generic form multiplies matrices in chunks, by segment sums of Δ A [1]_. There a value of a later step of the chunk
    that is not finite may reach an earlier step. Kernels: `outer_scan`, and `gated_outer_scan` for z.

    References
    ----------
    .. [1] T. Dao, A. Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State
       Space Duality", ICML 2024, section 6 and listing 1.

    Examples
    --------
    With A = 0 and unit maps the state is a running sum:

    >>> import numpy as np, subquad
    >>> one = np.ones((3, 1, 1))
    >>> subquad.ssd(one, one[..., 0], np.zeros(1), one, one)[:, 0, 0]
    array([1., 2., 3.])
    """
    arrays = x, delta, A, B, C, D, z, delta_bias, initial_state
    form = form_of("ssd", arrays, lambda: _form(arrays, time=1))
    return_state, reverse = check_flag("return_state", return_state), check_flag("reverse", reverse)
    *batch, n, _, _ = form.shape_of(0)
    time = timeline(
        "x", x, tuple(batch), n, xp=form.xp, segments=segments, mask=mask, states_at=states_at, reverse=reverse
    )
    y, state, states = _scan(form, arrays, delta_softplus, delta_limits, time, implementation)
    return time.results(y, state, states, return_state=return_state)


def _scan(
    form: Form, arrays: Sequence[Any], delta_softplus: bool, delta_limits: Any, time: Timeline, implementation: str
) -> tuple[Array, Array, list[Array] | None]:
    """(y, last state, states at positions) of a call, by its form."""
    softplus, limits, xp = check_flag("delta_softplus", delta_softplus), check_limits(delta_limits), form.xp
    x, delta, A, B, C, D, z, delta_bias, start = form.enter(arrays)
    is_one = z is not None and form.backend.may_fill(*(a for a in arrays if a is not None))  # scan and gate
    if z is not None and not is_one:  # y is gated before it is rounded
        x, z = (cast(xp, a, form.outputs[1].dtype) for a in (x, z))
    kernel, gates = (gated_outer_scan, 1) if is_one else (outer_scan, 0)

    def scan(rows: Rows, start: Array | None, resets: Array | None) -> tuple[Array, Array]:
        x, delta, B, C, z = rows
        assert delta is not None
        g = (delta * A)[..., None]
        given = C, B, x, g, delta, None, D, start, resets, *[z] * gates
        if time.is_plain:
            y, state = form.run(kernel, given, implementation, scale=1.0, reverse=time.reverse)
        else:
            y, state = kernel(*given, scale=1.0, reverse=time.reverse, implementation=implementation)
        return y if gates else skip_and_gate(xp, y, x, None, z), state

    with form.computing(x):
        # filled before too: 0 times the slope at a NaN is NaN
        delta = step_sizes(xp, time.filled(delta), delta_bias, softplus, limits)
        # the kernel's state is (..., d_state, p)
        start = None if start is None else xp.matrix_transpose(start)
        y, state, states = time.run(scan, [time.filled(x) for x in (x, delta, B, C, z)], start)
        state = xp.matrix_transpose(state)
        states = None if states is None else [form.leave(1, xp.matrix_transpose(x)) for x in states]
    return form.leave(0, y), form.leave(1, state), states


def _form(given: tuple[Any, ...], *, time: int) -> Form:
    """The form of a scan (`time` 1) or of one step (`time` 0), after checks of the arrays."""
    arrays = dict(zip(INPUTS if time else STEP_INPUTS, given, strict=True))
    check_given(**{name: arrays[name] for name in POSITIONAL[:5]})
    xp = check_arrays(**arrays)
    check_floating(xp, **arrays)
    tails = _tails(arrays, time)
    batch = broadcast_batch(**{name: tuple(x.shape[: x.ndim - len(tails[name])])
                               for name, x in arrays.items() if x is not None and name in tails})  # fmt: skip
    compute = compute_dtype(xp, *given)
    x, _, _, B, _, D, *_ = given
    n, (heads, p), d_state = x.shape[-3] if time else 1, x.shape[-2:], B.shape[-1]

    def target(name: str, x: Array | None) -> Target | None:
        is_read = name in ("x", "B", "C", "z")
        found = flat_target(x, stored_dtype(xp, x, compute) if is_read else compute, batch, tails[name])
        if found is None or name in ("initial_state", "state"):
            return found
        tail = tails[name][time:]
        return found._replace(shape=(math.prod(batch), n, *tail))

    targets = {name: target(name, x) for name, x in arrays.items() if name in tails}
    targets |= {"A": Target(compute), "delta_bias": Target(compute)}
    targets["D"] = None if D is None else Target(compute, None, (heads, p if D.ndim == 2 else 1))
    y = Target(x.dtype, None, (*batch, *(n,) * time, heads, p))
    return Form(xp, tuple(targets[name] for name in arrays), (y, Target(compute, None, (*batch, heads, p, d_state))))


def _tails(arrays: Mapping[str, Array | None], time: int) -> dict[str, tuple[int, ...]]:
    """The axes after the batch of the inputs that have batch axes; ValueError if an input has others."""
    x, B = arrays["x"], arrays["B"]
    assert x is not None
    assert B is not None
    if x.ndim < 2 + time:
        expected = "(..., n, heads, p) with at least three axes" if time else "(..., heads, p) with at least two axes"
        msg = f"x has shape {tuple(x.shape)}, expected {expected}"
        raise ValueError(msg)
    steps, (heads, p) = tuple(x.shape[-2 - time : -2]), tuple(x.shape[-2:])
    each = "".join(f"{n}, " for n in steps)
    if B.ndim < 2 + time or tuple(B.shape[-2 - time : -2]) != steps or not B.shape[-2] or heads % B.shape[-2]:
        msg = (
            f"B has shape {tuple(B.shape)}, expected (..., {each}groups, d_state) for x {tuple(x.shape)}; "
            f"groups must divide heads = {heads}"
        )
        raise ValueError(msg)
    maps = (*steps, *B.shape[-2:])
    state = "initial_state" if time else "state"
    rows = (*steps, heads, p)
    tails = {"x": rows, "delta": (*steps, heads), "B": maps, "C": maps, "z": rows, state: (heads, p, B.shape[-1])}
    for name, tail in tails.items():
        given = arrays[name]
        if given is not None and (given.ndim < len(tail) or tuple(given.shape[given.ndim - len(tail) :]) != tail):
            msg = f"{name} has shape {tuple(given.shape)}, expected (..., {', '.join(map(str, tail))})"
            raise ValueError(msg)
    for name in ("A", "delta_bias", "D"):
        given = arrays[name]
        # compared one by one: a tracer does not find a tuple of varying sizes in a list
        if given is None or tuple(given.shape) == (heads,) or (name == "D" and tuple(given.shape) == (heads, p)):
            continue
        expected = f"({heads},) or ({heads}, {p})" if name == "D" else f"({heads},)"
        msg = f"{name} has shape {tuple(given.shape)}, expected {expected}: x has {heads} heads"
        raise ValueError(msg)
    return tails
