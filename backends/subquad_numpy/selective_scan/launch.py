"""The selective scan and its gradient as launches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from subquad.backend import Array, Like
from subquad.core.dtypes import cast
from subquad.kernels.selective_scan import Inputs, widened
from subquad_numpy.runtime.launch import Launch, Rows, Run


def launch(arrays: Sequence[Any], static: Mapping[str, Any], run: Run, *, save: bool = False) -> tuple[Array, ...]:
    """The outputs of the kernel `selective_scan`, by one launch; what is saved is the state before each tile."""
    from subquad_numpy.codegen import lanes_of
    from subquad_numpy.runtime.threads import thread_count
    from subquad_numpy.selective_scan.calls import SMALL, TILE, cut_channels, states_of_tiles
    from subquad_numpy.selective_scan.forward import FORWARD_RECORD, forward_kernel

    xp, stored = array_namespace(arrays[0]), Inputs(*arrays).u.dtype
    p = _prepared(xp, Inputs(*arrays))
    batch, n, d = p.u.shape
    threads = 1 if math.prod(p.u.shape) * p.A.shape[1] < SMALL else thread_count()
    groups, lanes = _groups(p), lanes_of(np.dtype(p.u.dtype))
    block, tasks = cut_channels(batch, groups, d, threads, lanes)
    results = {"y": Like(p.u.shape, p.u.dtype), "state": Like((batch, *p.A.shape), p.A.dtype)}
    if save:
        shape = states_of_tiles(batch, n, groups, d // groups, p.A.shape[1], lanes)
        results["checkpoints"] = Like(shape, p.A.dtype)
    made = Launch(
        forward_kernel,
        _kind(p),
        FORWARD_RECORD,
        results,
        _sizes(p, static) | {"block": block, "chunk": n, "tile": TILE},
        tasks=tasks,
        threads=threads,
    )
    found = run(made, p._asdict())
    return cast(xp, found["y"], stored), found["state"], *((found["checkpoints"],) if save else ())


def launch_backward(
    arrays: Sequence[Any],
    static: Mapping[str, Any],
    outputs: Sequence[Array],
    grads: Sequence[Array],
    run: Run,
) -> tuple[Array | None, ...]:
    """The gradients by all inputs, by one launch, from the states that `launch` has saved; y and state are not read."""
    from subquad_numpy.codegen import lanes_of
    from subquad_numpy.runtime.threads import thread_count
    from subquad_numpy.selective_scan.backward import backward_kernel
    from subquad_numpy.selective_scan.calls import TILE, blocks_of_task, cut_gradient
    from subquad_numpy.selective_scan.gradient import BACKWARD_RECORD

    given = Inputs(*arrays)
    xp = array_namespace(given.u)
    p = _prepared(xp, given)
    batch, n, d = p.u.shape
    groups = _groups(p)
    part, parts = cut_gradient(batch, groups, d // groups, lanes_of(np.dtype(p.u.dtype)))
    is_complex, threads = np.dtype(p.A.dtype).kind == "c", thread_count()
    many = 1 if is_complex else blocks_of_task(batch * groups, parts, threads)
    given_to = {name: x for name, x in p._asdict().items() if x is not None and name != "resets"}
    results = {f"grad_{name}": Like(x.shape, x.dtype) for name, x in given_to.items()}
    results.setdefault("grad_initial_state", Like((batch, *p.A.shape), p.A.dtype))
    # Sums over batch and time are in float64; sums over blocks of channels have the precision of B and C.
    for name in ("D", "delta_bias"):
        results.setdefault(f"grad_{name}", Like((d,), p.u.dtype))
    summed = {f"grad_{name}": Rows(batch, wide=True) for name in ("A", "D", "delta_bias")}
    for name, x in (("B", p.B), ("C", p.C)):
        constant = x.ndim == 2
        summed[f"grad_{name}"] = Rows(batch if constant else parts * batch // x.shape[0], wide=constant)
    made = Launch(
        backward_kernel,
        _kind(p),
        BACKWARD_RECORD,
        results,
        _sizes(p, static) | {"block": many * part, "part": part, "chunk": n, "tile": TILE},
        tasks=batch * groups * -(-parts // many),
        threads=threads,
        zeros=frozenset() if math.prod(p.u.shape) > 0 else frozenset(results),  # else the kernel writes every number
        summed=summed,
    )
    grad_y, grad_state = grads
    given_by = {"grad_y": cast(xp, grad_y, p.u.dtype), "grad_state": grad_state, "checkpoints": outputs[2]}
    found = run(made, p._asdict() | given_by)

    def of(name: str, x: Array) -> Array:
        """The gradient by input x, with the groups and the dtype of x."""
        value = found[f"grad_{name}"]
        if name in ("B", "C") and x.ndim == 4 and x.shape[2] < groups:
            value = xp.sum(xp.reshape(value, (*x.shape[:3], groups // x.shape[2], x.shape[3])), axis=3)
        if xp.isdtype(value.dtype, "complex floating") and not xp.isdtype(x.dtype, "complex floating"):
            value = xp.real(value)
        return cast(xp, value, x.dtype)

    return tuple(of(name, x) if name in given_to else None for name, x in given._asdict().items())


def _prepared(xp: ModuleType, inputs: Inputs) -> Inputs:
    """The inputs as kernels take them: of one precision and equally many groups, B, C and the state complex if A is."""
    inputs = widened(xp, inputs)
    real, state = inputs.u.dtype, inputs.A.dtype
    groups = math.lcm(*[x.shape[2] for x in (inputs.B, inputs.C) if x.ndim == 4])

    def shared(x: Array) -> Array:
        x = cast(xp, x, state)
        return xp.repeat(x, groups // x.shape[2], axis=2) if x.ndim == 4 and x.shape[2] < groups else x

    return Inputs(
        *(cast(xp, x, real) for x in inputs[:2]),
        inputs.A,
        *(shared(x) for x in inputs[3:5]),
        *(cast(xp, x, real) for x in inputs[5:8]),
        cast(xp, inputs.initial_state, state),
        inputs.resets,
    )


def _groups(p: Inputs) -> int:
    return max(x.shape[2] if x.ndim == 4 else 1 for x in (p.B, p.C))


def _kind(p: Inputs) -> tuple[Any, ...]:
    dtype = np.dtype(p.u.dtype)
    return dtype.name, np.dtype(p.A.dtype).kind == "c", p.B.ndim == 2, p.C.ndim == 2


def _sizes(p: Inputs, static: Mapping[str, Any]) -> dict[str, int]:
    batch, n, d = p.u.shape
    sizes = {"batch": batch, "n": n, "d": d, "groups": _groups(p), "d_state": p.A.shape[1]}
    for name, x in (("B_step", p.B), ("C_step", p.C)):  # stride between batch items, in real numbers
        own = x.ndim == 4 and x.shape[0] > 1
        sizes[name] = math.prod(x.shape[1:]) * (2 if np.dtype(x.dtype).kind == "c" else 1) if own else 0
    return sizes | {name: int(static[name]) for name in ("delta_softplus", "reverse")}
