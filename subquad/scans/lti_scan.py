"""The scan of a fixed (linear, time-invariant) diagonal state-space model, S4D (Gu et al., 2022).

h[t] = Ā h[t−1] + B̄ u[t],    y[t] = C·h[t] + D u[t]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import numpy as np

from subquad.backend import Array
from subquad.core.beside import namespace_of
from subquad.core.checks import check_arrays, check_choice, check_flag, check_floating, check_given
from subquad.core.dtypes import is_dtype, scan_dtypes, stored_dtype
from subquad.core.shapes import broadcast_batch
from subquad.core.states import StateSpec, merge_by_decay
from subquad.kernels.lti_scan import lti_scan as scan_kernel
from subquad.registry import Host, Inputs, register_scan
from subquad.scans.call import Form, Target, flat_target, form_of
from subquad.scans.discretize import METHODS, growth_and_input
from subquad.scans.timeline import Timeline, timeline

INPUTS = ("u", "A", "B", "C", "D", "delta", "initial_state")
D_STATE = 32  # of example inputs: S4D's 64, as pairs of conjugates


def draw(rng: np.random.Generator, n: int) -> Inputs:
    """Example inputs: an S4D-Lin layer at initialisation, A = −1/2 + πi s, B = 1, Δ from 0.001 to 0.1, 64 channels."""
    d = 64
    return _layer(rng, rng.standard_normal((1, n, d)), d, D_STATE)


def activations(q: Host, k: Host, v: Host) -> Inputs:
    """An S4D-Lin layer at initialisation over the values."""
    return _layer(np.random.Generator(np.random.PCG64(0)), v, v.shape[-1], D_STATE)


def _layer(rng: np.random.Generator, u: Host, d: int, d_state: int) -> Inputs:
    A = np.tile(-0.5 + 1j * np.pi * np.arange(d_state), (d, 1))
    B, C = np.ones_like(A), rng.standard_normal((d, d_state, 2)) @ np.array([1, 1j]) * 0.5**0.5
    delta = np.exp(rng.uniform(np.log(1e-3), np.log(1e-1), d))
    return {"u": u, "A": A, "B": B, "C": C, "D": np.ones(d), "delta": delta}, {"discretization": "zoh"}


def definition(arrays: Mapping[str, Host], options: Mapping[str, Any]) -> Host:
    """The definition: y, step by step, in float64 or complex128."""
    wide = {name: np.asarray(x, np.result_type(x, np.float64)) for name, x in arrays.items()}
    u, A, B, C, delta = (wide[name] for name in ("u", "A", "B", "C", "delta"))
    x = delta[:, None] * A
    rule = options.get("discretization", "zoh")
    if rule == "bilinear":
        A_bar, B_bar = (1 + x / 2) / (1 - x / 2), delta[:, None] * B / (1 - x / 2)
    else:
        A_bar = 1 + x if rule == "euler" else np.exp(x)
        B_bar = np.expm1(x) / A * B if rule == "zoh" else delta[:, None] * B
    y = np.empty_like(u)
    h = np.zeros((*u.shape[:-2], *A.shape), A_bar.dtype) if "initial_state" not in wide else wide["initial_state"]
    steps = range(u.shape[-2])
    for t in reversed(steps) if options.get("reverse") else steps:
        h = A_bar * h + B_bar * u[..., t, :, None]
        y[..., t, :] = 2 * (h * C).sum(-1).real if np.iscomplexobj(A) else (h * C).sum(-1)
    return y + wide["D"] * u if "D" in wide else y


def decay(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Array:
    """Āⁿ, (..., d, d_state): the factor by which a chunk multiplies the state before it; n counts no padded steps.

    It is 0 where the state starts anew.
    """
    u, A, B = (arrays[name] for name in ("u", "A", "B"))
    xp, n = namespace_of(u), u.shape[-2]
    given = {name: options.get(name) for name in ("segments", "mask")}
    time = timeline("u", u, tuple(u.shape[:-2]), n, **given, reverse=bool(options.get("reverse")), fold=False)
    real, state = scan_dtypes(xp, A, *map(arrays.get, INPUTS))
    A, B, rule = xp.astype(A, state), xp.astype(B, state), options.get("discretization", "zoh")
    growth, _ = growth_and_input(xp, A, B, xp.astype(arrays["delta"], real), rule)
    count: Any = n if time.mask is None else xp.sum(xp.astype(time.mask, xp.int64), axis=-1)[..., None, None]
    total = xp.zeros_like(growth)
    for bit in range(n.bit_length()):  # Āⁿ − 1 by squaring: (1 + a)(1 + b) − 1 = a + b + a b
        more = total + growth + total * growth
        if time.mask is None:
            total = more if count >> bit & 1 else total
        else:
            total = xp.where((count >> bit) % 2 == 1, more, total)
        growth = growth * (2 + growth)
    whole = xp.broadcast_to(1 + total, (*u.shape[:-2], *A.shape))
    return time.restarted(whole, 0.0)


def lti_scan_step(
    state: Array | None,
    u: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    /,
    *,
    delta: Array,
    discretization: str = "zoh",
    mask: Array | None = None,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Compute one step of `lti_scan`, for decoding token by token; `u` has no time axis.

        h ← Ā h + B̄ u,    y = C·h + D u    (2 Re(C·h) for complex A)

    Parameters
    ----------
    state : array, shape (..., d, d_state), or None
        The state before the step; None means zero.
    u : array, shape (..., d)
        Input of one token.
    A, B, C : array, shape (d, d_state)
        The model, as in `lti_scan`.
    D : array, shape (d,), optional
        Factors of the skip connection D u.
    delta : array, shape (d,)
        Step size of each channel.
    discretization : {"zoh", "bilinear", "euler", "mamba"}, default "zoh"
        The rule of `discretize`.
    mask : array of bool, shape (...), optional
        A step where it is False leaves the state as it is and gives 0.
    implementation : str, default "auto"
        "auto", "generic", or the name of an override of the kernel `lti_scan`; see `subquad.explain`.

    Returns
    -------
    y : array, shape (..., d)
        The output, in the dtype and on the device of `u`.
    state : array, shape (..., d, d_state)
        The state after the step, at least float32, complex if `A` is. The state given is not written to.

    Raises
    ------
    TypeError, ValueError
        As `lti_scan` raises them.

    See Also
    --------
    lti_scan : The scan over a whole sequence.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> one, state = np.ones((1, 1)), None
    >>> for _ in range(3):
    ...     y, state = subquad.lti_scan_step(state, np.ones(1), 0 * one, one, one, delta=np.ones(1))
    >>> y
    array([3.])
    """
    arrays = u, A, B, C, D, delta, state
    form = form_of("lti_scan_step", arrays, lambda: _form(*arrays, time=0))
    time = form.step_time("u", u, mask)
    y, state, _ = _scan(form, time, arrays, discretization, implementation)
    return y, state


@overload
def lti_scan(
    u: Array, A: Array, B: Array, C: Array, D: Array | None = None, /, *, delta: Array, discretization: str = "zoh",
    initial_state: Array | None = None, return_state: Literal[False] = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: None = None, implementation: str = "auto",
) -> Array: ...  # fmt: skip
@overload
def lti_scan(
    u: Array, A: Array, B: Array, C: Array, D: Array | None = None, /, *, delta: Array, discretization: str = "zoh",
    initial_state: Array | None = None, return_state: bool = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: Any = None, implementation: str = "auto",
) -> Any: ...  # fmt: skip
@register_scan(
    "lti_scan",
    state=StateSpec({"state": ("d", "d_state"), "decay": ("d", "d_state")}, merge_by_decay),
    decay=decay,
    draw=draw,
    cost="n d d_state",
    positional=INPUTS[:5],
    step=lti_scan_step,
    activations=activations,
    reference=definition,
)
def lti_scan(
    u: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    /,
    *,
    delta: Array,
    discretization: str = "zoh",
    initial_state: Array | None = None,
    return_state: bool = False,
    reverse: bool = False,
    segments: Array | None = None,
    mask: Array | None = None,
    states_at: Any = None,
    implementation: str = "auto",
) -> Any:
    """Compute the output of a fixed diagonal state-space model (S4D), each channel on its own.

        Ā, B̄ = discretize(A, B, delta, discretization)
        h[t] = Ā h[t−1] + B̄ u[t],    h[−1] = initial_state
        y[t] = C·h[t] + D u[t]         (2 Re(C·h[t]) for complex A)

    Parameters
    ----------
    u : array, shape (..., n, d)
        Input sequence, of a real floating dtype.
    A : array, shape (d, d_state)
        Diagonal state matrix, per unit of time, real or complex; complex states stand for pairs of conjugates.
    B, C : array, shape (d, d_state)
        Input and output maps, complex only if `A` is.
    D : array, shape (d,), optional
        Factors of the skip connection D u. Default: no skip connection.
    delta : array, shape (d,)
        Step size Δ of each channel, in the unit of time of `A`.
    discretization : {"zoh", "bilinear", "euler", "mamba"}, default "zoh"
        The rule of `discretize`.
    initial_state : array, shape (..., d, d_state), optional
        The state before the first step (with `reverse`, after the last). Default: zero.
    return_state : bool, default False
        Return (y, state) instead of y.
    reverse : bool, default False
        Run time from the end: h[t] = Ā h[t+1] + B̄ u[t].
    segments : array of int, shape (..., n), optional
        Numbers of documents: the state starts from 0 before a step whose number differs from that of the step before.
    mask : array of bool, shape (..., n), optional
        False for a padded step, which leaves the state as it is and gives 0.
    states_at : sequence of int, or `subquad.every`, optional
        Positions p in 0 … n: the states after p steps are returned too. ``every(k)`` is (k, 2k, …).
    implementation : str, default "auto"
        "auto", "generic", or the name of a kernel; see `subquad.explain`.

    Returns
    -------
    y : array, shape (..., n, d)
        The output, in the dtype and on the device of `u`.
    state : array, shape (..., d, d_state)
        Only with `return_state`: the state after the last step (with `reverse`, the first), at least float32, complex
        if `A` is. As the `initial_state` of the next chunk, it continues this scan.
    states : array, shape (p, ..., d, d_state)
        Only with `states_at`, last: for each position the state that a call on the first p steps returns (with
        `reverse`, the last p).

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a floating dtype, and for complex maps of a real `A`.
    ValueError
        If shapes or devices do not fit, `discretization` is unknown, or `implementation` cannot take the call; the
        message names the argument and what was expected.

    See Also
    --------
    lti_scan_step : One step of this scan.
    discretize : The rules, and Ā and B̄ themselves.
    selective_scan : The scan whose Δ, B and C depend on the input.

    Notes
    -----
    The output is the convolution of u with the kernel K[i] = C·(Āⁱ B̄), which papers compute by FFT [1]_. The compiled
    kernel computes the recurrence, 10 operations a step for each complex state, with states in registers; the generic
    form multiplies chunks of 64 steps with small matrices. Both take less time than an FFT at the sizes in use, have
    the last state at no cost, and memory that does not grow with n. The digits of slow decays are kept, as the kernel
    has Ā − 1. A value that is not finite reaches the later steps of its channel; in the generic form also those of its
    chunk. Kernel: `lti_scan`.

    References
    ----------
    .. [1] A. Gu, A. Gupta, K. Goel, C. Ré, "On the Parameterization and Initialization of Diagonal State Space Models",
       NeurIPS 2022.

    Examples
    --------
    With A = 0 the state is a running sum, in units of Δ:

    >>> import numpy as np, subquad
    >>> one = np.ones((1, 1))
    >>> subquad.lti_scan(np.ones((3, 1)), 0 * one, one, one, delta=np.full(1, 0.5))[:, 0]
    array([0.5, 1. , 1.5])
    """
    arrays = u, A, B, C, D, delta, initial_state
    form = form_of("lti_scan", arrays, lambda: _form(*arrays, time=1))
    reverse, return_state = check_flag("reverse", reverse), check_flag("return_state", return_state)
    *batch, n, _ = form.shape_of(0)
    time = timeline(
        "u", u, tuple(batch), n, xp=form.xp, segments=segments, mask=mask, states_at=states_at, reverse=reverse
    )
    return time.results(*_scan(form, time, arrays, discretization, implementation), return_state=return_state)


def _scan(
    form: Form, time: Timeline, arrays: tuple[Any, ...], discretization: str, implementation: str
) -> tuple[Array, Array, list[Array] | None]:
    """(y, last state, states at positions) of a call, by its form."""
    check_choice("discretization", discretization, METHODS)
    xp = form.xp
    u, A, B, C, D, delta, start = form.enter(arrays)

    with form.computing(u):
        rate, B_bar = growth_and_input(xp, A, B, delta, discretization)
        if time.is_plain:
            given = u, rate, B_bar, C, D, start, None, None
            y, state = form.run(scan_kernel, given, implementation, reverse=time.reverse)
            return form.leave(0, y), form.leave(1, state), None

        def scan(rows: Any, state: Any, resets: Array | None) -> tuple[Array, Array]:
            u, mask = rows
            return scan_kernel(
                u, rate, B_bar, C, D, state, resets, mask, reverse=time.reverse, implementation=implementation
            )

        y, state, states = time.run(scan, (time.filled(u), time.mask), start)
    found = None if states is None else [form.leave(1, x) for x in states]
    return form.leave(0, y), form.leave(1, state), found


def _form(
    u: Array, A: Array, B: Array, C: Array, D: Array | None, delta: Array, state: Array | None, *, time: int
) -> Form:
    """The form of a scan (`time` 1) or of one step (`time` 0), after checks of the arrays."""
    check_given(u=u, A=A, B=B, C=C, delta=delta)
    name_of_state = "initial_state" if time else "state"
    arrays: dict[str, Any] = {"u": u, "A": A, "B": B, "C": C, "D": D, "delta": delta, name_of_state: state}
    xp = check_arrays(**arrays)
    check_floating(xp, **{name: arrays[name] for name in ("u", "D", "delta")})
    check_floating(xp, complex_too=True, **{name: arrays[name] for name in ("A", "B", "C", name_of_state)})
    if u.ndim <= time:
        expected = "(..., n, d) with at least two axes" if time else "(..., d)"
        msg = f"u has shape {tuple(u.shape)}, expected {expected}"
        raise ValueError(msg)
    d = u.shape[-1]
    if A.ndim != 2 or A.shape[0] != d or A.shape[1] == 0:
        msg = f"A has shape {tuple(A.shape)}, expected ({d}, d_state): one row per channel of u {tuple(u.shape)}"
        raise ValueError(msg)
    for name, shape in (("B", tuple(A.shape)), ("C", tuple(A.shape)), ("D", (d,)), ("delta", (d,))):
        x = arrays[name]
        if x is not None and tuple(x.shape) != shape:
            msg = f"{name} has shape {tuple(x.shape)}, expected {shape} for A {tuple(A.shape)}"
            raise ValueError(msg)
    if state is not None and tuple(state.shape[-2:]) != tuple(A.shape):
        msg = f"{name_of_state} has shape {tuple(state.shape)}, expected (..., {d}, {A.shape[1]})"
        raise ValueError(msg)
    if not is_dtype(xp, A.dtype, "complex floating"):
        for name in ("B", "C", name_of_state):
            x = arrays[name]
            if x is not None and is_dtype(xp, x.dtype, "complex floating"):
                msg = f"{name} is complex ({x.dtype}) but A is real; make A complex too, or take the real part"
                raise TypeError(msg)
    batches = {"u": u.shape[: -1 - time]}
    batches |= {} if state is None else {name_of_state: state.shape[:-2]}
    batch = broadcast_batch(**batches)
    real, of_state = scan_dtypes(xp, A, u, B, C, D, delta, state)
    rows = flat_target(u, stored_dtype(xp, u, real), batch, tuple(u.shape[-1 - time :]))
    assert rows is not None
    assert rows.shape is not None
    rows = rows if time else rows._replace(shape=(rows.shape[0], 1, d))
    shared = (Target(of_state), Target(of_state), Target(of_state), Target(real), Target(real))
    targets = (rows, *shared, flat_target(state, of_state, batch, tuple(A.shape)))
    out = Target(u.dtype, None, (*batch, *u.shape[-1 - time :]))
    return Form(xp, targets, (out, Target(of_state, None, (*batch, *A.shape))))
