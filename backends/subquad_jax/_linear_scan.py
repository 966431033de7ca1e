"""The compiled linear scan under JAX: XLA calls the CPU kernel, and its gradient, without leaving the program."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, ShapeDtypeStruct

from subquad.kernels._linear_scan_gradient import linear_scan_gradient
from subquad_jax import _cpu, _varying

Gradients = tuple[Array, Array, Array | None]  # by a, b and the initial state


def declines(a: Array, b: Array, initial_state: Array | None, /, *, reverse: bool) -> str | None:
    """Why the compiled kernel cannot take the call."""
    return _cpu.declines(a, b, initial_state) or _cpu.self_check(_counts)


def linear_scan(a: Array, b: Array, initial_state: Array | None, /, *, reverse: bool) -> Array:
    """The kernel `linear_scan`."""
    inputs = (a, b, initial_state)
    # of one type, as their gradients will be: JAX sums up those of what was the same in every shard
    return _scan(reverse, *_varying.vary(inputs, _varying.axes_of(inputs)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(reverse: bool, a: Array, b: Array, initial_state: Array | None) -> Array:
    from subquad_numpy.linear_scan import kernel as kernels

    operands = {"a": a, "b": b, "initial_state": initial_state}
    return _call(kernels.linear_scan_kernel, kernels.SCAN_RECORD, reverse, operands, {"h": b.shape})[0]


def _forward(reverse: bool, a: Array, b: Array, initial_state: Array | None) -> tuple[Array, Any]:
    h = _scan(reverse, a, b, initial_state)
    return h, (a, h, initial_state)


def _backward(reverse: bool, saved: Any, grad_h: Array) -> Gradients:
    # a cotangent in JAX is the conjugate of ∂/∂Re + i ∂/∂Im
    return jax.tree.map(jnp.conj, _gradient(reverse, *saved, jnp.conj(grad_h)))


_scan.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(reverse: bool, a: Array, h: Array, initial_state: Array | None, grad_h: Array) -> Gradients:
    from subquad_numpy.linear_scan import kernel as kernels

    operands = {"a": a, "h": h, "initial_state": initial_state, "grad_h": grad_h}
    results = {"grad_a": a.shape, "grad_b": a.shape, "grad_initial_state": (a.shape[0], a.shape[2])}
    order = kernels.GRADIENT_RECORD
    by_a, by_b, by_state = _call(kernels.linear_scan_gradient_kernel, order, reverse, operands, results)
    return by_a, by_b, None if initial_state is None else by_state


def _gradient_forward(reverse: bool, *saved: Array | None) -> tuple[Gradients, Any]:
    return _gradient(reverse, *saved), saved


def _gradient_backward(reverse: bool, saved: Any, grads: Gradients) -> tuple[Array | None, ...]:
    """Through the form of the gradient that is made of scans: derivatives of any order."""
    return jax.vjp(functools.partial(linear_scan_gradient, reverse=reverse), *saved)[1](grads)


_gradient.defvjp(_gradient_forward, _gradient_backward)


def _call(
    make: Any,
    order: tuple[str, ...],
    reverse: bool,
    operands: dict[str, Array | None],
    results: dict[str, tuple[int, ...]],
) -> Any:
    """Results of these shapes from the kernel that `make` compiles for a dtype."""
    from subquad_jax import _ffi
    from subquad_numpy.linear_scan.calls import cut_work

    like = operands["a"]
    assert like is not None
    dtype = np.dtype(like.dtype)
    sizes, tasks, threads = cut_work(like.shape, dtype, reverse)
    target = _ffi.register(make.__name__, make, dtype.name)
    shaped = {name: ShapeDtypeStruct(shape, dtype) for name, shape in results.items()}
    return _ffi.call(target, order, operands, shaped, sizes, tasks, threads, writes_all=True)


def _counts() -> bool:
    one = jnp.ones((1, 3, 1), jnp.float32)
    return np.array_equal(np.asarray(_scan(False, one, one, None))[0, :, 0], [1, 2, 3])
