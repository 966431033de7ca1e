"""The linear scan: the recurrence that diagonal state-space models and gated linear RNNs have in common.

h[t] = a[t] h[t−1] + b[t]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Literal, overload

import numpy as np

from subquad.backend import Array
from subquad.core.beside import namespace_of, place_of
from subquad.core.checks import check_arrays, check_flag, check_floating, check_given, whole_call
from subquad.core.dtypes import common_dtype, compute_dtype, is_dtype, stored_dtype
from subquad.core.shapes import broadcast_batch
from subquad.core.states import StateSpec, merge_by_decay
from subquad.kernels.linear_scan import linear_scan as scan_kernel
from subquad.registry import Host, Inputs, register_scan
from subquad.scans.call import Form, Target, flat_target, form_of
from subquad.scans.timeline import Timeline, every, timeline


def draw(rng: np.random.Generator, n: int) -> Inputs:
    """Example inputs: factors with a memory of 1 to 100 steps, and terms of a size that keeps h near 1."""
    a = np.exp(-np.exp(rng.uniform(np.log(0.01), 0.0, (2, n, 64))))
    return {"a": a, "b": np.sqrt(1 - a * a) * rng.standard_normal(a.shape)}, {}


def activations(q: Host, k: Host, v: Host) -> Inputs:
    """A gated recurrence over real activations: b = v, and a = 0.9 + 0.1 sigmoid(mean of k over its channels)."""
    gate = np.mean(k, axis=-1, keepdims=True)
    return {"a": 0.9 + 0.1 / (1 + np.exp(-np.broadcast_to(gate, v.shape))), "b": v}, {}


def definition(arrays: Mapping[str, Host], options: Mapping[str, Any]) -> Host:
    """The definition: h[t] = a[t] h[t−1] + b[t], step by step, in float64 or complex128."""
    a, b = (np.asarray(arrays[name], np.result_type(arrays[name], np.float64)) for name in ("a", "b"))
    a, b = np.broadcast_arrays(a, b)
    start = arrays.get("initial_state")
    h = np.zeros((*b.shape[:-2], b.shape[-1]), b.dtype) if start is None else np.asarray(start)
    out = np.empty(np.broadcast_shapes(b.shape, (*h.shape[:-1], 1, h.shape[-1])), np.result_type(a, b, h))
    steps = range(b.shape[-2])
    for t in reversed(steps) if options.get("reverse") else steps:
        h = out[..., t, :] = a[..., t, :] * h + b[..., t, :]
    return out


def decay(arrays: Mapping[str, Any], options: Mapping[str, Any]) -> Array:
    """Π_t a[t], (..., d): the factor by which a chunk multiplies the state before it."""
    a, b = arrays["a"], arrays["b"]
    xp = namespace_of(a)
    batch = broadcast_batch(a=a.shape[:-2], b=b.shape[:-2])
    given = {name: options.get(name) for name in ("segments", "mask")}
    time = timeline("a", a, batch, a.shape[-2], **given, reverse=bool(options.get("reverse")), fold=False)
    factors = time.filled(xp.astype(a, compute_dtype(xp, a, b)), 1.0, axis=-2)
    return time.restarted(xp.prod(factors, axis=-2), 0.0)


def linear_scan_step(
    state: Array | None, a: Array, b: Array, /, *, mask: Array | None = None, implementation: str = "auto"
) -> tuple[Array, Array]:
    """Compute one step of `linear_scan`, for decoding token by token; the arrays have no time axis.

        h = a state + b

    Parameters
    ----------
    state : array, shape (..., d), or None
        The state before the step; None means zero.
    a, b : array, shape (..., d)
        Factors and terms of one step, real or complex.
    mask : array of bool, broadcastable to (...), optional
        False for an item whose sequence has ended: its state stays as it is, and its h is 0.
    implementation : str, default "auto"
        "auto", "generic", or the name of an override of the kernel `linear_scan`; see `subquad.explain`.

    Returns
    -------
    h : array, shape (..., d)
        The state, in the dtype that `linear_scan` gives h.
    state : array, shape (..., d)
        The state after the step, at least float32. The state given is not written to.

    Raises
    ------
    TypeError, ValueError
        As `linear_scan` raises them.

    See Also
    --------
    linear_scan : The scan over a whole sequence.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> half, state = np.full(1, 0.5), None
    >>> for _ in range(3):
    ...     h, state = subquad.linear_scan_step(state, half, np.ones(1))
    >>> h
    array([1.75])
    """
    arrays = a, b, state
    form = form_of("linear_scan_step", arrays, lambda: _form(*arrays, time=0))
    time = form.step_time("a", a, mask)
    return _scan(form, arrays, time, implementation)[:2]


@overload
def linear_scan(
    a: Array, b: Array, /, *, initial_state: Array | None = None, return_state: Literal[False] = False,
    reverse: bool = False, segments: Array | None = None, mask: Array | None = None, states_at: None = None,
    implementation: str = "auto",
) -> Array: ...  # fmt: skip
@overload
def linear_scan(
    a: Array, b: Array, /, *, initial_state: Array | None = None, return_state: Literal[True], reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: None = None, implementation: str = "auto",
) -> tuple[Array, Array]: ...  # fmt: skip
@overload
def linear_scan(
    a: Array, b: Array, /, *, initial_state: Array | None = None, return_state: bool = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: Sequence[int] | every,
    implementation: str = "auto",
) -> tuple[Array, ...]: ...  # fmt: skip
@register_scan(
    "linear_scan",
    state=StateSpec({"state": ("d",), "decay": ("d",)}, merge_by_decay),
    decay=decay,
    draw=draw,
    cost="n d",
    positional=("a", "b"),
    step=linear_scan_step,
    activations=activations,
    reference=definition,
)
def linear_scan(
    a: Array,
    b: Array,
    /,
    *,
    initial_state: Array | None = None,
    return_state: bool = False,
    reverse: bool = False,
    segments: Array | None = None,
    mask: Array | None = None,
    states_at: Sequence[int] | every | None = None,
    implementation: str = "auto",
) -> Any:
    """Compute a linear recurrence of the first order, each channel on its own.

        h[t] = a[t] h[t−1] + b[t],    h[−1] = initial_state

    Parameters
    ----------
    a : array, shape (..., n, d)
        Factors, real or complex; h may grow without bound if their absolute value exceeds 1.
    b : array, shape (..., n, d)
        Terms, real or complex. Batch axes broadcast against those of `a`.
    initial_state : array, shape (..., d), optional
        The state before the first step (with `reverse`, after the last). Default: zero.
    return_state : bool, default False
        Return (h, state) instead of h.
    reverse : bool, default False
        Run time from the end: h[t] = a[t] h[t+1] + b[t].
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
    h : array, shape (..., n, d)
        The states, in the common dtype of `a` and `b`, or complex if `initial_state` is, and on their device.
    state : array, shape (..., d)
        Only with `return_state`: the state after the last step (with `reverse`, the first), at least float32. As the
        `initial_state` of the next chunk, it continues this scan up to rounding.
    states : array, shape (p, ..., d)
        Only with `states_at`, last: for each position the state that a call on the first p steps returns (with
        `reverse`, the last p).

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a floating dtype, `segments` that are not integers, a `mask`
        that is not bool, and `states_at` that are no positions.
    ValueError
        If shapes or devices do not fit, a position is not in 0 … n, or `implementation` cannot take the call; the
        message names the argument and what was expected.

    See Also
    --------
    linear_scan_step : One step of this recurrence.
    selective_scan : The scan whose factors and terms come from step sizes and maps.
    summarize_scan : State and decay of a chunk, for chunks that are processed apart.

    Notes
    -----
    O(n d) operations and O(n d) numbers in memory. float16 and bfloat16 are computed in float32. The generic form
    advances runs of the sequence together and joins them by a parallel prefix [1]_, [2]_. It multiplies consecutive
    factors and never divides. If factors exceed 1, such a product may overflow though h does not, and h is then not
    finite. Overrides that walk through time form no products of factors. Kernel: `linear_scan`.

    References
    ----------
    .. [1] G. E. Blelloch, "Prefix Sums and Their Applications", CMU-CS-90-190, 1990, section 1.4.
    .. [2] E. Martin, C. Cundy, "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", ICLR 2018.

    Examples
    --------
    A factor of 1 gives the running sum, a factor of 0 starts anew:

    >>> import numpy as np, subquad
    >>> a, b = np.asarray([1.0, 1.0, 0.0, 1.0]), np.ones((4, 1))
    >>> subquad.linear_scan(a[:, None], b)[:, 0]
    array([1., 2., 1., 2.])

    Two documents in one sequence, and the states after the second step and the fourth:

    >>> h, states = subquad.linear_scan(b, b, segments=np.asarray([7, 7, 7, 8]), states_at=(2, 4))
    >>> h[:, 0], states[:, 0]
    (array([1., 2., 3., 1.]), array([2., 1.]))
    """
    arrays = a, b, initial_state
    try:
        rounds = return_state is False and states_at is None  # a state is a row of h that is not rounded
        kind = "linear_scan" if rounds else "linear_scan with states"
        form = form_of(kind, arrays, lambda: _form(*arrays, time=1, rounds=rounds))
    except TypeError as error:
        options = {
            "initial_state": initial_state, "return_state": return_state, "reverse": reverse, "segments": segments,
            "mask": mask, "states_at": states_at, "implementation": implementation,
        }  # fmt: skip
        return whole_call(error, "linear_scan", linear_scan, {"a": a, "b": b}, options)
    reverse, return_state = check_flag("reverse", reverse), check_flag("return_state", return_state)
    *batch, n, _ = form.shape_of(0)
    time = timeline(
        "a", a, tuple(batch), n, xp=form.xp, segments=segments, mask=mask, states_at=states_at, reverse=reverse
    )
    if not return_state and time.positions is None:
        return _scan(form, arrays, time, implementation, with_state=False)[0]
    return time.results(*_scan(form, arrays, time, implementation), return_state=return_state)


def _scan(
    form: Form, arrays: tuple[Any, ...], time: Timeline, implementation: str, *, with_state: bool = True
) -> tuple[Array, Array | None, list[Array] | None]:
    """(h, last state or None, states at positions) of a call, by its form: all states are rows of h."""
    a, b, start = form.enter(arrays)
    if time.is_plain:
        h = form.run(scan_kernel, (a, b, start, None), implementation, reverse=time.reverse)
        return form.leave(0, h), form.leave(1, _state_at(time, h, start, time.n)) if with_state else None, None
    with form.computing(a):
        a, b = time.filled(a, 1.0), time.filled(b)  # a padded step: h[t] = 1 h[t−1] + 0
        h = scan_kernel(a, b, start, time.resets, reverse=time.reverse, implementation=implementation)
        out = form.leave(0, time.filled(h))
        last = _state_at(time, h, start, time.n) if with_state else None
        states = None if time.positions is None else [_state_at(time, h, start, p) for p in time.positions]
    states = None if states is None else [form.leave(1, x) for x in states]
    return out, None if last is None else form.leave(1, last), states


def _state_at(time: Timeline, h: Array, start: Array | None, position: int) -> Array:
    """The state after so many steps: a row of h, copied, as a view would keep all of h in memory."""
    xp, (batch, n, d) = time.xp, h.shape
    if position == 0:
        return xp.zeros((batch, d), dtype=h.dtype, device=place_of(h)) if start is None else start
    row = n - position if time.reverse else position - 1
    return xp.concat([h[:, row : row + 1, :]], axis=1)


def _form(a: Array, b: Array, initial_state: Array | None, *, time: int, rounds: bool = False) -> Form:
    """The form of a scan (`time` 1) or of one step (`time` 0), after checks of its arrays.

    With `rounds`, the kernel reads half precision and rounds its output.
    """
    check_given(a=a, b=b)
    state = {"initial_state" if time else "state": initial_state}
    xp = check_arrays(a=a, b=b, **state)
    check_floating(xp, complex_too=True, a=a, b=b, **state)
    tail = _check_shapes(a, b, state, time=time)
    d, own = tail[-1], -1 - time  # the axes of a sequence
    batches = {"a": a.shape[:own], "b": b.shape[:own]}
    batches |= {name: x.shape[:-1] for name, x in state.items() if x is not None}
    batch = broadcast_batch(**batches)
    compute = compute_dtype(xp, a, b, initial_state)
    dtypes = [stored_dtype(xp, x, compute) if rounds else compute for x in (a, b)]
    rows = [flat_target(x, dtype, batch, tail) for x, dtype in zip((a, b), dtypes, strict=True)]
    if not time:
        rows = [None if x is None or x.shape is None else x._replace(shape=(x.shape[0], 1, d)) for x in rows]
    out = Target(_dtype_out(xp, a, b, compute), None, (*batch, *tail))
    targets = (*rows, flat_target(initial_state, compute, batch, (d,)))
    return Form(xp, targets, (out, Target(compute, None, (*batch, d))))


def _check_shapes(a: Array, b: Array, state: Mapping[str, Array | None], *, time: int) -> tuple[int, ...]:
    """The axes of a and b after the batch, (n, d) or in one step (d,)."""
    if a.ndim <= time:
        expected = "(..., n, d) with at least two axes" if time else "(..., d)"
        msg = f"a has shape {tuple(a.shape)}, expected {expected}"
        raise ValueError(msg)
    tail = tuple(a.shape[-1 - time :])
    if tuple(b.shape[-1 - time :]) != tail:
        each = ", ".join(map(str, tail))
        msg = f"b has shape {tuple(b.shape)}, expected (..., {each}): one term per factor of a {tuple(a.shape)}"
        raise ValueError(msg)
    for name, x in state.items():
        if x is not None and tuple(x.shape[-1:]) != tail[-1:]:
            msg = f"{name} has shape {tuple(x.shape)}, expected (..., {tail[-1]}): one number per channel"
            raise ValueError(msg)
    return tail


def _dtype_out(xp: ModuleType, a: Array, b: Array, compute: Any) -> Any:
    """The common dtype of a and b, made complex if the state is complex."""
    dtype = common_dtype(xp, a, b)
    if xp.isdtype(compute, "complex floating") and not is_dtype(xp, dtype, "complex floating"):
        return xp.complex128 if dtype == xp.float64 else xp.complex64
    return dtype
