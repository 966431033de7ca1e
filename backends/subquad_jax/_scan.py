"""The compiled selective scan under JAX: XLA calls the CPU kernel, and its gradient, without leaving the program."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct

from subquad.kernels.selective_scan import Inputs, widened
from subquad.kernels.selective_scan import selective_scan as kernel
from subquad_jax import _cpu, _varying

Outputs = tuple[Array, Array]  # y and the last state, or gradients by them


def declines(*arrays: Array | None, delta_softplus: bool, reverse: bool) -> str | None:
    """Why the compiled kernel cannot take the call."""
    return _cpu.declines(*arrays) or _cpu.self_check(_counts)


def selective_scan(*arrays: Array | None, delta_softplus: bool, reverse: bool) -> Outputs:
    """The kernel `selective_scan`."""
    inputs = widened(jnp, Inputs(*arrays))
    groups = np.lcm.reduce([x.shape[2] for x in (inputs.B, inputs.C) if x.ndim == 4] or [1])

    def shared(x: Array) -> Array:
        x = x.astype(inputs.A.dtype)
        return jnp.repeat(x, groups // x.shape[2], axis=2) if x.ndim == 4 else x

    inputs = inputs._replace(B=shared(inputs.B), C=shared(inputs.C))
    # of one type, as their gradients will be: JAX sums up those of what was the same in every shard
    return _scan(delta_softplus, reverse, _varying.vary(inputs, _varying.axes_of(inputs)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(delta_softplus: bool, reverse: bool, inputs: Inputs) -> Outputs:
    from subquad_jax import _ffi
    from subquad_numpy import codegen as _simd
    from subquad_numpy.runtime import threads as _threads
    from subquad_numpy.selective_scan import calls as scan
    from subquad_numpy.selective_scan import forward as kernels

    u, A = inputs.u, inputs.A
    batch, _, d = u.shape
    threads = 1 if u.size * A.shape[1] < scan.SMALL else _threads.thread_count()
    block, tasks = scan.cut_channels(batch, _groups(inputs), d, threads, _simd.lanes_of(np.dtype(u.dtype)))
    results = {"y": ShapeDtypeStruct(u.shape, u.dtype), "state": ShapeDtypeStruct((batch, *A.shape), A.dtype)}
    sizes = _sizes(inputs, delta_softplus, reverse, block=block, chunk=u.shape[1])
    target = _ffi.register("selective_scan", kernels.forward_kernel, *_kind(inputs))
    return tuple(_ffi.call(target, kernels.FORWARD_RECORD, inputs._asdict(), results, sizes, tasks, threads))


def _forward(delta_softplus: bool, reverse: bool, inputs: Inputs) -> tuple[Outputs, Inputs]:
    return _scan(delta_softplus, reverse, inputs), inputs


def _backward(delta_softplus: bool, reverse: bool, inputs: Inputs, grads: Outputs) -> tuple[Inputs]:
    return (_gradient(delta_softplus, reverse, inputs, grads),)


_scan.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gradient(delta_softplus: bool, reverse: bool, inputs: Inputs, grads: Outputs) -> Inputs:
    from subquad_jax import _ffi
    from subquad_numpy import codegen as _simd
    from subquad_numpy.runtime import threads as _threads
    from subquad_numpy.selective_scan import backward as kernels
    from subquad_numpy.selective_scan import gradient_calls as scan_backward

    u, A = inputs.u, inputs.A
    batch, n, d = u.shape
    groups, width = _groups(inputs), d // _groups(inputs)
    block, blocks = scan_backward.cut_gradient(batch, groups, width, _simd.lanes_of(np.dtype(u.dtype)))
    given = {name: x for name, x in inputs._asdict().items() if x is not None}
    results = {f"grad_{name}": ShapeDtypeStruct(x.shape, x.dtype) for name, x in given.items()}
    results.setdefault("grad_initial_state", ShapeDtypeStruct((batch, *A.shape), A.dtype))
    # sums over batch and time, in float64; those over blocks of channels in the precision of the maps
    for name in ("D", "delta_bias"):
        results.setdefault(f"grad_{name}", ShapeDtypeStruct((d,), u.dtype))
    sums = {f"grad_{name}": (batch, 1) for name in ("A", "D", "delta_bias")}
    for name in ("B", "C"):
        x = given[name]
        sums[f"grad_{name}"] = (batch, 1) if x.ndim == 2 else (blocks * batch // x.shape[0], 0)
    grad_y, grad_state = grads
    operands: dict[str, Any] = {**given, "grad_y": grad_y, "grad_state": jnp.conj(grad_state)}
    sizes = _sizes(inputs, delta_softplus, reverse, block=block, chunk=min(scan_backward.TILE, n))
    target = _ffi.register("selective_scan_backward", kernels.backward_kernel, *_kind(inputs))
    tasks = batch * groups * blocks
    found = _ffi.call(target, kernels.BACKWARD_RECORD, operands, results, sizes, tasks, _threads.thread_count(), sums)
    by_name = dict(zip(results, found, strict=True))
    # the kernel gives ∂/∂Re + i ∂/∂Im; a cotangent in JAX is its conjugate
    named = inputs._asdict().items()
    return Inputs(*(None if x is None else jnp.conj(by_name[f"grad_{name}"]) for name, x in named))


def _gradient_forward(delta_softplus: bool, reverse: bool, *saved: Any) -> tuple[Inputs, Any]:
    return _gradient(delta_softplus, reverse, *saved), saved


def _gradient_backward(delta_softplus: bool, reverse: bool, saved: Any, grads: Inputs) -> tuple[Inputs, Outputs]:
    """Through the gradient of the generic form: derivatives of any order."""

    def gradient(inputs: Inputs, grads: Outputs) -> Inputs:
        options = {"delta_softplus": delta_softplus, "reverse": reverse, "implementation": "generic"}
        return jax.vjp(lambda inputs: kernel(*inputs, **options), inputs)[1](grads)[0]

    return jax.vjp(gradient, *saved)[1](grads)


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _sizes(inputs: Inputs, delta_softplus: bool, reverse: bool, **more: int) -> dict[str, int]:
    batch, n, d = inputs.u.shape
    sizes = {"batch": batch, "n": n, "d": d, "groups": _groups(inputs), "d_state": inputs.A.shape[1], **more}
    for name, x in (("B_step", inputs.B), ("C_step", inputs.C)):
        own = x.ndim == 4 and x.shape[0] > 1
        sizes[name] = int(np.prod(x.shape[1:])) * (2 if jnp.iscomplexobj(x) else 1) if own else 0
    return {**sizes, "delta_softplus": int(delta_softplus), "reverse": int(reverse)}


def _groups(inputs: Inputs) -> int:
    return max(x.shape[2] if x.ndim == 4 else 1 for x in (inputs.B, inputs.C))


def _kind(inputs: Inputs) -> tuple[str, bool, bool, bool]:
    is_complex = bool(jnp.iscomplexobj(inputs.A))
    return np.dtype(inputs.u.dtype).name, is_complex, inputs.B.ndim == 2, inputs.C.ndim == 2


def _counts() -> bool:
    one = jnp.ones((1, 3, 1), jnp.float32)
    zero = jnp.zeros((1, 1), jnp.float32)
    maps = one[..., None]
    y, state = _scan(False, False, Inputs(one, one, zero, maps, maps, None, None, None, None))
    return np.array_equal(np.asarray(y)[0, :, 0], [1, 2, 3]) and float(state[0, 0, 0]) == 3
