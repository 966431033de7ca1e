"""The selective scan on CUDA, forward and backward.

The code is written against `Device`, so that CuPy arrays, torch tensors and (in tests, with the source compiled for the
CPU) NumPy arrays take one path.
"""

from __future__ import annotations

from typing import Any

from subquad.backend import Accepts, Call
from subquad.core.override import dtype_name
from subquad.kernels.selective_scan import Gradients, Inputs
from subquad_cupy.device import STORAGE, Device, launcher
from subquad_cupy.selective_scan import plan
from subquad_cupy.selective_scan.operands import Operands
from subquad_cupy.selective_scan.passes import backward, forward, window, windows
from subquad_cupy.selective_scan.plan import MAX_BLOCKS, MAX_STATES

Array = Any


def declines(call: Call) -> str | None:
    """The reason why the CUDA kernel cannot take a call, or None; `ACCEPTS` checks dtypes and devices before."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, _ = Inputs(*call.arrays)
    names = {dtype_name(x) for x in (u, delta, z) if x is not None}
    others = {dtype_name(x) for x in (A, B, C, D, delta_bias, initial_state) if x is not None}
    if len(names) > 1:
        return f"u, delta and z must share one dtype, not {', '.join(sorted(names))}"
    wide = "float64" if names == {"float64"} else "float32"
    if dtype_name(A) != wide or not others <= names | {wide}:
        return f"parameters of {', '.join(sorted(others))} beside inputs of {names.pop()}"
    if not 1 <= A.shape[1] <= MAX_STATES:
        return f"d_state is {A.shape[1]}; the kernel has 1 to {MAX_STATES}"
    groups = {x.shape[2] for x in (B, C) if x.ndim == 4 and x.shape[2] != 1}
    if len(groups) > 1:
        return f"B and C have {B.shape[2]} and {C.shape[2]} groups"
    if u.ndim == 3 and u.shape[0] * u.shape[2] * -(-u.shape[1] // plan.MIN_CHUNK) > MAX_BLOCKS:
        return f"batch x channels of {u.shape[0]} x {u.shape[2]} exceed one launch"
    return None


ACCEPTS = Accepts(dtypes=tuple(STORAGE), one_dtype=False, devices=("cuda",), also=declines)


def scan_forward(
    inputs: Inputs,
    *,
    delta_softplus: bool,
    reverse: bool,
    device: Device | None = None,
    save: bool = False,
) -> tuple[Array, Array, Array | None]:
    """Run h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t], y[t] = (C[t] . h[t] + D u[t]) silu(z[t]).

    Parameters
    ----------
    inputs : Inputs
        u, delta, z : shape (batch, n, d); float32, float16, bfloat16 or float64. Slices are read in place.
        A : shape (d, d_state); float32, or float64 with float64 inputs.
        B, C : shape (batch or 1, n, groups, d_state) or (d, d_state); maps of each step, or constant.
        D, delta_bias : shape (d,); skip connection; added to delta.
        initial_state : shape (batch, d, d_state); state before the first step.
        resets : shape (batch, n), bool; where True, the state starts from 0 before the step.
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
    with launcher(device, inputs.u) as device:
        operands = Operands(device, inputs, softplus=delta_softplus, reverse=reverse)
        y, state = operands.new_rows(), operands.new_state()
        if 0 in y.shape:
            state[...] = 0 if inputs.initial_state is None else inputs.initial_state
            return y, state, None
        kept = operands.new_checkpoints(operands.n) if save and operands.n <= window(operands) else None
        forward(operands, 0, operands.n, first=operands.initial_state, last=state, y=y, checkpoints=kept)
        return y, state, kept


def scan_backward(
    dy: Array,
    dstate: Array | None,
    inputs: Inputs,
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
    inputs, delta_softplus, reverse, device
        As in `scan_forward`.
    checkpoints : array, optional
        Third result of ``scan_forward(..., save=True)``. Default: a forward pass recomputes them.

    Returns
    -------
    Gradients
        One array per input, with its shape and data type.
    """
    with launcher(device, inputs.u) as device:
        operands = Operands(device, inputs, softplus=delta_softplus, reverse=reverse)
        found = _gradients(operands, operands.like_u(dy), operands.like_A(dstate), checkpoints)
        given = zip(Inputs._fields, inputs, strict=True)
        return Gradients(*(None if x is None else _summed(operands, found.get(f"d{name}"), x) for name, x in given))


def _gradients(
    operands: Operands, dy: Array, adjoint: Array | None, checkpoints: Array | None
) -> dict[str, Array | None]:
    """The gradients by name, as the kernels write them; gradients of broadcast inputs are not summed yet."""
    rows = {"dy": dy, "du": operands.new_rows(), "ddelta": operands.new_rows()}
    rows["dz"] = None if operands.rows["z"] is None else operands.new_rows()
    for name, constant in operands.constant.items():
        if not constant:
            rows[f"d{name}"] = operands.new_sums(operands.batch, operands.n, operands.groups, operands.d_state)
            if operands.d == 0:  # no kernel will write it
                rows[f"d{name}"][...] = 0
    totals: dict[str, Array] = {}
    for start, stop, saved in windows(operands, checkpoints):
        adjoint, sums = backward(operands, start, stop, adjoint, saved, rows)
        totals = {name: total + totals[name] for name, total in sums.items()} if totals else sums
    if not totals and adjoint is not None:  # no kernel wrote it: a result must not be the caller's own array
        given, adjoint = adjoint, operands.new_state()
        adjoint[...] = given
    return rows | totals | {"ddelta_bias": totals.get("dbias"), "dinitial_state": adjoint}


def _summed(operands: Operands, total: Array | None, of: Array) -> Array:
    """`total`, summed and cast to the shape and data type of the input `of`."""
    if total is None:  # nothing to sum over: no step, or no item
        total = operands.new_sums(*of.shape)
        total[...] = 0
    for axis, length in enumerate(of.shape):
        if total.shape[axis] != length:  # broadcast in the forward pass
            total = total.sum(axis)[(slice(None),) * axis + (None,)]
    return operands.device.cast(total, of)
