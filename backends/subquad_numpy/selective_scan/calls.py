"""The compiled selective scan on NumPy arrays, and its gradient: see `subquad_numpy.compiled.Compiled`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from subquad.kernels.selective_scan import Gradients, Inputs
from subquad_numpy.runtime.arguments import Forms, Run, straight
from subquad_numpy.runtime.stored import KINDS, computed, rounded, stored_word, widened
from subquad_numpy.runtime.threads import thread_count

Array = np.ndarray[Any, Any]
# Maximum channels of a block: its states and A take 64 kB at 16 states, an eighth of a second-level cache.
BLOCK = 512
SHORT_CHUNK = 1024  # minimum steps of a chunk of time: each chunk costs a pass over its matrices
SMALL = 1 << 17  # state updates of a call, about 50 µs: below that, a second thread costs more than it saves
GRADIENT_BLOCK, TILE = 128, 16  # channels and steps of a tile: its complex states and decays take 660 kB at 16 states
# Blocks of the gradient that a task of real states takes side by side: their rows then are a third of a page or more of
# memory, which is read and written a sixth faster than rows of one block.
SIDE_BY_SIDE = 3
OF_STATE = frozenset({"A", "B", "C", "initial_state", "grad_state"})  # complex where A is complex


def _plan_scan(arrays: Sequence[Any], static: Mapping[str, Any], save: bool) -> Callable[..., Any]:
    """`selective_scan`: y, which is stored as u is, and the last state."""
    from subquad_numpy.codegen import lanes_of
    from subquad_numpy.selective_scan.forward import FORWARD_RECORD, forward_kernel

    p = _as_kernels_take(arrays, as_stored=True)
    is_plain = all(x is y for x, y in zip(p, arrays, strict=True))
    n, d_state, dtype, dtype_of_state = p.u.shape[1], p.A.shape[1], p.u.dtype, p.A.dtype
    lanes = lanes_of(computed(dtype))
    shape, shape_of_state = p.u.shape, (p.u.shape[0], *p.A.shape)
    is_empty = 0 in (p.u.size, d_state)
    is_small = p.u.size * d_state < SMALL
    runs: dict[int, tuple[Run, int]] = {}  # by the number of threads: (run, steps of a chunk)
    groups, kernel = _groups(p), forward_kernel(*_kind(p))
    shape_of_saved = states_of_tiles(shape[0], n, groups, shape[2] // groups, d_state, lanes)

    def scan(
        arrays: Sequence[Any], new: Callable[..., Array], threads: Any
    ) -> tuple[tuple[Array, Array], Array | None]:
        p = arrays if is_plain else _as_kernels_take(arrays, as_stored=True)
        y, state = new(shape, dtype), new(shape_of_state, dtype_of_state)
        if is_empty:
            _without_states(Inputs(*p), y, state)
            return (y, state), None
        count = 1 if is_small else thread_count(threads)
        planned = runs.get(count)
        if planned is None:
            block, tasks = cut_channels(shape[0], groups, shape[2], count, lanes)
            chunks = min(count // tasks, n // SHORT_CHUNK)
            chunk = n if chunks < 3 else -(-n // chunks)  # chunks compute every step twice: two of them gain nothing
            sizes = _sizes(Inputs(*p), static, block, chunk)
            run = Run(kernel, FORWARD_RECORD, (), tasks * max(1, -(-n // chunk)), math.inf, sizes)
            planned = runs[count] = run, chunk
        run, chunk = planned
        saved = np.empty(shape_of_saved, dtype_of_state) if save else None
        if chunk < n:
            _scan_chunks(Inputs(*p), run, chunk, y, state, saved, count, reverse=static["reverse"])
        else:
            run((*p, state, y, None, saved), count)
        return (y, state), saved

    return straight(scan) if is_small and is_plain and not is_empty else scan


scan = Forms(_plan_scan)


def scan_backward(
    arrays: Sequence[Array | None], static: Mapping[str, Any], saved: Array | None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """The gradients of `scan`: ∂/∂Re + i ∂/∂Im of the real loss.

    States are computed again from those that the forward pass has saved every `TILE` steps, which take about the memory
    of `u`, or that a first sweep finds if it has saved none.
    Sums over batch and time are in float64. The number of threads does not change the result.
    """
    from subquad_numpy.codegen import lanes_of
    from subquad_numpy.selective_scan.backward import backward_kernel
    from subquad_numpy.selective_scan.gradient import BACKWARD_RECORD, OF_MAPS, OF_ROWS, OVER_TIME

    given, p = Inputs(*arrays), _as_kernels_take(arrays)
    batch, n, d = p.u.shape
    d_state, groups, state = p.A.shape[1], _groups(p), p.A.dtype
    part, parts = cut_gradient(batch, groups, d // groups, lanes_of(p.u.dtype))
    many = 1 if saved is None or np.iscomplexobj(p.A) else blocks_of_task(batch * groups, parts, thread_count(threads))
    wide = np.result_type(state, np.float64)
    has_steps = n > 0 and p.u.size > 0
    new = np.empty if has_steps else np.zeros  # the kernel writes every number of its results
    results = {
        f"grad_{name}": new((parts, batch, n, groups, d_state), state)
        if x.ndim == 4
        else new((batch, d, d_state), wide)
        for name, x in (("B", p.B), ("C", p.C))
    }
    results |= {"grad_A": new((batch, d, d_state), wide), "grad_D": new((batch, d), np.float64)}
    results |= {"grad_delta_bias": new((batch, d), np.float64), "grad_initial_state": new((batch, d, d_state), state)}
    results |= {"grad_u": new(p.u.shape, p.u.dtype), "grad_delta": new(p.u.shape, p.u.dtype)}
    if p.z is not None:
        results["grad_z"] = new(p.u.shape, p.u.dtype)
    grad_y, grad_state = (np.zeros(x.shape, x.dtype) if by is None else np.ascontiguousarray(by, x.dtype)
                          for by, x in zip(grads, (p.u, results["grad_initial_state"]), strict=True))  # fmt: skip
    if has_steps:
        written = (results.get(name) for name in (*OF_ROWS, *OVER_TIME, *OF_MAPS))
        sizes = _sizes(p, static, many * part, n) | {"part": part}
        tasks = batch * groups * -(-parts // many)
        run = Run(backward_kernel(*_kind(p)), BACKWARD_RECORD, (), tasks, math.inf, sizes)
        run((*p, grad_y, grad_state, *written, saved), threads)
    else:
        results["grad_initial_state"] = grad_state.copy()

    def summed(name: str, x: Array | None) -> Array | None:
        """The gradient by input x: sums over tasks and batch items, with the shape and dtype of x."""
        if x is None or name == "resets":
            return None
        value = results[f"grad_{name}"]
        if name in ("B", "C") and x.ndim == 4:
            value = value[0] if parts == 1 else value.sum(axis=0)
            value = value.sum(axis=0, keepdims=True) if x.shape[0] != batch else value
            if x.shape[2] < groups:
                value = value.reshape(*x.shape[:3], groups // x.shape[2], d_state).sum(axis=3)
        elif name in ("A", "B", "C", "D", "delta_bias"):
            value = value.sum(axis=0)
        value = value if np.iscomplexobj(x) or not np.iscomplexobj(value) else value.real
        return np.ascontiguousarray(value, x.dtype)

    return Gradients(*(summed(name, array) for name, array in zip(Gradients._fields, given, strict=True)))


def cut_channels(batch: int, groups: int, d: int, threads: int, lanes: int) -> tuple[int, int]:
    """(channels of a block, in whole vectors; tasks), where the tasks are a multiple of `threads` if possible."""
    width = d // groups
    blocks = -(-width // BLOCK)
    while (batch * groups * blocks) % threads and batch * groups * blocks < 4 * threads and blocks * lanes < width:
        blocks += 1
    block = -(-width // (blocks * lanes)) * lanes
    return block, batch * groups * -(-width // block)


def cut_gradient(batch: int, groups: int, width: int, lanes: int) -> tuple[int, int]:
    """(channels of a block, in whole vectors; blocks of a group of `width` channels) of the gradient.

    They do not depend on the number of threads, so the gradient does not either; blocks are narrow until 4 tasks exist.
    """
    block = GRADIENT_BLOCK
    while block > 2 * lanes and batch * groups * -(-width // block) < 4:
        block //= 2
    block = max(lanes, min(block, -(-width // lanes) * lanes))
    return block, -(-width // block)


def blocks_of_task(groups: int, blocks: int, threads: int) -> int:
    """How many of the blocks of a group a task takes side by side, so that no thread has more blocks than with one.

    What a block gives is the same alone and beside others.
    """

    def most_of_a_thread(many: int) -> int:
        return -(-groups * -(-blocks // many) // threads) * many

    return min(range(min(SIDE_BY_SIDE, blocks), 0, -1), key=most_of_a_thread)


def states_of_tiles(batch: int, n: int, groups: int, width: int, d_state: int, lanes: int) -> tuple[int, ...]:
    """The shape of the states that a forward pass saves: see `layout.place_of_states`."""
    return batch, -(-n // TILE), groups * -(-width // lanes), d_state, lanes


def _as_kernels_take(arrays: Sequence[Any], *, as_stored: bool = False) -> Inputs:
    """The inputs as kernels take them.

    All are contiguous and of one precision; if asked, what has a row for each step may be `as_stored`, in half
    precision. B, C and the initial state are complex where A is; B and C have equally many groups.
    """
    given = Inputs(*arrays)
    real, is_complex = computed(given.u.dtype), np.iscomplexobj(given.A)
    for name in ("B", "C", "initial_state"):
        if (array := getattr(given, name)) is not None and np.iscomplexobj(array) and not is_complex:
            msg = f"{name} is complex but A is real; expected real numbers, or a complex A"
            raise TypeError(msg)
    state = np.dtype(np.result_type(real, np.complex64)) if is_complex else real
    dtypes = dict.fromkeys(OF_STATE, state) | {"resets": np.dtype(bool)}

    def kept_as(name: str, x: Array) -> Array:
        of_steps = name in ("u", "delta", "z") or (name in ("B", "C") and x.ndim == 4 and not is_complex)
        if as_stored and of_steps and x.dtype.name in KINDS and real == np.float32:
            return np.ascontiguousarray(x)
        return np.ascontiguousarray(x if name == "resets" else widened(x), dtypes.get(name, real))

    kept = Inputs(*(None if x is None else kept_as(name, x) for name, x in given._asdict().items()))
    groups = math.lcm(*(x.shape[2] for x in (kept.B, kept.C) if x.ndim == 4))
    for name in ("B", "C"):
        x = getattr(kept, name)
        if x.ndim == 4 and x.shape[2] < groups:
            kept = kept._replace(**{name: np.repeat(x, groups // x.shape[2], axis=2)})
    return kept


def _without_states(p: Inputs, y: Array, state: Array) -> None:
    """Write y = D u silu(z) and the initial state into `y` and `state`: the result of no step, or of no state."""
    out = np.zeros(y.shape) if p.D is None else p.D * widened(p.u)
    if p.z is not None:
        z = widened(p.z)
        out = out * (z / (1 + np.exp(-z)))
    y[...] = rounded(out, y.dtype)
    state[...] = 0 if p.initial_state is None else p.initial_state


def _scan_chunks(
    p: Inputs, run: Run, chunk: int, y: Array, state: Array, saved: Array | None, threads: int, *, reverse: bool
) -> None:
    """Write the output and last state into `y` and `state`, in two passes over chunks of time that run in parallel.

    The first pass finds the state that each chunk reaches from zero, and the sum of its Δ. A chunk that begins with
    state h ends with exp(A ΣΔ) h plus that state (without h after a reset), which gives the true initial state of every
    chunk. The second pass computes y from these.
    """
    batch, n, d = p.u.shape
    chunks = -(-n // chunk)
    states = np.empty((batch, chunks, *p.A.shape), p.A.dtype)
    sums = np.empty((batch, chunks, d), computed(p.u.dtype))
    run((*p._replace(initial_state=None), states, None, sums, None), threads)
    h = np.zeros(()) if p.initial_state is None else p.initial_state
    cut = [np.zeros((batch, 1, 1), bool)] * chunks  # of which items a chunk begins a document
    if p.resets is not None:
        resets = p.resets[:, ::-1] if reverse else p.resets
        cut = [resets[:, k * chunk : (k + 1) * chunk].any(axis=1)[:, None, None] for k in range(chunks)]
    with np.errstate(over="ignore", invalid="ignore"):  # a growing state may overflow, as it would step by step
        decays = np.exp(sums[..., None].astype(np.float64) * p.A)
        for k in range(chunks - 1):  # states[:, k] becomes the initial state of chunk k
            left = states[:, k].copy()
            states[:, k] = h
            h = np.where(np.logical_or(h == 0, cut[k]), 0, decays[:, k] * h) + left
    states[:, -1] = h
    run((*p._replace(initial_state=states), states, y, None, saved), threads)
    state[...] = states[:, -1]


def _kind(p: Inputs) -> tuple[str, bool, bool, bool]:
    """What the kernels are specialised for: (real dtype, is A complex, is B constant, is C constant)."""
    return computed(p.u.dtype).name, np.dtype(p.A.dtype).kind == "c", len(p.B.shape) == 2, len(p.C.shape) == 2


def _groups(p: Inputs) -> int:
    """The number of groups of channels that share B and C; 1 where both are constant."""
    return max(x.shape[2] if len(x.shape) == 4 else 1 for x in (p.B, p.C))


def _sizes(p: Inputs, static: Mapping[str, Any], block: int, chunk: int) -> dict[str, int]:
    batch, n, d = p.u.shape
    sizes = {"batch": batch, "n": n, "d": d, "groups": _groups(p), "d_state": p.A.shape[1], "block": block}
    for name, x in (("B_step", p.B), ("C_step", p.C)):  # stride between batch items, in real numbers
        own = len(x.shape) == 4 and x.shape[0] > 1
        parts = 2 if np.dtype(x.dtype).kind == "c" else 1
        sizes[name] = x.shape[1] * x.shape[2] * x.shape[3] * parts if own else 0
    return {
        **sizes,
        "chunk": chunk,
        "tile": TILE,
        "stored": stored_word((p.u, p.delta, p.z, p.B, p.C)),
        **{name: int(static[name]) for name in ("delta_softplus", "reverse")},
    }
