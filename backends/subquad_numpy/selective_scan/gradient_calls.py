"""Gradient of the compiled selective scan on NumPy arrays."""

import numpy as np

from subquad.kernels.selective_scan import Gradients, Inputs
from subquad_numpy.codegen import lanes_of
from subquad_numpy.runtime.threads import run_tasks, thread_count
from subquad_numpy.selective_scan.arguments import Problem
from subquad_numpy.selective_scan.backward import BACKWARD_RECORD, backward_kernel

Array = np.ndarray
GRADIENT_BLOCK, TILE = 128, 32  # states and decays of a tile then take 512 kB


def scan_backward(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    z: Array | None,
    delta_bias: Array | None,
    initial_state: Array | None,
    delta_softplus: bool,
    reverse: bool,
    grad_y: Array,
    grad_state: Array | None = None,
    *,
    threads: int | None = None,
) -> Gradients:
    """Gradient of a loss by every input of `scan_forward`, given that by its outputs.

    States are computed again from checkpoints every few steps; memory beyond the results is that of `u`,
    about. Sums over batch and time are in float64. The number of threads does not change the result.

    Parameters
    ----------
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse
        As given to `scan_forward`.
    grad_y : array, shape (batch, n, d)
        Gradient by y.
    grad_state : array, shape (batch, d, d_state), optional
        Gradient by the last state. Default: zeros.
    threads : int, optional
        As in `scan_forward`.

    Returns
    -------
    Gradients
        Named and shaped as the inputs. Of complex inputs: ∂/∂Re + i ∂/∂Im of the real loss, as PyTorch has
        it, the conjugate of JAX's.
    """
    given = Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state)
    p = Problem.of(given, delta_softplus, reverse, grad_y=grad_y, grad_state=grad_state)
    batch, n, d = p.u.shape
    d_state, groups = p.A.shape[1], p.groups
    width = d // groups
    lanes = lanes_of(p.u.dtype)
    block, blocks = cut_gradient(batch, groups, width, lanes)

    wide = np.result_type(p.A.dtype, np.float64)
    maps = {
        f"grad_{name}": np.zeros((blocks, batch, n, groups, d_state), p.A.dtype)
        if array.ndim == 4
        else np.zeros((batch, d, d_state), wide)
        for name, array in (("B", p.B), ("C", p.C))
    }
    sums = {"grad_A": np.zeros((batch, d, d_state), wide), "grad_D": np.zeros((batch, d))}
    sums["grad_delta_bias"] = np.zeros((batch, d))
    fields = {"grad_u": np.zeros_like(p.u), "grad_delta": np.zeros_like(p.u)}
    fields["grad_initial_state"] = np.zeros((batch, d, d_state), p.A.dtype)
    fields["grad_state"] = np.zeros((batch, d, d_state), p.A.dtype) if p.grad_state is None else p.grad_state
    if p.z is not None:
        fields["grad_z"] = np.zeros_like(p.z)
    results = {**maps, **sums, **fields}
    if n and p.u.size:
        frame = p.frame(BACKWARD_RECORD, block=block, chunk=min(TILE, n), **results)
        run_tasks(backward_kernel(*p.kind), batch * groups * blocks, frame, thread_count(threads), (p, results))
    else:
        results["grad_initial_state"] = fields["grad_state"].copy()

    def summed(name: str, x: Array | None) -> Array | None:
        """Add up what tasks and batch items left, into the shape and type of the input."""
        if x is None:
            return None
        value = results[f"grad_{name}"]
        if name in ("B", "C") and x.ndim == 4:
            value = value[0] if blocks == 1 else value.sum(axis=0)
            value = value.sum(axis=0, keepdims=True) if x.shape[0] != batch else value
            if x.shape[2] < groups:
                value = value.reshape(*x.shape[:3], groups // x.shape[2], d_state).sum(axis=3)
        elif name in ("A", "B", "C", "D", "delta_bias"):
            value = value.sum(axis=0)
        value = value if np.iscomplexobj(x) or not np.iscomplexobj(value) else value.real
        return np.ascontiguousarray(value, x.dtype)

    return Gradients(*(summed(name, array) for name, array in zip(Gradients._fields, given, strict=True)))


def cut_gradient(batch: int, groups: int, width: int, lanes: int) -> tuple[int, int]:
    """Channels of a block of the gradient, in whole vectors, and blocks of a group of `width` channels."""
    block = GRADIENT_BLOCK
    while block > 2 * lanes and batch * groups * -(-width // block) < 4:
        block //= 2
    block = min(block, -(-width // lanes) * lanes)
    return block, -(-width // block)
