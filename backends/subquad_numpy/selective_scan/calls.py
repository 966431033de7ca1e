"""The compiled selective scan on NumPy arrays."""

import numpy as np

from subquad.kernels.selective_scan import Inputs
from subquad_numpy.codegen import lanes_of
from subquad_numpy.runtime.threads import run_tasks, thread_count
from subquad_numpy.selective_scan.arguments import Problem
from subquad_numpy.selective_scan.forward import FORWARD_RECORD, forward_kernel
from subquad_numpy.selective_scan.gradient_calls import scan_backward

__all__ = ["SMALL", "cut_channels", "scan_backward", "scan_forward"]

Array = np.ndarray
# channels of a block: its states and A then take 64 kB at 16 states, an eighth of a second-level cache
BLOCK = 512
SHORT_CHUNK = 1024  # steps; chunks of time are not shorter, for each costs a pass over its matrices
SMALL = 1 << 16  # state updates, some 30 µs: less than handing work to a thread is worth


def scan_forward(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    initial_state: Array | None = None,
    delta_softplus: bool = False,
    reverse: bool = False,
    *,
    threads: int | None = None,
    out: Array | None = None,
) -> tuple[Array, Array]:
    """Selective scan, h[t] = exp(Δ[t] A) h[t-1] + Δ[t] B[t] u[t], y[t] = (C[t] · h[t] + D u[t]) silu(z[t]).

    Parameters
    ----------
    u, delta, z : array, shape (batch, n, d), float32 or float64
        Input, step sizes, gate. All real arrays are of the type of `u`.
    A : array, shape (d, d_state)
        Rates; if complex, y has 2 Re(C · h), and B, C and the states are complex too.
    B, C : array, shape (batch or 1, n, groups, d_state) or (d, d_state)
        Input and output maps, per step or constant.
    D, delta_bias : array, shape (d,), optional
        Skip connection; addend of `delta`.
    initial_state : array, shape (batch, d, d_state), optional
        h[-1]. Default: zeros.
    delta_softplus, reverse : bool
        Whether Δ is softplus(delta + delta_bias); whether time runs from the end.
    threads : int, optional
        Default: OMP_NUM_THREADS, NUMBA_NUM_THREADS and the cores of the process, whichever is least.
    out : array, shape (batch, n, d), optional
        Where to write y: contiguous, of the type of `u`.

    Returns
    -------
    tuple of array
        y, shape (batch, n, d), and the last state, shape (batch, d, d_state).
    """
    p = Problem.of(Inputs(u, delta, A, B, C, D, z, delta_bias, initial_state), delta_softplus, reverse)
    batch, n, d = p.u.shape
    d_state = p.A.shape[1]
    y = np.empty_like(p.u) if out is None else out
    if n == 0 or d_state == 0 or y.size == 0:
        return _without_states(p, y)
    kernel = forward_kernel(*p.kind)
    threads = 1 if p.u.size * d_state < SMALL else thread_count(threads)
    block, tasks = cut_channels(batch, p.groups, d, threads, lanes_of(p.u.dtype))
    chunks = min(threads // tasks, n // SHORT_CHUNK)
    if chunks >= 3:  # every step is done twice: two chunks gain nothing
        return y, _scan_chunks(p, y, block, tasks, -(-n // chunks), threads)
    state = np.empty((batch, d, d_state), p.A.dtype)
    run_tasks(kernel, tasks, p.frame(FORWARD_RECORD, block=block, chunk=n, y=y, state=state), threads, (p, y, state))
    return y, state


def _without_states(p: Problem, y: Array) -> tuple[Array, Array]:
    """No step or no state: y = D u silu(z), and the state stays."""
    y[...] = 0 if p.D is None else p.D * p.u
    if p.z is not None:
        y *= p.z / (1 + np.exp(-p.z))
    shape = (p.u.shape[0], *p.A.shape)
    return y, np.zeros(shape, p.A.dtype) if p.initial_state is None else p.initial_state.copy()


def cut_channels(batch: int, groups: int, d: int, threads: int, lanes: int) -> tuple[int, int]:
    """Channels of a block, in whole vectors, and number of tasks: if it can be a multiple of `threads`."""
    width = d // groups
    blocks = -(-width // BLOCK)
    while (batch * groups * blocks) % threads and batch * groups * blocks < 4 * threads and blocks * lanes < width:
        blocks += 1
    block = -(-width // (blocks * lanes)) * lanes
    return block, batch * groups * -(-width // block)


def _scan_chunks(p: Problem, y: Array, block: int, tasks: int, chunk: int, threads: int) -> Array:
    """Two passes over chunks of time: what each leaves of a zero state, then y from the true initial states.

    A chunk carries a state h to exp(A ΣΔ) h + (what it leaves of zero): sums of Δ suffice.
    """
    kernel = forward_kernel(*p.kind)
    batch, n, d = p.u.shape
    chunks = -(-n // chunk)
    states = np.empty((batch, chunks, *p.A.shape), p.A.dtype)
    sums = np.empty((batch, chunks, d), p.u.dtype)
    frame = p.frame(FORWARD_RECORD, block=block, chunk=chunk, initial_state=None, state=states, delta_sum=sums)
    run_tasks(kernel, tasks * chunks, frame, threads, (p, states, sums))
    h = np.zeros(()) if p.initial_state is None else p.initial_state
    with np.errstate(over="ignore", invalid="ignore"):  # what grows may exceed the range, as it does step by step
        decays = np.exp(sums[..., None].astype(np.float64) * p.A)
        for k in range(chunks - 1):  # states[:, k] becomes the initial state of chunk k
            left = states[:, k].copy()
            states[:, k] = h
            h = np.where(h == 0, 0, decays[:, k] * h) + left
    states[:, -1] = h
    frame = p.frame(FORWARD_RECORD, block=block, chunk=chunk, initial_state=states, state=states, y=y)
    run_tasks(kernel, tasks * chunks, frame, threads, (p, states, y))
    return states[:, -1].copy()
