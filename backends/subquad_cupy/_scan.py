"""The selective scan on CUDA, forward and backward.

Written against `Device`, so that CuPy arrays, torch tensors and (in the tests, with the source compiled for
the CPU) NumPy arrays take one path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from subquad.kernels.selective_scan import Gradients

from . import _plan
from ._launch import STORAGE, CupyDevice, Device
from ._passes import Passes

Array = Any


def declines(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    delta_bias: Array | None,
    initial_state: Array | None,
    *,
    delta_softplus: bool,
    reverse: bool,
) -> str | None:
    """Why the CUDA kernel cannot take these inputs, or None."""
    names = {str(x.dtype).rpartition(".")[2] for x in (u, delta, z) if x is not None}
    others = {str(x.dtype).rpartition(".")[2] for x in (A, B, C, D, delta_bias, initial_state) if x is not None}
    if any(name.startswith("complex") for name in names | others):
        return "complex states are left to the generic scan"
    if len(names) > 1 or not names <= STORAGE.keys():
        return f"u, delta and z must share one of {', '.join(STORAGE)}, not {', '.join(sorted(names))}"
    wide = "float64" if names == {"float64"} else "float32"
    if str(A.dtype).rpartition(".")[2] != wide or not others <= names | {wide}:
        return f"parameters of {', '.join(sorted(others))} beside inputs of {names.pop()}"
    if not 1 <= A.shape[1] <= _plan.MAX_STATES:
        return f"d_state is {A.shape[1]}; the kernel has 1 to {_plan.MAX_STATES}"
    groups = {x.shape[2] for x in (B, C) if x.ndim == 4 and x.shape[2] != 1}
    if len(groups) > 1:
        return f"B and C have {B.shape[2]} and {C.shape[2]} groups"
    if u.ndim == 3 and u.shape[0] * u.shape[2] * -(-u.shape[1] // _plan.MIN_CHUNK) > _plan.MAX_BLOCKS:
        return f"batch x channels of {u.shape[0]} x {u.shape[2]} exceed one launch"
    return None


def scan_forward(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    delta_bias: Array | None,
    initial_state: Array | None,
    *,
    delta_softplus: bool,
    reverse: bool,
    device: Device | None = None,
    save: bool = False,
) -> tuple[Array, Array, Array | None]:
    """Run h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t], y[t] = (C[t] . h[t] + D u[t]) silu(z[t]).

    Parameters
    ----------
    u, delta, z : array, shape (batch, n, d)
        float32, float16, bfloat16 or float64; z may be None. Slices are read in place.
    A : array, shape (d, d_state)
        float32, or float64 with float64 inputs.
    B, C : array, shape (batch or 1, n, groups, d_state) or (d, d_state)
        Maps of each step, or constant.
    D, delta_bias : array, shape (d,), or None
        Skip connection; added to delta.
    initial_state : array, shape (batch, d, d_state), or None
        State before the first step.
    delta_softplus : bool
        Whether the step is softplus(delta + delta_bias).
    reverse : bool
        Whether time runs from the end.
    device : Device, optional
        Where the arrays live. Default: CuPy, on the device of `u` and its current stream.
    save : bool
        Whether to keep what `scan_backward` restarts from, if that fits in `CHECKPOINT_BYTES`.

    Returns
    -------
    y : array, shape (batch, n, d)
        Like `u`.
    state : array, shape (batch, d, d_state)
        State after the last step, like `A`.
    checkpoints : array or None
        For `scan_backward`.
    """
    arrays = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if device is None:
        with u.device:
            return scan_forward(*arrays, delta_softplus=delta_softplus, reverse=reverse, device=CupyDevice(), save=save)
    passes = Passes(device, *arrays, softplus=delta_softplus, reverse=reverse)
    y, state = device.empty(u.shape, u), passes.new_state()
    if 0 in u.shape:
        state[...] = 0 if initial_state is None else initial_state
        return y, state, None
    checkpoints = passes.new_checkpoints(passes.n) if save and passes.n <= passes.window else None
    passes.forward(0, passes.n, passes.initial_state, state, y, checkpoints)
    return y, state, checkpoints


def scan_backward(
    dy: Array,
    dstate: Array | None,
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    delta_bias: Array | None,
    initial_state: Array | None,
    *,
    delta_softplus: bool,
    reverse: bool,
    checkpoints: Array | None = None,
    device: Device | None = None,
) -> Gradients:
    """Gradients of `scan_forward` from those of its outputs; deterministic.

    Parameters
    ----------
    dy : array, shape (batch, n, d)
        Gradient of y.
    dstate : array, shape (batch, d, d_state), or None
        Gradient of the last state.
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, device
        As in `scan_forward`.
    checkpoints : array, optional
        Third result of ``scan_forward(..., save=True)``. Default: a forward pass recomputes them.

    Returns
    -------
    Gradients
        One array per input, with its shape and data type.
    """
    arrays = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if device is None:
        with u.device:
            return scan_backward(
                dy,
                dstate,
                *arrays,
                delta_softplus=delta_softplus,
                reverse=reverse,
                checkpoints=checkpoints,
                device=CupyDevice(),
            )
    passes = Passes(device, *arrays, softplus=delta_softplus, reverse=reverse)
    rows = {"dy": passes.like_u(dy), "du": device.empty(u.shape, u), "ddelta": device.empty(u.shape, u)}
    rows["dz"] = None if z is None else device.empty(u.shape, u)
    for name, x in (("dB", B), ("dC", C)):
        if x.ndim == 4:
            rows[name] = device.empty((passes.batch, passes.n, passes.groups, passes.d_state), A)
    adjoint = None if dstate is None else passes.like_A(dstate)
    totals: dict[str, Array] = {}
    for start, stop, saved in _windows(passes, checkpoints):
        adjoint, sums = passes.backward(start, stop, adjoint, saved, rows)
        totals = {name: total + totals[name] for name, total in sums.items()} if totals else sums

    def gradient(name: str, of: Array | None) -> Array | None:
        if of is None:
            return None
        total = totals[name] if name in totals else rows.get(name)
        if total is None:  # nothing to sum over: no step, or no item
            total = device.empty(of.shape, A)
            total[...] = 0
        for axis, length in enumerate(of.shape):
            if total.shape[axis] != length:  # broadcast in the forward pass
                total = total.sum(axis)[(slice(None),) * axis + (None,)]
        return device.cast(total, of)

    if adjoint is None and initial_state is not None:
        adjoint = device.empty(initial_state.shape, A)
        adjoint[...] = 0
    return Gradients(
        u=rows["du"],
        delta=device.cast(rows["ddelta"], delta),
        A=gradient("dA", A),
        B=gradient("dB", B),
        C=gradient("dC", C),
        D=gradient("dD", D),
        z=gradient("dz", z),
        delta_bias=gradient("dbias", delta_bias),
        initial_state=None if initial_state is None else device.cast(adjoint, initial_state),
    )


def _windows(passes: Passes, checkpoints: Array | None) -> Iterator[tuple[int, int, Array]]:
    """Stretches of time from the end, each with the states to restart from; one if they fit in memory."""
    if 0 in (passes.batch, passes.n, passes.d):
        return
    if checkpoints is not None:
        yield 0, passes.n, checkpoints
        return
    starts = range(0, passes.n, passes.window)
    entering = [passes.initial_state]
    for start in starts[:-1]:
        entering.append(passes.new_state())
        passes.forward(start, start + passes.window, entering[-2], entering[-1], None, None)
    for start, first in zip(reversed(starts), reversed(entering), strict=True):
        stop = min(start + passes.window, passes.n)
        checkpoints = passes.new_checkpoints(stop - start)
        passes.forward(start, stop, first, None, None, checkpoints)
        yield start, stop, checkpoints
