"""The compiled selective scan on NumPy arrays: forward, gradient, one step."""

from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np

from subquad.kernels.selective_scan import Gradients
from subquad_numpy._scan import FRAME, forward_kernel
from subquad_numpy._scan_backward import GRADIENT_FRAME, backward_kernel
from subquad_numpy._simd import lanes_of
from subquad_numpy._threads import run_tasks, thread_count

Array = np.ndarray
# channels of a block: its states and A then take 64 kB at 16 states, an eighth of a second-level cache
BLOCK = 512
GRADIENT_BLOCK, TILE = 128, 32  # states and decays of a tile then take 512 kB
SHORT_CHUNK = 1024  # steps; chunks of time are not shorter, for each costs a pass over its matrices
SMALL = 1 << 16  # state updates, some 30 µs: less than handing work to a thread is worth


@dataclass
class _Problem:
    """Inputs as the kernels take them: contiguous, of one precision, B and C as complex as A."""

    given: dict[str, Array | None]
    arrays: dict[str, Array | None]
    flags: dict[str, int]

    @classmethod
    def of(cls, delta_softplus: bool, reverse: bool, **arrays: Array | None) -> "_Problem":
        u, A = arrays["u"], arrays["A"]
        assert u is not None
        assert A is not None
        real = u.dtype
        for name in ("B", "C", "initial_state"):
            if (array := arrays[name]) is not None and np.iscomplexobj(array) and not np.iscomplexobj(A):
                msg = f"{name} is complex but A is real; expected real numbers, or a complex A"
                raise TypeError(msg)
        state = np.dtype(np.result_type(real, np.complex64)) if np.iscomplexobj(A) else real
        of_state = {"A", "B", "C", "initial_state", "grad_state"}
        kept = {
            name: None if array is None else np.ascontiguousarray(array, state if name in of_state else real)
            for name, array in arrays.items()
        }
        groups = lcm(*[array.shape[2] for name in ("B", "C") if (array := kept[name]) is not None and array.ndim == 4])
        for name in ("B", "C"):
            array = kept[name]
            if array is not None and array.ndim == 4 and array.shape[2] < groups:
                kept[name] = np.repeat(array, groups // array.shape[2], axis=2)
        return cls(arrays, kept, {"delta_softplus": int(delta_softplus), "reverse": int(reverse)})

    def __getattr__(self, name: str) -> Any:
        return self.arrays[name]

    @property
    def kind(self) -> tuple[str, bool, bool, bool]:
        """What the kernels are specialised for."""
        return self.u.dtype.name, np.iscomplexobj(self.A), self.B.ndim == 2, self.C.ndim == 2

    @property
    def groups(self) -> int:
        """Groups of channels that share B and C; 1 where both are constant."""
        return max([array.shape[2] for array in (self.B, self.C) if array.ndim == 4], default=1)

    def frame(self, order: tuple[str, ...], **more: Any) -> Array:
        """Sizes, flags and addresses in the order a kernel expects."""
        batch, n, d = self.u.shape
        sizes = {"batch": batch, "n": n, "d": d, "groups": self.groups, "d_state": self.A.shape[1]}
        steps = {f"{name}_step": _batch_step(self.arrays[name]) for name in ("B", "C")}
        values = {**sizes, **self.flags, **steps, **self.arrays, **more}
        return np.array([_word(values.get(name)) for name in order], np.int64)


def _word(value: Any) -> int:
    if value is None:
        return 0
    return int(value.ctypes.data) if isinstance(value, np.ndarray) else int(value)


def _batch_step(array: Array | None) -> int:
    """Real numbers from one batch item to the next."""
    if array is None or array.ndim != 4 or array.shape[0] == 1:
        return 0
    return int(array[0].size) * (2 if np.iscomplexobj(array) else 1)


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
    p = _Problem.of(
        delta_softplus, reverse,
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state,
    )  # fmt: skip
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
    run_tasks(kernel, tasks, p.frame(FRAME, block=block, chunk=n, y=y, state=state), threads)
    return y, state


def _without_states(p: _Problem, y: Array) -> tuple[Array, Array]:
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


def cut_gradient(batch: int, groups: int, width: int, lanes: int) -> tuple[int, int]:
    """Channels of a block of the gradient, in whole vectors, and blocks of a group of `width` channels."""
    block = GRADIENT_BLOCK
    while block > 2 * lanes and batch * groups * -(-width // block) < 4:
        block //= 2
    block = min(block, -(-width // lanes) * lanes)
    return block, -(-width // block)


def _scan_chunks(p: _Problem, y: Array, block: int, tasks: int, chunk: int, threads: int) -> Array:
    """Two passes over chunks of time: what each leaves of a zero state, then y from the true initial states.

    A chunk carries a state h to exp(A ΣΔ) h + (what it leaves of zero): sums of Δ suffice.
    """
    kernel = forward_kernel(*p.kind)
    batch, n, d = p.u.shape
    chunks = -(-n // chunk)
    states = np.empty((batch, chunks, *p.A.shape), p.A.dtype)
    sums = np.empty((batch, chunks, d), p.u.dtype)
    frame = p.frame(FRAME, block=block, chunk=chunk, initial_state=None, state=states, delta_sum=sums)
    run_tasks(kernel, tasks * chunks, frame, threads)
    decays = np.exp(sums[..., None].astype(np.float64) * p.A)
    h = np.zeros(()) if p.initial_state is None else p.initial_state
    for k in range(chunks - 1):  # states[:, k] becomes the initial state of chunk k
        left = states[:, k].copy()
        states[:, k] = h
        h = decays[:, k] * h + left
    states[:, -1] = h
    frame = p.frame(FRAME, block=block, chunk=chunk, initial_state=states, state=states, y=y)
    run_tasks(kernel, tasks * chunks, frame, threads)
    return states[:, -1].copy()


def scan_step(
    state: Array,
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None = None,
    z: Array | None = None,
    delta_bias: Array | None = None,
    delta_softplus: bool = False,
) -> tuple[Array, Array]:
    """One step of `scan_forward`, the same numbers: y of one token and the state after it.

    Parameters
    ----------
    state : array, shape (batch, d, d_state)
        State before the token.
    u, delta, z : array, shape (batch, d)
        Input, step size, gate of the token.
    A, D, delta_bias : array
        As in `scan_forward`.
    B, C : array, shape (batch or 1, groups, d_state) or (d, d_state)
        Input and output maps; three axes where they belong to the token.
    delta_softplus : bool
        As in `scan_forward`.

    Returns
    -------
    tuple of array
        y, shape (batch, d), and the state after the token.
    """
    B, C = (array if array.ndim == 2 else array[:, None] for array in (B, C))
    gate = None if z is None else z[:, None]
    y, state = scan_forward(u[:, None], delta[:, None], A, B, C, D, gate, delta_bias, state, delta_softplus, threads=1)
    return y[:, 0], state


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
    p = _Problem.of(
        delta_softplus, reverse,
        u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias, initial_state=initial_state,
        grad_y=grad_y, grad_state=grad_state,
    )  # fmt: skip
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
        frame = p.frame(GRADIENT_FRAME, block=block, chunk=min(TILE, n), **results)
        run_tasks(backward_kernel(*p.kind), batch * groups * blocks, frame, thread_count(threads))
    else:
        results["grad_initial_state"] = fields["grad_state"].copy()

    def summed(name: str, given: Array | None) -> Array | None:
        """Add up what tasks and batch items left, into the shape and type of the input."""
        if given is None:
            return None
        value = results[f"grad_{name}"]
        if name in ("B", "C") and given.ndim == 4:
            value = value[0] if blocks == 1 else value.sum(axis=0)
            value = value.sum(axis=0, keepdims=True) if given.shape[0] < batch else value
            if given.shape[2] < groups:
                value = value.reshape(*given.shape[:3], groups // given.shape[2], d_state).sum(axis=3)
        elif name in ("A", "B", "C", "D", "delta_bias"):
            value = value.sum(axis=0)
        value = value if np.iscomplexobj(given) or not np.iscomplexobj(value) else value.real
        return np.ascontiguousarray(value, given.dtype)

    given = {name: p.given[name] for name in Gradients._fields}
    return Gradients(**{name: summed(name, array) for name, array in given.items()})  # type: ignore[arg-type]
