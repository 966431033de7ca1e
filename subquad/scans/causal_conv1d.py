"""The causal depthwise convolution of a few steps that stands before the scan in Mamba and its relatives.

y[t] = act(bias + Σ_k weight[:, width − 1 − k] x[t − k])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, Literal, overload

import numpy as np

from subquad.backend import Array
from subquad.core.beside import place_of
from subquad.core.checks import check_arrays, check_flag, check_floating, check_given
from subquad.core.dtypes import compute_dtype, stored_dtype
from subquad.core.gather import gather, gather_rows
from subquad.core.shapes import broadcast_batch
from subquad.core.states import StateSpec
from subquad.kernels.causal_conv1d import causal_conv1d as conv_kernel
from subquad.registry import Host, Inputs, register_scan
from subquad.scans.call import Form, Target, flat_target, form_of
from subquad.scans.timeline import Timeline, timeline

ACTIVATIONS = (None, "silu", "swish")


def draw(rng: np.random.Generator, n: int) -> Inputs:
    """Example inputs: the convolution of a Mamba layer, 4 taps over 256 channels, drawn as PyTorch initialises them."""
    d, width = 256, 4
    weight, bias = rng.uniform(-1, 1, (d, width)), rng.uniform(-0.5, 0.5, d)
    return {"x": rng.standard_normal((1, n, d)), "weight": weight, "bias": bias}, {"activation": "silu"}


def activations(q: Host, k: Host, v: Host) -> Inputs:
    """Four taps with random weights over the values, and silu."""
    rng, d = np.random.Generator(np.random.PCG64(0)), v.shape[-1]
    return {"x": v, "weight": rng.uniform(-1, 1, (d, 4)), "bias": rng.uniform(-0.5, 0.5, d)}, {"activation": "silu"}


def definition(arrays: Mapping[str, Host], options: Mapping[str, Any]) -> Host:
    """The definition: the sum over the taps, step by step, in float64."""
    x, weight = (np.asarray(arrays[name], np.float64) for name in ("x", "weight"))
    n, width = x.shape[-2], weight.shape[1]
    before = arrays.get("initial_state")
    before = np.zeros((*x.shape[:-2], width - 1, x.shape[-1])) if before is None else np.asarray(before, np.float64)
    inputs = np.concatenate([before, x[..., ::-1, :] if options.get("reverse") else x], axis=-2)
    out = np.stack([(inputs[..., t : t + width, :] * weight.T).sum(axis=-2) for t in range(n)], axis=-2)
    out = out + np.asarray(arrays.get("bias", 0.0), np.float64)
    out = out[..., ::-1, :] if options.get("reverse") else out
    return out if options.get("activation") is None else out / (1 + np.exp(-out))


def causal_conv1d_step(
    state: Array | None,
    x: Array,
    weight: Array,
    bias: Array | None = None,
    /,
    *,
    activation: str | None = None,
    mask: Array | None = None,
    implementation: str = "auto",
) -> tuple[Array, Array]:
    """Compute one step of `causal_conv1d`, for decoding token by token; `x` has no time axis.

        y = act(bias + weight[:, width − 1] x + Σ_k weight[:, width − 1 − k] state[−k])

    Parameters
    ----------
    state : array, shape (..., width - 1, d), or None
        The inputs before this one, the latest last; None means zeros.
    x : array, shape (..., d)
        The input of one token.
    weight : array, shape (d, width)
        The taps of each channel, the last for the present input.
    bias : array, shape (d,), optional
        Added to the sum.
    activation : {None, "silu", "swish"}, default None
        Both names stand for s / (1 + exp(−s)) of the sum s.
    mask : array of bool, shape (...), optional
        A step where it is False leaves the state as it is and gives 0.
    implementation : str, default "auto"
        "auto", "generic", or the name of an override of the kernel `causal_conv1d`; see `subquad.explain`.

    Returns
    -------
    y : array, shape (..., d)
        The output, in the dtype and on the device of `x`.
    state : array, shape (..., width - 1, d)
        The last inputs, this one included, at least float32. The state given is not written to.

    Raises
    ------
    TypeError, ValueError
        As `causal_conv1d` raises them.

    See Also
    --------
    causal_conv1d : The convolution of a whole sequence.

    Examples
    --------
    >>> import numpy as np, subquad
    >>> weight, state = np.ones((1, 3)), None
    >>> for token in (1.0, 2.0, 3.0, 4.0):
    ...     y, state = subquad.causal_conv1d_step(state, np.asarray([token]), weight)
    >>> y, state[:, 0]
    (array([9.]), array([3., 4.]))
    """
    arrays = x, weight, bias, state
    form = form_of("causal_conv1d_step", arrays, lambda: _form(*arrays, time=0))
    time = form.step_time("x", x, mask)
    y, state, _ = _convolve(form, time, arrays, activation, implementation)
    return y, state


@overload
def causal_conv1d(
    x: Array, weight: Array, bias: Array | None = None, /, *, activation: str | None = None,
    initial_state: Array | None = None, return_state: Literal[False] = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: None = None, implementation: str = "auto",
) -> Array: ...  # fmt: skip
@overload
def causal_conv1d(
    x: Array, weight: Array, bias: Array | None = None, /, *, activation: str | None = None,
    initial_state: Array | None = None, return_state: bool = False, reverse: bool = False,
    segments: Array | None = None, mask: Array | None = None, states_at: Any = None, implementation: str = "auto",
) -> Any: ...  # fmt: skip
@register_scan(
    "causal_conv1d",
    state=StateSpec({"state": ("width - 1", "d")}, None),
    decay=None,
    draw=draw,
    cost="n d width",
    positional=("x", "weight", "bias"),
    step=causal_conv1d_step,
    activations=activations,
    reference=definition,
)
def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    /,
    *,
    activation: str | None = None,
    initial_state: Array | None = None,
    return_state: bool = False,
    reverse: bool = False,
    segments: Array | None = None,
    mask: Array | None = None,
    states_at: Any = None,
    implementation: str = "auto",
) -> Any:
    """Convolve each channel with a few taps of its own, of the present input and of those before it.

        y[t] = act(bias + Σ_k weight[:, width − 1 − k] x[t − k]),    k = 0 … width − 1,    x[−k] = initial_state[−k]

    Parameters
    ----------
    x : array, shape (..., n, d)
        Input sequence, of a real floating dtype.
    weight : array, shape (d, width)
        The taps of each channel: the last one multiplies the present input, the first one that of width − 1 steps
        before. A ``Conv1d(d, d, width, groups=d)`` of PyTorch has them as (d, 1, width).
    bias : array, shape (d,), optional
        Added to the sum. Default: none.
    activation : {None, "silu", "swish"}, default None
        Both names stand for s / (1 + exp(−s)) of the sum s.
    initial_state : array, shape (..., width - 1, d), optional
        The inputs before the first step, the latest last. Default: zeros.
    return_state : bool, default False
        Return (y, state) instead of y.
    reverse : bool, default False
        Run time from the end: y[t] is of x[t] and the width − 1 inputs after it. The rows of a state are then in the
        order in which time passes them, so that the last one is the input next to the sequence.
    segments : array of int, shape (..., n), optional
        Numbers of documents: a step sees no input before a step whose number differs from that of the step before it.
    mask : array of bool, shape (..., n), optional
        False for a padded step, which is passed over: it is no input of the steps after it, and its output is 0.
    states_at : sequence of int, or `subquad.every`, optional
        Positions p in 0 … n: the states after p steps are returned too. ``every(k)`` is (k, 2k, …).
    implementation : str, default "auto"
        "auto", "generic", or the name of a kernel; see `subquad.explain`.

    Returns
    -------
    y : array, shape (..., n, d)
        The output, in the dtype and on the device of `x`.
    state : array, shape (..., width - 1, d)
        Only with `return_state`: the last width − 1 inputs, at least float32; those before a short chunk are taken from
        `initial_state`, and those before the last document are 0. As the `initial_state` of the next chunk, it
        continues this convolution.
    states : array, shape (p, ..., width - 1, d)
        Only with `states_at`, last: for each position the state that a call on the first p steps returns (with
        `reverse`, the last p).

    Raises
    ------
    TypeError
        For inputs that are not arrays of one library with a real floating dtype.
    ValueError
        If shapes or devices do not fit, `activation` is unknown, or `implementation` cannot take the call; the message
        names the argument and what was expected.

    See Also
    --------
    causal_conv1d_step : One step of this convolution.
    selective_scan : The scan that follows it in a Mamba layer.

    Notes
    -----
    O(n d width) operations. Each output is a sum of the same products in the same order however the sequence is cut, so
    that any chunks, or single steps, give the bits of one call on NumPy. float16 and bfloat16 are computed in float32.
    Kernel: `causal_conv1d`.

    References
    ----------
    .. [1] A. Gu, T. Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.4.

    Examples
    --------
    Differences of neighbours; before the first input there is 0:

    >>> import numpy as np, subquad
    >>> x, weight = np.asarray([1.0, 4.0, 9.0, 16.0]), np.asarray([[-1.0, 1.0]])
    >>> subquad.causal_conv1d(x[:, None], weight)[:, 0]
    array([1., 3., 5., 7.])
    """
    arrays = x, weight, bias, initial_state
    form = form_of("causal_conv1d", arrays, lambda: _form(*arrays, time=1))
    reverse, return_state = check_flag("reverse", reverse), check_flag("return_state", return_state)
    *batch, n, _ = form.shape_of(0)
    time = timeline(
        "x", x, tuple(batch), n, xp=form.xp, segments=segments, mask=mask, states_at=states_at, reverse=reverse
    )
    return time.results(*_convolve(form, time, arrays, activation, implementation), return_state=return_state)


def _convolve(
    form: Form, time: Timeline, arrays: tuple[Any, ...], activation: str | None, implementation: str
) -> tuple[Array, Array, list[Array] | None]:
    """(y, last state, states at positions) of a call, by its form."""
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        msg = f"activation is {activation!r}, expected None, 'silu' or 'swish'"
        raise ValueError(msg)
    given: list[Any] = form.enter(arrays)
    silu = activation is not None
    if time.mask is None and time.resets is None:
        y, state = form.run(conv_kernel, (*given, None), implementation, silu=silu, reverse=time.reverse)
        states = None if time.positions is None else _inputs_before(form.xp, given, time)
        found = None if states is None else [form.leave(1, x) for x in states]
        return form.leave(0, y), form.leave(1, state), found
    x, weight, bias, start = given

    def conv(x: Any, state: Any, resets: Array | None, *, reverse: bool) -> tuple[Array, Array]:
        return conv_kernel(x, weight, bias, state, resets, silu=silu, reverse=reverse, implementation=implementation)

    def scan(rows: Any, state: Any, resets: Array | None) -> tuple[Array, Array]:
        x, mask = rows
        if mask is None:
            return conv(x, state, resets, reverse=time.reverse)
        if state is None:
            state = form.xp.zeros((x.shape[0], weight.shape[1] - 1, x.shape[2]), dtype=x.dtype, device=place_of(x))
        return pass_over(form.xp, partial(conv, reverse=False), x, mask, state, resets, reverse=time.reverse)

    with form.computing(x):
        y, state, states = time.run(scan, (time.filled(x), time.mask), start)
    found = None if states is None else [form.leave(1, x) for x in states]
    return form.leave(0, y), form.leave(1, state), found


def _inputs_before(xp: ModuleType, given: Sequence[Any], time: Timeline) -> list[Array]:
    """The last width − 1 inputs before each position, where every step counts: no convolution is needed for them."""
    x, weight, _, start = given
    (batch, _, d), history = x.shape, weight.shape[1] - 1
    if start is None:
        start = xp.zeros((batch, history, d), dtype=x.dtype, device=place_of(x))
    inputs = xp.concat([start, xp.flip(x, axis=1) if time.reverse else x], axis=1)
    return [inputs[:, p : p + history, :] for p in time.positions or ()]


def pass_over(
    xp: ModuleType, conv: Callable[..., tuple[Array, Array]], x: Array, mask: Array, state: Array,
    resets: Array | None, *, reverse: bool,
) -> tuple[Array, Array]:  # fmt: skip
    """`conv(x, state, resets)` of the steps that count alone, moved together behind the state before them.

    The padded steps stand before that state, where no step that counts sees them, and the last state is right as it is.
    """
    if reverse:
        x, mask, resets = (None if a is None else xp.flip(a, axis=1) for a in (x, mask, resets))
    (batch, n, _), history = x.shape, state.shape[1]
    mask = xp.broadcast_to(mask, (batch, n))
    counts = xp.concat([xp.ones((batch, history), dtype=mask.dtype, device=place_of(x)), mask], axis=1)
    order = xp.argsort(xp.astype(counts, xp.int8), axis=1, stable=True)
    rows = gather_rows(xp, xp.concat([state, x], axis=1), order)
    if resets is not None:
        before = xp.zeros((batch, history), dtype=resets.dtype, device=place_of(x))
        resets = gather(xp, xp.concat([before, resets], axis=1), order)[:, history:]
    y, state = conv(rows[:, history:, :], rows[:, :history, :], resets)
    padded = n - xp.sum(xp.astype(mask, order.dtype), axis=1, keepdims=True)
    rank = xp.cumulative_sum(xp.astype(mask, order.dtype), axis=1) - 1 + padded
    y = gather_rows(xp, y, xp.where(mask, rank, 0))
    return xp.flip(y, axis=1) if reverse else y, state


def _form(x: Array, weight: Array, bias: Array | None, state: Array | None, *, time: int) -> Form:
    """The form of a convolution (`time` 1) or of one step (`time` 0), after checks of the arrays."""
    check_given(x=x, weight=weight)
    of_state = {"initial_state" if time else "state": state}
    arrays: dict[str, Any] = {"x": x, "weight": weight, "bias": bias} | of_state
    xp = check_arrays(**arrays)
    check_floating(xp, **arrays)
    if x.ndim <= time:
        expected = "(..., n, d) with at least two axes" if time else "(..., d)"
        msg = f"x has shape {tuple(x.shape)}, expected {expected}"
        raise ValueError(msg)
    d = x.shape[-1]
    if weight.ndim != 2 or weight.shape[0] != d or weight.shape[1] == 0:
        hint = "; drop its middle axis: weight[:, 0, :]" if weight.ndim == 3 else ""
        msg = (
            f"weight has shape {tuple(weight.shape)}, expected ({d}, width): the taps of each channel of x "
            f"{tuple(x.shape)}{hint}"
        )
        raise ValueError(msg)
    if bias is not None and tuple(bias.shape) != (d,):
        msg = f"bias has shape {tuple(bias.shape)}, expected ({d},): one number per channel"
        raise ValueError(msg)
    tail = (weight.shape[1] - 1, d)
    batches = {"x": x.shape[: -1 - time]}
    for name, given in of_state.items():
        if given is None:
            continue
        if tuple(given.shape[-2:]) != tail:
            msg = (
                f"{name} has shape {tuple(given.shape)}, expected (..., {tail[0]}, {d}): the inputs before, one fewer "
                f"than the taps of weight {tuple(weight.shape)}"
            )
            raise ValueError(msg)
        batches[name] = given.shape[:-2]
    batch = broadcast_batch(**batches)
    compute = compute_dtype(xp, x, weight, bias, state)
    rows = flat_target(x, stored_dtype(xp, x, compute), batch, tuple(x.shape[-1 - time :]))
    if rows is not None and not time and rows.shape is not None:
        rows = rows._replace(shape=(rows.shape[0], 1, d))
    targets = (rows, Target(compute), Target(compute), flat_target(state, compute, batch, tail))
    out = (*batch, *x.shape[-1 - time :])
    return Form(xp, targets, (Target(x.dtype, None, out), Target(compute, None, (*batch, *tail))))
