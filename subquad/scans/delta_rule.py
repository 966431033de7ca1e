"""The delta rule: linear attention whose state forgets the old value of a key before it learns the new one.

S[t] = (I − β[t] k[t] k[t]ᵀ) diag(exp g[t]) S[t−1] + β[t] k[t] v[t]ᵀ,    o[t] = scale S[t]ᵀ q[t]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np

from subquad.backend import Array
from subquad.core.beside import namespace_of, place_of
from subquad.core.checks import check_arrays, check_flag, check_floating, check_given, check_number
from subquad.core.dtypes import common_dtype, compute_dtype, stored_dtype
from subquad.core.shapes import broadcast_batch
from subquad.core.states import StateSpec, merge_by_transition
from subquad.kernels.delta_scan import delta_scan
from subquad.registry import Host, Inputs, register_scan
from subquad.scans.call import Form, Target, form_of
from subquad.scans.rows import check_first, check_tails, row_target, state_target
from subquad.scans.timeline import Rows, Timeline, every, timeline

INPUTS = ("q", "k", "v", "beta", "g", "initial_state")
STEP_INPUTS = (*INPUTS[:-1], "state")
WHY = {  # what the axes of each input are, for errors
    "q": "rows as of k",
    "v": "one value per key",
    "beta": "one number per key",
    "g": "one decay for each step, with a last axis of length 1, or one for each channel",
}


def draw(rng: np.random.Generator, n: int) -> Inputs:
    """Example inputs: a gated DeltaNet layer, with keys and queries of length 1 and a memory of 10 to 1000 steps."""
    heads, d = 2, 64
    q, k, v = rng.standard_normal((3, 1, heads, n, d))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    beta = 1 / (1 + np.exp(-rng.standard_normal((1, heads, n))))
    g = -np.exp(rng.uniform(np.log(1e-3), np.log(0.1), (1, heads, n, 1)))
    return {"q": q, "k": k, "v": v, "beta": beta, "g": g}, {"scale": 1.0}


def activations(q: Host, k: Host, v: Host) -> Inputs:
    """A gated DeltaNet layer over real activations.

    Queries (those of the first head that shares a key head) and keys have length 1, β = sigmoid(mean of k), and
    g = −softplus(mean of q) / 10, means over the channels.
    """
    if q.ndim > 2:
        q = q[..., :: q.shape[-3] // k.shape[-3], :, :]
    beta, gate = 1 / (1 + np.exp(-np.mean(k, axis=-1))), np.mean(q, axis=-1, keepdims=True)
    q, k = (x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-6) for x in (q, k))
    return {"q": q, "k": k, "v": v, "beta": beta, "g": -np.logaddexp(0, gate) / 10}, {"scale": 1.0}


def definition(arrays: Mapping[str, Host], options: Mapping[str, Any]) -> Host:
    """The definition: o, step by step, in float64; batch shapes are equal."""
    q, k, v, beta = (np.asarray(arrays[name], np.float64) for name in INPUTS[:4])
    g = np.asarray(arrays.get("g", np.zeros((*k.shape[:-1], 1))), np.float64)
    scale = options.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    S = np.asarray(arrays.get("initial_state", np.zeros((*k.shape[:-2], k.shape[-1], v.shape[-1]))), np.float64)
    o, steps = np.empty(v.shape), range(v.shape[-2])
    for t in reversed(steps) if options.get("reverse") else steps:
        S = np.exp(g[..., t, :, None]) * S
        old = (S * k[..., t, :, None]).sum(axis=-2)
        S = S + k[..., t, :, None] * (beta[..., t, None] * (v[..., t, :] - old))[..., None, :]
        o[..., t, :] = scale * (S * q[..., t, :, None]).sum(axis=-2)
    return o


def transition(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Array:
    """Π_t (I − β[t] k[t] k[t]ᵀ) diag(exp g[t]), (..., d, d): what a chunk multiplies the state before it by.

    It is the state that the scan reaches from the unit matrix with values of 0.
    """
    k = arrays["k"]
    xp = namespace_of(k)
    unit = xp.eye(k.shape[-1], dtype=compute_dtype(xp, *(arrays.get(name) for name in INPUTS)), device=place_of(k))
    kept = {name: x for name, x in options.items() if name in ("reverse", "segments", "mask", "implementation")}
    _, last = delta_rule(
        *(k, k, xp.zeros_like(k), arrays["beta"], arrays.get("g")), **kept, initial_state=unit, return_state=True
    )
    return last


def delta_rule_step(
    state: Array | None,
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None = None,
    /,
    *,
    scale: float | None = None,
    mask: Array | None = None,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Compute one step of `delta_rule`, for decoding token by token; the arrays have no time axis.

        S ← diag(exp g) S,    S ← S + β k (v − Sᵀ k)ᵀ,    o = scale Sᵀ q

    Parameters
    ----------
    state : array, shape (..., d, d_v), or None
        The state before the step; None means zero.
    q, k : array, shape (..., d)
        Query and key of one token.
    v : array, shape (..., d_v)
        Value of the token.
    beta : array, shape (...)
        Strength of the update.
    g : array, shape (..., d) or (..., 1), optional
        Logarithm of the decay. Default: no decay.
    scale : float, optional
        Factor of the output. Default: d^−½.
    mask : array of bool, broadcastable to (...), optional
        False for an item whose sequence has ended: its state stays as it is, and its o is 0.
    implementation : str, default "auto"
        "auto", "generic", or the name of an override of the kernel `delta_scan`; see `subquad.explain`.

    Returns
    -------
    o : array, shape (..., d_v)
        The output, in the common dtype of `q`, `k` and `v` and on their device.
    state : array, shape (..., d, d_v)
        The state after the step, at least float32. The state given is not written to.

    Raises
    ------
    TypeError, ValueError
        As `delta_rule` raises them.

    See Also
    --------
    delta_rule : The scan over a whole sequence.

    Examples
    --------
    A key is asked for its value after another value has replaced the first:

    >>> import numpy as np, subquad
    >>> k, beta, state = np.asarray([0.6, 0.8]), np.asarray(1.0), None
    >>> for value in (3.0, 5.0):
    ...     o, state = subquad.delta_rule_step(state, k, k, np.asarray([value]), beta, scale=1.0)
    >>> o
    array([5.])
    """
    arrays = q, k, v, beta, g, state
    form = form_of("delta_rule_step", arrays, lambda: _form(arrays, time=0))
    time = form.step_time("q", q, mask)
    return _scan(form, arrays, scale, time, implementation)[:2]


@overload
def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, g: Array | None = None, /, *, scale: float | None = None,
    initial_state: Array | None = None, return_state: Literal[False] = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: None = None, implementation: str = "auto",
) -> Array: ...  # fmt: skip
@overload
def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, g: Array | None = None, /, *, scale: float | None = None,
    initial_state: Array | None = None, return_state: Literal[True], reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: None = None, implementation: str = "auto",
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def delta_rule(
    q: Array, k: Array, v: Array, beta: Array, g: Array | None = None, /, *, scale: float | None = None,
    initial_state: Array | None = None, return_state: bool = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: Sequence[int] | every,
    implementation: str = "auto",
) -> tuple[Array, ...]: ...  # fmt: skip
@register_scan(
    "delta_rule",
    state=StateSpec({"state": ("d", "d_v"), "transition": ("d", "d")}, merge_by_transition),
    decay=transition,
    draw=draw,
    cost="n d d_v",
    positional=INPUTS[:5],
    step=delta_rule_step,
    activations=activations,
    reference=definition,
)
def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    beta: Array,
    g: Array | None = None,
    /,
    *,
    scale: float | None = None,
    initial_state: Array | None = None,
    return_state: bool = False,
    reverse: bool = False,
    segments: Array | None = None,
    mask: Array | None = None,
    states_at: Sequence[int] | every | None = None,
    implementation: str = "auto",
) -> Any:
    """Compute linear attention with the delta rule, gated or not (DeltaNet, Gated DeltaNet, Kimi Delta Attention).

        S[t] = (I − β[t] k[t] k[t]ᵀ) diag(exp g[t]) S[t−1] + β[t] k[t] v[t]ᵀ,    S[−1] = initial_state
        o[t] = scale S[t]ᵀ q[t]

    Parameters
    ----------
    q, k : array, shape (..., n, d)
        Queries and keys. Keys should have length 1, or β ‖k‖² at most 2: beyond that the state may grow without bound.
    v : array, shape (..., n, d_v)
        Values. Batch axes (heads included) broadcast by the standard's rules.
    beta : array, shape (..., n)
        Strength of each update: 0 leaves the state as it is, 1 replaces the value of a key of length 1.
    g : array, shape (..., n, 1) or (..., n, d), optional
        Logarithm of the decay, one for all channels of the key or one for each; −inf forgets all. Default: no decay.
    scale : float, optional
        Factor of the output. Default: d^−½.
    initial_state : array, shape (..., d, d_v), optional
        The state before the first step (with `reverse`, after the last). Default: zero.
    return_state : bool, default False
        Return (o, state) instead of o.
    reverse : bool, default False
        Run time from the end: S[t] is made of S[t+1].
    segments : array of int, broadcastable to (..., n), optional
        Numbers of the documents in a packed sequence: S starts anew from 0 where the number changes. `initial_state`
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
    o : array, shape (..., n, d_v)
        The output, in the common dtype of `q`, `k` and `v` and on their device.
    state : array, shape (..., d, d_v)
        Only with `return_state`: the state after the last step (with `reverse`, the first), at least float32. As the
        `initial_state` of the next chunk, it continues this scan up to rounding.
    states : array, shape (p, ..., d, d_v)
        Only with `states_at`, last: for each position the state that a call on the first p steps returns (with
        `reverse`, the last p).

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a real floating dtype, a `scale` that is no number,
        `segments` that are not integers, a `mask` that is not bool, and `states_at` that are no positions.
    ValueError
        If shapes or devices do not fit, a position is not in 0 … n, or `implementation` cannot take the call; the
        message names the argument and what was expected.

    See Also
    --------
    delta_rule_step : One step of this recurrence.
    summarize_scan : State and transition of a chunk, for chunks that are processed apart.

    Notes
    -----
    O(n d d_v) operations. Without g this is DeltaNet [1]_, with one decay for each step Gated DeltaNet [2]_, equation
    10, and with one for each channel Kimi Delta Attention [3]_, equation 1. float16 and bfloat16 are computed in
    float32. Generic code computes chunks of steps by products of matrices, with the WY form of [1]_: numbers that
    overflow there may reach all steps of their chunk, of another document too. Compiled kernels walk through time. A
    chunk multiplies the state by a matrix (d, d), so `summarize_scan` gives that matrix in place of a decay. Kernel:
    `delta_scan`.

    References
    ----------
    .. [1] S. Yang, B. Wang, Y. Zhang, Y. Shen, Y. Kim, "Parallelizing Linear Transformers with the Delta Rule over
       Sequence Length", NeurIPS 2024.
    .. [2] S. Yang, J. Kautz, A. Hatamizadeh, "Gated Delta Networks: Improving Mamba2 with Delta Rule", ICLR 2025.
    .. [3] Kimi Team, "Kimi Linear: An Expressive, Efficient Attention Architecture", 2025.

    Examples
    --------
    The second value of a key replaces the first, where linear attention would add them:

    >>> import numpy as np, subquad
    >>> k, v = np.asarray([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), np.asarray([[1.0], [2.0], [5.0]])
    >>> subquad.delta_rule(k, k, v, np.ones(3), scale=1.0)[:, 0]
    array([1., 2., 5.])
    """
    arrays = q, k, v, beta, g, initial_state
    form = form_of("delta_rule", arrays, lambda: _form(arrays, time=1))
    return_state, reverse = check_flag("return_state", return_state), check_flag("reverse", reverse)
    *batch, n, _ = form.shape_of(0)
    time = timeline(
        "q", q, tuple(batch), n, xp=form.xp, segments=segments, mask=mask, states_at=states_at, reverse=reverse
    )
    return time.results(*_scan(form, arrays, scale, time, implementation), return_state=return_state)


def _scan(
    form: Form, arrays: Sequence[Any], scale: Any, time: Timeline, implementation: str
) -> tuple[Array, Array, list[Array] | None]:
    """(o, last state, states at positions) of a call, by its form."""
    factor = float(arrays[0].shape[-1] ** -0.5 if scale is None else check_number("scale", scale))
    *rows, state = form.enter(arrays)
    if time.is_plain:
        q, k, v, beta, g = rows
        given = q, k, v, g, beta, None, None, state, None
        o, state = form.run(delta_scan, given, implementation, scale=factor, reverse=time.reverse)
        return form.leave(0, o), form.leave(1, state), None
    with form.computing(rows[0]):
        rows = [time.filled(x) for x in rows]  # a padded step has no k, and a decay of 1

        def scan(rows: Rows, state: Array | None, resets: Array | None) -> tuple[Array, Array]:
            q, k, v, beta, g = rows
            return delta_scan(
                *(q, k, v, g, beta, None, None, state, resets),
                scale=factor, reverse=time.reverse, implementation=implementation,
            )  # fmt: skip

        o, state, states = time.run(scan, rows, state)
    states = None if states is None else [form.leave(1, x) for x in states]
    return form.leave(0, o), form.leave(1, state), states


def _form(given: tuple[Any, ...], *, time: int) -> Form:
    """The form of a scan (`time` 1) or of one step (`time` 0), after checks of the arrays."""
    arrays = dict(zip(INPUTS if time else STEP_INPUTS, given, strict=True))
    check_given(**{name: arrays[name] for name in INPUTS[:4]})
    xp = check_arrays(**arrays)
    check_floating(xp, **arrays)
    steps, d, d_v = check_first(arrays, time)
    q, k, v, _, g, state = given
    decays = 1 if g is not None and 1 in g.shape[-1:] else d
    name = "initial_state" if time else "state"
    tails = {
        "q": (*steps, d),
        "k": (*steps, d),
        "v": (*steps, d_v),
        "beta": steps,
        "g": (*steps, decays),
        name: (d, d_v),
    }
    batch = broadcast_batch(**check_tails(arrays, tails, WHY | {name: "channels of k × channels of v"}))
    compute = compute_dtype(xp, *given)
    targets = (
        *(
            row_target(x, stored_dtype(xp, x, compute), batch, tail, time)
            for x, tail in zip(given[:5], tails.values(), strict=False)
        ),
        state_target(state, compute, batch, (d, d_v)),
    )
    out = Target(common_dtype(xp, q, k, v), None, (*batch, *steps, d_v))
    return Form(xp, targets, (out, Target(compute, None, (*batch, d, d_v))))
