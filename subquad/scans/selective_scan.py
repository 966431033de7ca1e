"""The selective state-space scan (S6) of Mamba (Gu & Dao, 2023).

h[t] = exp(Δ[t] A) h[t−1] + Δ[t] B[t] u[t],    y[t] = C[t]·h[t] + D u[t]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np

from subquad.backend import Array
from subquad.core.beside import namespace_of
from subquad.core.checks import check_flag, whole_call
from subquad.core.dtypes import cast, is_dtype, is_half, scan_dtypes
from subquad.core.shapes import broadcast_batch
from subquad.core.states import StateSpec, merge_by_decay
from subquad.kernels.selective_scan import selective_scan as scan_kernel
from subquad.kernels.selective_scan import step_sizes
from subquad.registry import Host, Inputs, register_scan
from subquad.scans.call import Form, Target, check_inputs, check_limits, flat_target, form_of
from subquad.scans.timeline import Rows, Timeline, every, timeline

INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
STEP_INPUTS = (*INPUTS[:-1], "state")
D_STATE = 16  # of example inputs


def draw(rng: np.random.Generator, n: int) -> Inputs:
    """Example inputs: a Mamba layer at initialisation, with A = −1 … −16, D = 1, Δ about 0.01, and 256 channels."""
    d = 256
    u, delta, z = rng.standard_normal((3, 1, n, d))
    B, C = rng.standard_normal((2, 1, n, D_STATE))
    arrays = {"u": u, "delta": delta, "A": np.tile(-np.arange(1.0, D_STATE + 1), (d, 1)), "B": B, "C": C}
    bias = np.full(d, np.log(np.expm1(0.01)))  # softplus(bias) = 0.01
    return {**arrays, "D": np.ones(d), "z": z, "delta_bias": bias}, {"delta_softplus": True}


def activations(q: Host, k: Host, v: Host) -> Inputs:
    """A Mamba layer over real activations, with the sizes and time scales of Mamba's initialisation.

        u = v,    delta = k P / √d with a random P,    softplus(delta_bias) = 0.05,    A = −1 … −16,    D = 1

    B is the first d_state channels of k, and C those of the first query head that shares the key head.
    """
    if q.ndim > 2:
        q = q[..., :: q.shape[-3] // k.shape[-3], :, :]
    d, d_v = k.shape[-1], v.shape[-1]
    d_state = min(D_STATE, d)
    delta = k @ np.random.Generator(np.random.PCG64(0)).standard_normal((d, d_v)) / d**0.5
    A = np.tile(-np.arange(1.0, d_state + 1), (d_v, 1))
    arrays = {"u": v, "delta": delta, "A": A, "B": k[..., :d_state], "C": q[..., :d_state], "D": np.ones(d_v)}
    bias = np.full(d_v, np.log(np.expm1(0.05)))  # softplus(bias) = 0.05
    return {**arrays, "delta_bias": bias}, {"delta_softplus": True}


def definition(arrays: Mapping[str, Host], options: Mapping[str, Any]) -> Host:
    """The definition: y, step by step, in float64, for real A and for B and C given for each step."""
    wide = {name: np.asarray(x, np.float64) for name, x in arrays.items()}
    u, delta, A, B, C = (wide[name] for name in INPUTS[:5])
    delta = delta + wide.get("delta_bias", 0)
    delta = np.logaddexp(0, delta) if options.get("delta_softplus") else delta
    delta = np.clip(delta, *(options.get("delta_limits") or (None, None)))
    h, y = wide.get("initial_state", np.zeros((*u.shape[:-2], *A.shape))), np.empty_like(u)
    steps = range(u.shape[-2])
    for t in reversed(steps) if options.get("reverse") else steps:
        step = delta[..., t, :, None]
        h = np.exp(step * A) * h + step * u[..., t, :, None] * B[..., t, None, :]
        y[..., t, :] = (h * C[..., t, None, :]).sum(-1)
    y = y + wide["D"] * u if "D" in wide else y
    return y * wide["z"] / (1 + np.exp(-wide["z"])) if "z" in wide else y


def decay(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Array:
    """exp(A Σ_t Δ[t]), (..., d, d_state): the factor by which a chunk multiplies the state before it."""
    u, delta, A, bias = arrays["u"], arrays["delta"], arrays["A"], arrays.get("delta_bias")
    xp = namespace_of(delta)
    real, state = scan_dtypes(xp, A, *map(arrays.get, INPUTS))
    softplus, limits = bool(options.get("delta_softplus")), options.get("delta_limits")
    batch = broadcast_batch(u=u.shape[:-2], delta=delta.shape[:-2])
    given = {name: options.get(name) for name in ("segments", "mask")}
    time = timeline("u", u, batch, u.shape[-2], **given, reverse=bool(options.get("reverse")), fold=False)
    delta = time.filled(cast(xp, delta, real), axis=-2)
    delta = step_sizes(xp, delta, cast(xp, bias, real), softplus, limits)
    total = xp.astype(xp.sum(time.filled(delta, axis=-2), axis=-2, keepdims=True), state)
    return time.restarted(xp.exp(xp.matrix_transpose(total) * cast(xp, A, state)), 0.0)


def selective_scan_step(
    state: Array | None,
    u: Array,
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
    """Compute one step of `selective_scan`, for decoding token by token; the arrays have no time axis.

        h ← exp(Δ A) h + Δ B u,    y = (C·h + D u) silu(z)

    Parameters
    ----------
    state : array, shape (..., d, d_state), or None
        The state before the step; None means zero.
    u, delta : array, shape (..., d)
        Input and step sizes of one token; `u` has a real floating dtype.
    A : array, shape (d, d_state)
        Diagonal state matrix, real or complex.
    B, C : array, shape (..., d_state) or (..., groups, d_state) or (d, d_state)
        Input and output maps: one for all channels, one for each group of d / groups consecutive channels, or one for
        each channel. Complex only if `A` is.
    D : array, shape (d,), optional
        Skip connection.
    z : array, shape (..., d), optional
        Gate: the output is multiplied by silu(z) = z / (1 + exp(−z)).
    delta_bias : array, shape (d,), optional
        Bias that is added to `delta`, before softplus.
    delta_softplus : bool, default False
        Apply softplus(x) = log1p(exp(x)) to the step sizes.
    delta_limits : (float, float), optional
        Least and greatest step size: Δ is clipped to them, after softplus.
    mask : array of bool, broadcastable to (...), optional
        False for an item whose sequence has ended: its state stays as it is, and its y is 0.
    implementation : str, default "auto"
        "auto", "generic", or the name of an override of the kernel `selective_scan`; see `subquad.explain`.

    Returns
    -------
    y : array, shape (..., d)
        The output, in the dtype and on the device of `u`.
    state : array, shape (..., d, d_state)
        The state after the step, at least float32, complex if `A` is. The state given is not written to.

    Raises
    ------
    TypeError, ValueError
        As `selective_scan` raises them.

    See Also
    --------
    selective_scan : The scan over a whole sequence.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> one, state = np.ones(1), None
    >>> for _ in range(3):
    ...     y, state = subquad.selective_scan_step(state, one, one, np.zeros((1, 1)), one, one)
    >>> y
    array([3.])
    """
    arrays = u, delta, A, B, C, D, z, delta_bias, state
    softplus, limits = check_flag("delta_softplus", delta_softplus), check_limits(delta_limits)
    at_door = _made_at_door(limits, mask, delta_bias, softplus)
    kind = "selective_scan_step, delta at the door" if at_door else "selective_scan_step"
    form = form_of(kind, arrays, lambda: _form(arrays, time=0, at_door=at_door))
    time = form.step_time("u", u, mask)
    return _scan(form, arrays, softplus, limits, at_door, time, implementation)[:2]


@overload
def selective_scan(
    u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None = None, /, *, z: Array | None = None,
    delta_bias: Array | None = None, delta_softplus: bool = False, delta_limits: tuple[float, float] | None = None,
    initial_state: Array | None = None, return_state: Literal[False] = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: None = None, implementation: str = "auto",
) -> Array: ...  # fmt: skip
@overload
def selective_scan(
    u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None = None, /, *, z: Array | None = None,
    delta_bias: Array | None = None, delta_softplus: bool = False, delta_limits: tuple[float, float] | None = None,
    initial_state: Array | None = None, return_state: Literal[True], reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: None = None, implementation: str = "auto",
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def selective_scan(
    u: Array, delta: Array, A: Array, B: Array, C: Array, D: Array | None = None, /, *, z: Array | None = None,
    delta_bias: Array | None = None, delta_softplus: bool = False, delta_limits: tuple[float, float] | None = None,
    initial_state: Array | None = None, return_state: bool = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: Sequence[int] | every,
    implementation: str = "auto",
) -> tuple[Array, ...]: ...  # fmt: skip
@register_scan(
    "selective_scan",
    state=StateSpec({"state": ("d", "d_state"), "decay": ("d", "d_state")}, merge_by_decay),
    decay=decay,
    draw=draw,
    cost="n d d_state",
    positional=INPUTS[:6],
    step=selective_scan_step,
    activations=activations,
    reference=definition,
)
def selective_scan(
    u: Array,
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
    """Compute a selective state-space scan (S6), diagonal in the state.

        Δ[t] = softplus(delta[t] + delta_bias)         (the sum itself without delta_softplus), within delta_limits
        h[t] = exp(Δ[t] A) h[t−1] + Δ[t] B[t] u[t],    h[−1] = initial_state
        y[t] = (C[t]·h[t] + D u[t]) silu(z[t])         (2 Re(C[t]·h[t]) for complex A)

    Parameters
    ----------
    u : array, shape (..., n, d)
        Input sequence, of a real floating dtype.
    delta : array, shape (..., n, d)
        Step sizes, in the unit of time of `A`; they should be positive after bias and softplus.
    A : array, shape (d, d_state)
        Diagonal state matrix, per unit of time, real or complex; a negative real part keeps h bounded.
    B, C : array, shape (..., n, d_state) or (..., n, groups, d_state) or (d, d_state)
        Input and output maps, complex only if `A` is. The shape decides the form:

        - (..., n, d_state), with as many axes as `u`: one map for each step;
        - (..., n, groups, d_state), with one axis more than `u`: one map for each step and each group of d / groups
          consecutive channels;
        - (d, d_state): maps that do not depend on time, one for each channel.

        If `u` has batch axes, a map with two axes is always constant, even if n = d. A shape that fits two forms raises
        ValueError: (d, d_state) beside a two-axis `u` with n = d > 1, or groups that could be a batch axis that `u`
        lacks.
    D : array, shape (d,), optional
        Factors of the skip connection D u. Default: no skip connection.
    z : array, shape (..., n, d), optional
        Gate: the output is multiplied by silu(z) = z / (1 + exp(−z)).
    delta_bias : array, shape (d,), optional
        Bias that is added to `delta`, before softplus.
    delta_softplus : bool, default False
        Apply softplus(x) = log1p(exp(x)) to the step sizes.
    delta_limits : (float, float), optional
        Least and greatest step size: Δ is clipped to them, after softplus. Either may be infinite.
    initial_state : array, shape (..., d, d_state), optional
        The state before the first step (with `reverse`, after the last). Default: zero.
    return_state : bool, default False
        Return (y, state) instead of y.
    reverse : bool, default False
        Run time from the end: h[t] = exp(Δ[t] A) h[t+1] + Δ[t] B[t] u[t].
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
    y : array, shape (..., n, d)
        The output, in the dtype and on the device of `u`.
    state : array, shape (..., d, d_state)
        Only with `return_state`: the state after the last step (with `reverse`, the first), at least float32, complex
        if `A` is. As the `initial_state` of the next chunk, it continues this scan up to rounding.
    states : array, shape (p, ..., d, d_state)
        Only with `states_at`, last: for each position the state that a call on the first p steps returns (with
        `reverse`, the last p).

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a floating dtype, `segments` that are not integers, a `mask`
        that is not bool, `states_at` that are no positions, and `delta_limits` that are no two numbers.
    ValueError
        If shapes or devices do not fit, a position is not in 0 … n, the limits are not in order, or `implementation`
        cannot take the call; the message names the argument and what was expected.

    See Also
    --------
    selective_scan_step : One step of this recurrence.
    summarize_scan : State and decay of a chunk, for chunks that are processed apart.

    Notes
    -----
    O(n d d_state) operations; no array of size n d d_state exists. A is discretised by zero-order hold and B by Euler's
    rule, as in the reference implementation of [1]_. A state that is not finite stays so and reaches no other channel.
    Compiled kernels may give NaN where the generic form gives infinity: for slow decays they compute
    h + (exp(Δ A) − 1) h, which keeps the digits that rounding exp(Δ A) next to 1 would lose. Kernel: `selective_scan`.

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, algorithm 2.

    Examples
    --------
    With A = 0 and unit maps the state is a running sum:

    >>> import numpy as np, subquad
    >>> one = np.ones((3, 1))
    >>> subquad.selective_scan(one, one, np.zeros((1, 1)), one, one)[:, 0]
    array([1., 2., 3.])

    A sequence of two steps with padding before it, and the state after each step:

    >>> keep = np.asarray([False, True, True])
    >>> y, h = subquad.selective_scan(one, one, np.zeros((1, 1)), one, one, mask=keep, states_at=subquad.every(1))
    >>> y[:, 0], h[:, 0, 0]
    (array([0., 1., 2.]), array([0., 1., 2.]))
    """
    arrays = u, delta, A, B, C, D, z, delta_bias, initial_state
    softplus, reverse = check_flag("delta_softplus", delta_softplus), check_flag("reverse", reverse)
    return_state, limits = check_flag("return_state", return_state), check_limits(delta_limits)
    at_door = _made_at_door(limits, mask, delta_bias, softplus)
    kind = "selective_scan, delta at the door" if at_door else "selective_scan"
    try:
        form = form_of(kind, arrays, lambda: _form(arrays, time=1, at_door=at_door))
    except TypeError as error:
        options = {
            "z": z, "delta_bias": delta_bias, "delta_softplus": softplus, "delta_limits": limits,
            "initial_state": initial_state, "return_state": return_state, "reverse": reverse, "segments": segments,
            "mask": mask, "states_at": states_at, "implementation": implementation,
        }  # fmt: skip
        by_position = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D}
        return whole_call(error, "selective_scan", selective_scan, by_position, options)
    *batch, n, _ = form.shape_of(0)
    time = timeline(
        "u", u, tuple(batch), n, xp=form.xp, segments=segments, mask=mask, states_at=states_at, reverse=reverse
    )
    y, state, states = _scan(form, arrays, softplus, limits, at_door, time, implementation)
    return time.results(y, state, states, return_state=return_state)


def _made_at_door(limits: Any, mask: Array | None, delta_bias: Array | None, softplus: bool) -> bool:
    """Whether Δ is made before the kernel, which knows no limits, nor a delta that with any bias gives Δ = 0.

    With softplus it does know one: −∞.
    """
    return limits is not None or (mask is not None and delta_bias is not None and not softplus)


def _scan(
    form: Form, arrays: Sequence[Any], softplus: bool, limits: tuple[float, float] | None, at_door: bool,
    time: Timeline, implementation: str,
) -> tuple[Array, Array, list[Array] | None]:  # fmt: skip
    """(y, last state, states at positions) of a call, by its form."""
    xp = form.xp
    given = form.enter(arrays)
    if time.is_plain and not at_door:
        how = {"delta_softplus": softplus, "reverse": time.reverse}
        y, last = form.run(scan_kernel, (*given, None), implementation, **how)
        return form.leave(0, y), form.leave(1, last), None
    u, delta, A, B, C, D, z, delta_bias, state = given
    with form.computing(u):
        if at_door:  # padded steps are filled before too: 0 times the slope at a NaN is NaN
            delta = step_sizes(xp, time.filled(delta), delta_bias, softplus, limits)
            delta_bias, softplus = None, False
        # a padded step has Δ = 0 and no input, so h = 1 h + 0; −∞ is what softplus takes to 0, whatever the bias
        moving_B, moving_C = (None if x is None or x.ndim == 2 else x for x in (B, C))
        rows = [time.filled(x) for x in (u, z, moving_B, moving_C)]
        rows.append(time.filled(delta, -math.inf if softplus else 0.0))

        def scan(rows: Rows, state: Array | None, resets: Array | None) -> tuple[Array, Array]:
            u, z, moving_B, moving_C, delta = rows
            return scan_kernel(
                u, delta, A, B if moving_B is None else moving_B, C if moving_C is None else moving_C,
                D, z, delta_bias, state, resets,
                delta_softplus=softplus, reverse=time.reverse, implementation=implementation,
            )  # fmt: skip

        y, state, states = time.run(scan, rows, state)
    states = None if states is None else [form.leave(1, x) for x in states]
    return form.leave(0, y), form.leave(1, state), states


def _form(given: tuple[Any, ...], *, time: int, at_door: bool) -> Form:
    """The form of a scan (`time` 1) or of one step (`time` 0), after checks of the arrays."""
    arrays = dict(zip(INPUTS if time else STEP_INPUTS, given, strict=True))
    shapes = check_inputs(arrays, time=time)
    xp, batch, forms, (d, d_state) = shapes.xp, shapes.batch, shapes.forms, (shapes.d, shapes.d_state)
    u, delta, _, B, C, _, z, _, state = given
    n = u.shape[-2] if time else 1
    real, of_state = scan_dtypes(xp, given[2], *given)
    # dtype of u, delta and z: one half precision of all three stays, for the kernels that read and write it
    stored = real
    halves = is_half(xp, u.dtype) and all(x is None or x.dtype == u.dtype for x in (delta, z))
    if halves and real == xp.float32 and not at_door:  # beside a float64 array, all are computed in float64
        stored = u.dtype

    def rows(x: Array | None) -> Target | None:
        tail = (n, d) if time else (d,)
        target = flat_target(x, stored, batch, tail)
        return target if target is None else target._replace(shape=(_product(batch), n, d))

    def map_target(name: str, x: Array) -> Target:
        dtype = stored
        if x.dtype != stored:
            dtype = of_state if is_dtype(xp, x.dtype, "complex floating") else real
        rank = forms[name]  # number of axes for time, groups and state
        if not rank:
            return Target(dtype)
        groups = x.shape[-2] if rank == time + 2 else 1
        own = tuple(x.shape[: x.ndim - rank])
        if all(size == 1 for size in own):
            return Target(dtype, None, (1, n, groups, d_state))
        wide = None if own == batch else (*batch, *x.shape[x.ndim - rank :])
        return Target(dtype, wide, (_product(batch), n, groups, d_state))

    targets = (
        rows(u), rows(delta), Target(of_state), map_target("B", B), map_target("C", C), Target(real), rows(z),
        Target(real), flat_target(state, of_state, batch, (d, d_state)),
    )  # fmt: skip
    tail = (n, d) if time else (d,)
    return Form(xp, targets, (Target(u.dtype, None, (*batch, *tail)), Target(of_state, None, (*batch, d, d_state))))


def _product(sizes: tuple[int, ...]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count
