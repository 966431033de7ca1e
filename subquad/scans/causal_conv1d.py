"""The causal depthwise convolution of a few steps that stands before the scan in Mamba and its relatives.

y[t] = act(bias + Σ_k weight[:, width − 1 − k] x[t − k])
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import numpy as np

from subquad.backend import Array
from subquad.core.checks import check_arrays, check_flag, check_floating, check_given
from subquad.core.dtypes import compute_dtype
from subquad.core.shapes import broadcast_batch
from subquad.core.states import StateSpec
from subquad.kernels.causal_conv1d import causal_conv1d as conv_kernel
from subquad.registry import Host, Inputs, register_scan
from subquad.scans.call import Form, Target, flat_target, form_of

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
    return _convolve(form, arrays, activation, False, implementation)


@overload
def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    /,
    *,
    activation: str | None = None,
    initial_state: Array | None = None,
    return_state: Literal[False] = False,
    reverse: bool = False,
    implementation: str = "auto",
) -> Array: ...
@overload
def causal_conv1d(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    /,
    *,
    activation: str | None = None,
    initial_state: Array | None = None,
    return_state: Literal[True],
    reverse: bool = False,
    implementation: str = "auto",
) -> tuple[Array, Array]: ...
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
    implementation : str, default "auto"
        "auto", "generic", or the name of a kernel; see `subquad.explain`.

    Returns
    -------
    y : array, shape (..., n, d)
        The output, in the dtype and on the device of `x`.
    state : array, shape (..., width - 1, d)
        Only with `return_state`: the last width − 1 inputs, at least float32; those before a short chunk are taken from
        `initial_state`. As the `initial_state` of the next chunk, it continues this convolution.

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
    return_state = check_flag("return_state", return_state)
    y, state = _convolve(form, arrays, activation, check_flag("reverse", reverse), implementation)
    return (y, state) if return_state else y


def _convolve(
    form: Form, arrays: tuple[Any, ...], activation: str | None, reverse: bool, implementation: str
) -> tuple[Array, Array]:
    """(y, state) of a call, by its form."""
    if activation is not None and (not isinstance(activation, str) or activation not in ACTIVATIONS):
        msg = f"activation is {activation!r}, expected None, 'silu' or 'swish'"
        raise ValueError(msg)
    given, silu = form.enter(arrays), activation is not None
    with form.computing(given[0]):
        y, state = conv_kernel(*given, None, silu=silu, reverse=reverse, implementation=implementation)
    return form.leave(0, y), form.leave(1, state)


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
    rows = flat_target(x, compute, batch, tuple(x.shape[-1 - time :]))
    if rows is not None and not time and rows.shape is not None:
        rows = rows._replace(shape=(rows.shape[0], 1, d))
    targets = (rows, Target(compute), Target(compute), flat_target(state, compute, batch, tail))
    out = (*batch, *x.shape[-1 - time :])
    return Form(xp, targets, (Target(x.dtype, None, out), Target(compute, None, (*batch, *tail))))
