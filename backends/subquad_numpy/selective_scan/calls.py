"""The compiled selective scan on NumPy arrays, and its gradient, as `subquad_numpy.compiled.Compiled` describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import lcm
from types import ModuleType
from typing import Any

import numpy as np

from subquad.backend import Like
from subquad.kernels.selective_scan import Gradients, Inputs, widened
from subquad_numpy.runtime.arguments import record_of
from subquad_numpy.runtime.launch import Launch
from subquad_numpy.runtime.threads import run_tasks, thread_count

Array = np.ndarray[Any, Any]
# channels of a block: its states and A then take 64 kB at 16 states, an eighth of a second-level cache
BLOCK = 512
SHORT_CHUNK = 1024  # steps; chunks of time are not shorter, for each costs a pass over its matrices
SMALL = 1 << 16  # state updates, some 30 µs: less than handing work to a thread is worth
GRADIENT_BLOCK, TILE = 128, 32  # states and decays of a tile then take 512 kB
OF_STATE = frozenset({"A", "B", "C", "initial_state", "grad_state"})  # as complex as A


def scan(
    arrays: Sequence[Array | None], static: Mapping[str, Any], *, new: Callable[..., Array] = np.empty,
    save: bool = False, threads: int | None = None,
) -> tuple[tuple[Array, Array], None]:  # fmt: skip
    """`selective_scan`: y and the last state; y of inputs of half precision is of single precision."""
    p = _contiguous(arrays)
    batch, n, d = p.u.shape
    y, state = new(p.u.shape, p.u.dtype), new((batch, *p.A.shape), p.A.dtype)
    if n == 0 or p.A.shape[1] == 0 or y.size == 0:
        _without_states(p, y, state)
        return (y, state), None
    plan = launch(p, static, threads=threads)
    chunks = min(plan.threads // plan.tasks, n // SHORT_CHUNK)
    if chunks >= 3:  # every step is done twice: two chunks gain nothing
        _scan_chunks(p, plan, -(-n // chunks), y, state)
    else:
        _run(plan, p._asdict() | {"y": y, "state": state})
    return (y, state), None


def scan_backward(
    arrays: Sequence[Array | None], static: Mapping[str, Any], saved: None, outputs: Sequence[Array],
    grads: Sequence[Array | None], need: Sequence[bool], *, threads: int | None = None,
) -> tuple[Array | None, ...]:  # fmt: skip
    """Gradients of `scan`: ∂/∂Re + i ∂/∂Im of the real loss.

    States are computed again from checkpoints every few steps; memory beyond the results is that of `u`, about. Sums
    over batch and time are in float64. The number of threads does not change the result.
    """
    given, p = Inputs(*arrays), _contiguous(arrays)
    batch, n, d = p.u.shape
    d_state, groups = p.A.shape[1], _groups(p)
    likes = *p, p.u, Like((batch, *p.A.shape), p.A.dtype)
    plan = launch_backward(likes, static, threads=threads)
    grad_y = np.zeros_like(p.u) if grads[0] is None else np.ascontiguousarray(grads[0], p.u.dtype)
    grad_state = np.zeros(likes[-1].shape, p.A.dtype) if grads[1] is None else grads[1]
    grad_state = np.ascontiguousarray(grad_state, p.A.dtype)
    wide = np.result_type(p.A.dtype, np.float64)
    blocks = plan.tasks // (batch * groups) if batch else 1
    results = {name: np.zeros(like.shape, like.dtype) for name, like in plan.outputs.items()}
    for name in plan.summed:  # rows of their own here, so that sums can go into the shape and dtype of the inputs
        x = results[name]
        if name in ("grad_B", "grad_C") and x.ndim == 4:
            results[name] = np.zeros((blocks, batch, *x.shape[1:]), x.dtype)
        else:
            results[name] = np.zeros((batch, *x.shape), wide if np.iscomplexobj(x) else np.float64)
    if n and p.u.size:
        _run(plan, p._asdict() | {"grad_y": grad_y, "grad_state": grad_state} | results)
    else:
        results["grad_initial_state"] = grad_state.copy()

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


def prepare(xp: ModuleType, arrays: Sequence[Any]) -> Inputs:
    """The inputs as `launch` takes them: no half precision; B, C and the state as complex as A; groups alike."""
    inputs = widened(xp, Inputs(*arrays))
    groups = lcm(*(x.shape[2] for x in (inputs.B, inputs.C) if x.ndim == 4))

    def shared(x: Any) -> Any:
        x = xp.astype(x, inputs.A.dtype, copy=False)
        return xp.repeat(x, groups // x.shape[2], axis=2) if x.ndim == 4 and x.shape[2] < groups else x

    state = inputs.initial_state
    state = None if state is None else xp.astype(state, inputs.A.dtype, copy=False)
    return inputs._replace(B=shared(inputs.B), C=shared(inputs.C), initial_state=state)


def launch(likes: Sequence[Any], static: Mapping[str, Any], *, threads: int | None = None) -> Launch:
    """The run that computes y and the last state of prepared inputs, in one chunk of time."""
    from subquad_numpy.codegen import lanes_of
    from subquad_numpy.selective_scan.forward import FORWARD_RECORD, forward_kernel

    p = Inputs(*likes)
    batch, n, d = p.u.shape
    count = 1 if batch * n * d * p.A.shape[1] < SMALL else thread_count(threads)
    block, tasks = cut_channels(batch, _groups(p), d, count, lanes_of(np.dtype(p.u.dtype)))
    outputs = {"y": Like(tuple(p.u.shape), p.u.dtype), "state": Like((batch, *p.A.shape), p.A.dtype)}
    sizes = _sizes(p, static, block, n)
    return Launch(
        "selective_scan", forward_kernel, _kind(p), FORWARD_RECORD, _places(likes), outputs, sizes, tasks, count
    )


def launch_backward(likes: Sequence[Any], static: Mapping[str, Any], *, threads: int | None = None) -> Launch:
    """The run that computes the gradients from prepared inputs, and gradients by y and by the last state.

    Gradients by D, delta_bias and initial state are written also where there are none.
    """
    from subquad_numpy.codegen import lanes_of
    from subquad_numpy.selective_scan.backward import BACKWARD_RECORD, backward_kernel

    p = Inputs(*likes[:9])
    batch, n, d = p.u.shape
    groups = _groups(p)
    block, blocks = cut_gradient(batch, groups, d // groups, lanes_of(np.dtype(p.u.dtype)))
    outputs = {f"grad_{name}": Like(tuple(x.shape), x.dtype) for name, x in p._asdict().items() if x is not None}
    outputs.setdefault("grad_initial_state", Like((batch, *p.A.shape), p.A.dtype))
    # sums over batch and time, in float64; those over blocks of channels in the precision of the maps
    for name in ("D", "delta_bias"):
        outputs.setdefault(f"grad_{name}", Like((d,), p.u.dtype))
    summed = {f"grad_{name}": (batch, True) for name in ("A", "D", "delta_bias")}
    for name, x in (("B", p.B), ("C", p.C)):
        whole = len(x.shape) == 4
        summed[f"grad_{name}"] = (blocks * batch // max(1, x.shape[0]), False) if whole else (batch, True)
    return Launch(
        "selective_scan_gradient", backward_kernel, _kind(p), BACKWARD_RECORD, _places(likes), outputs,
        _sizes(p, static, block, min(TILE, n)), batch * groups * blocks, thread_count(threads), summed,
        frozenset(outputs) - frozenset(summed),
    )  # fmt: skip


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
    block = max(lanes, min(block, -(-width // lanes) * lanes))
    return block, -(-width // block)


def _contiguous(arrays: Sequence[Any]) -> Inputs:
    """Inputs as the kernels take them: contiguous, of one precision, B and C as complex as A and of as many groups."""
    given = widened(np, Inputs(*arrays))
    real, is_complex = given.u.dtype, np.iscomplexobj(given.A)
    for name in ("B", "C", "initial_state"):
        if (array := getattr(given, name)) is not None and np.iscomplexobj(array) and not is_complex:
            msg = f"{name} is complex but A is real; expected real numbers, or a complex A"
            raise TypeError(msg)
    state = np.dtype(np.result_type(real, np.complex64)) if is_complex else real
    kept = Inputs(*(
        None if x is None else np.ascontiguousarray(x, state if name in OF_STATE else real)
        for name, x in given._asdict().items()
    ))  # fmt: skip
    groups = lcm(*(x.shape[2] for x in (kept.B, kept.C) if x.ndim == 4))
    for name in ("B", "C"):
        x = getattr(kept, name)
        if x.ndim == 4 and x.shape[2] < groups:
            kept = kept._replace(**{name: np.repeat(x, groups // x.shape[2], axis=2)})
    return kept


def _without_states(p: Inputs, y: Array, state: Array) -> None:
    """No step or no state: y = D u silu(z), and the state stays."""
    y[...] = 0 if p.D is None else p.D * p.u
    if p.z is not None:
        y *= p.z / (1 + np.exp(-p.z))
    state[...] = 0 if p.initial_state is None else p.initial_state


def _scan_chunks(p: Inputs, plan: Launch, chunk: int, y: Array, state: Array) -> None:
    """Two passes over chunks of time: what each leaves of a zero state, then y from the true initial states.

    A chunk carries a state h to exp(A ΣΔ) h + (what it leaves of zero): sums of Δ suffice.
    """
    batch, n, d = p.u.shape
    chunks = -(-n // chunk)
    plan = replace(plan, sizes={**plan.sizes, "chunk": chunk}, tasks=plan.tasks * chunks)
    states = np.empty((batch, chunks, *p.A.shape), p.A.dtype)
    sums = np.empty((batch, chunks, d), p.u.dtype)
    arrays = p._asdict()
    _run(plan, arrays | {"initial_state": None, "state": states, "delta_sum": sums})
    h = np.zeros(()) if p.initial_state is None else p.initial_state
    with np.errstate(over="ignore", invalid="ignore"):  # what grows may exceed the range, as it does step by step
        decays = np.exp(sums[..., None].astype(np.float64) * p.A)
        for k in range(chunks - 1):  # states[:, k] becomes the initial state of chunk k
            left = states[:, k].copy()
            states[:, k] = h
            h = np.where(h == 0, 0, decays[:, k] * h) + left
    states[:, -1] = h
    _run(plan, arrays | {"initial_state": states, "state": states, "y": y})
    state[...] = states[:, -1]


def _run(plan: Launch, arrays: dict[str, Any]) -> None:
    record = record_of(plan.fields, {**dict.fromkeys(plan.fields), **plan.sizes, **arrays})
    run_tasks(plan.make(*plan.kind), plan.tasks, record, plan.threads, arrays)


def _places(likes: Sequence[Any]) -> dict[str, int]:
    names = (*Inputs._fields, "grad_y", "grad_state")
    return {name: place for place, (name, x) in enumerate(zip(names, likes, strict=False)) if x is not None}


def _kind(p: Inputs) -> tuple[str, bool, bool, bool]:
    """What the kernels are specialised for."""
    return np.dtype(p.u.dtype).name, np.dtype(p.A.dtype).kind == "c", len(p.B.shape) == 2, len(p.C.shape) == 2


def _groups(p: Inputs) -> int:
    """Groups of channels that share B and C; 1 where both are constant."""
    return max(x.shape[2] if len(x.shape) == 4 else 1 for x in (p.B, p.C))


def _sizes(p: Inputs, static: Mapping[str, Any], block: int, chunk: int) -> dict[str, int]:
    batch, n, d = p.u.shape
    sizes = {"batch": batch, "n": n, "d": d, "groups": _groups(p), "d_state": p.A.shape[1], "block": block}
    for name, x in (("B_step", p.B), ("C_step", p.C)):  # real numbers from one batch item to the next
        own = len(x.shape) == 4 and x.shape[0] > 1
        parts = 2 if np.dtype(x.dtype).kind == "c" else 1
        sizes[name] = x.shape[1] * x.shape[2] * x.shape[3] * parts if own else 0
    return {**sizes, "chunk": chunk, **{name: int(static[name]) for name in ("delta_softplus", "reverse")}}
