"""Reversible residual layers: inputs follow from outputs, so a backward pass needs no stored activations.

y1 = x1 + f(x2),    y2 = x2 + g(y1)
x2 = y2 − g(y1),    x1 = y1 − f(x2)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Function = Callable[[Any, Any], Any]  # of parameters and a stream
Layer = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


def reversible(f: Function, g: Function, /) -> Layer:
    """A reversible residual layer of two functions, after the Reformer's equations (7) and (8) [1]_, [2]_.

        y1 = x1 + f(params_f, x2),    y2 = x2 + g(params_g, y1)
        x2 = y2 − g(params_g, y1),    x1 = y1 − f(params_f, x2)

    The inputs follow from the outputs. Reverse-mode differentiation therefore keeps the outputs and the parameters, and
    computes again what f and g stored on their way.

    Parameters
    ----------
    f, g : callable
        Each maps ``(params, x)`` to one array with the shape of x, of a dtype that can be added without changing that
        of the stream. All that is to get a gradient comes in through ``params``, any pytree of arrays.

    Returns
    -------
    callable
        ``layer(params_f, params_g, x1, x2)``, which returns (y1, y2). The streams x1 and x2, of any shape, have one
        shape and one floating or complex dtype.

    Raises
    ------
    TypeError
        If f or g is no callable; from the layer, if a stream or an output of f or g is not a floating or complex array.
    ValueError
        From the layer, if shapes or dtypes differ.

    See Also
    --------
    reversible_sequence : Many layers with the memory of one.

    Notes
    -----
    Gradients are those of the plain layer, up to the rounding of x2 and x1 as recovered: some units in the last place
    of y per layer. A backward pass calls f and g once more. Random numbers are the same again if their keys are leaves
    of ``params``, which get no gradient. ``jit``, ``vmap`` and ``grad`` of any order work; forward mode (``jvp``,
    ``jacfwd``) does not, as for all of `jax.custom_vjp`, and a differentiated array that f or g captures, instead of
    getting it in ``params``, is JAX's UnexpectedTracerError.

    A chain of such layers keeps the outputs of each. In one jitted program on the CPU, XLA orders its operations so
    that a chain saves little, as with `jax.checkpoint`; `reversible_sequence` does not depend on that order.

    References
    ----------
    .. [1] N. Kitaev, Ł. Kaiser, A. Levskaya, "Reformer: The Efficient Transformer", ICLR 2020, section 3.
    .. [2] A. Gomez, M. Ren, R. Urtasun, R. Grosse, "The Reversible Residual Network: Backpropagation Without Storing
       Activations", NeurIPS 2017.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, subquad_jax
    >>> layer = subquad_jax.reversible(lambda w, x: jnp.tanh(x @ w), lambda w, x: x * w)
    >>> params_f, params_g, x = jnp.eye(3) / 2, jnp.ones(3), jnp.ones((2, 3))
    >>> jax.grad(lambda params_f: layer(params_f, params_g, x, x)[1].sum())(params_f).shape
    (3, 3)
    """
    _check_callables(f, g)

    @jax.custom_vjp
    def layer(params_f: Any, params_g: Any, x1: Any, x2: Any) -> tuple[Any, Any]:
        return _forward(f, g, params_f, params_g, x1, x2)

    def forward(params_f: Any, params_g: Any, x1: Any, x2: Any) -> Any:
        y = _forward(f, g, params_f, params_g, x1, x2)
        return y, (params_f, params_g, y)

    def backward(saved: Any, grads: Any) -> Any:
        params_f, params_g, y = saved
        # else XLA would merge the second call of g with the first one, or make it before its gradient is known
        y, grads = jax.lax.optimization_barrier((y, grads))
        _, grads, dparams_f, dparams_g = _backward(f, g, params_f, params_g, y, grads)
        return _with_float0(dparams_f, params_f), _with_float0(dparams_g, params_g), *grads

    layer.defvjp(forward, backward)
    return _checking(layer)


def reversible_sequence(f: Function, g: Function, /) -> Layer:
    """Reversible layers one after another, in memory for activations that does not grow with their number.

        x1[l+1] = x1[l] + f(params_f[l], x2[l]),    x2[l+1] = x2[l] + g(params_g[l], x1[l+1])

    The layers run in `jax.lax.scan`. Reverse-mode differentiation keeps the outputs of the last layer and the
    parameters, and recovers the streams layer by layer on its way back.

    Parameters
    ----------
    f, g : callable
        As in `reversible`.

    Returns
    -------
    callable
        ``sequence(params_f, params_g, x1, x2)``, which returns (y1, y2) of the last layer. Every array in ``params_f``
        and ``params_g`` has the layers on its first axis; ``jax.tree.map(lambda *x: jnp.stack(x), *params)`` makes them
        from a list with one pytree for each layer.

    Raises
    ------
    TypeError, ValueError
        As `reversible`; a ValueError, too, if first axes differ or neither pytree has an array.

    See Also
    --------
    reversible : One layer, and all that holds of gradients, random numbers and transforms.

    Notes
    -----
    Rounding of what is recovered adds up over the layers: keep the streams in float32, or float64.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, subquad_jax
    >>> sequence = subquad_jax.reversible_sequence(lambda w, x: jnp.tanh(x @ w), lambda w, x: x * w)
    >>> params_f, params_g, x = jnp.stack(24 * [jnp.eye(3) / 8]), jnp.ones((24, 3)) / 8, jnp.ones((2, 3))
    >>> jax.grad(lambda params_f: sequence(params_f, params_g, x, x)[1].sum())(params_f).shape
    (24, 3, 3)
    """
    _check_callables(f, g)

    def run(params_f: Any, params_g: Any, x1: Any, x2: Any) -> tuple[Any, Any]:
        def step(streams: Any, params: Any) -> tuple[Any, None]:
            return _forward(f, g, *params, *streams), None

        return jax.lax.scan(step, (x1, x2), (params_f, params_g))[0]

    sequence = jax.custom_vjp(run)

    def forward(params_f: Any, params_g: Any, x1: Any, x2: Any) -> Any:
        y = run(params_f, params_g, x1, x2)
        return y, (params_f, params_g, y)

    def backward(saved: Any, grads: Any) -> Any:
        params_f, params_g, y = saved

        def step(carry: Any, params: Any) -> Any:
            x, grads, *dparams = _backward(f, g, *params, *carry)
            return (x, grads), dparams

        (_, grads), dparams = jax.lax.scan(step, (y, grads), (params_f, params_g), reverse=True)
        return _with_float0(dparams[0], params_f), _with_float0(dparams[1], params_g), *grads

    sequence.defvjp(forward, backward)
    return _checking(sequence, layers=True)


def _forward(f: Function, g: Function, params_f: Any, params_g: Any, x1: Any, x2: Any) -> tuple[Any, Any]:
    y1 = x1 + _checked("f", f(params_f, x2), x1)
    return y1, x2 + _checked("g", g(params_g, y1), x2)


def _backward(f: Function, g: Function, params_f: Any, params_g: Any, y: Any, grads: Any) -> Any:
    """The inputs of a layer, their gradients, and those of the parameters: lists with one for each that is floating."""
    (y1, y2), (dy1, dy2) = y, grads
    g_out, dparams_g, dy1_by_g = _call_again(g, params_g, y1, dy2)
    x2 = y2 - g_out
    dx1 = dy1 + dy1_by_g
    f_out, dparams_f, dx2_by_f = _call_again(f, params_f, x2, dx1)
    return (y1 - f_out, x2), (dx1, dy2 + dx2_by_f), dparams_f, dparams_g


def _call_again(function: Function, params: Any, x: Any, grad: Any) -> Any:
    leaves, structure = jax.tree.flatten(params)
    floating = [leaf for leaf in leaves if _is_floating(leaf)]

    def of_floating(floating: Any, x: Any) -> Any:
        rest = iter(floating)
        return function(jax.tree.unflatten(structure, [next(rest) if _is_floating(p) else p for p in leaves]), x)

    out, pull_back = jax.vjp(of_floating, floating, x)
    return out, *pull_back(grad.astype(out.dtype))


def _with_float0(grads: list[Any], params: Any) -> Any:
    """A pytree like `params`, with the gradients of floating leaves, and float0, JAX's zero, for the others."""
    leaves, structure = jax.tree.flatten(params)
    rest = iter(grads)
    return jax.tree.unflatten(
        structure, [next(rest) if _is_floating(p) else np.zeros(jnp.shape(p), jax.dtypes.float0) for p in leaves]
    )


def _is_floating(x: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _checking(run: Any, *, layers: bool = False) -> Layer:
    """The function, after checks of its arguments: inside of it their errors would name JAX's frames."""

    def checked(params_f: Any, params_g: Any, x1: Any, x2: Any) -> tuple[Any, Any]:
        _check_streams(x1, x2)
        if layers:
            _check_layers(params_f, params_g)
        return run(params_f, params_g, x1, x2)

    return checked


def _check_callables(f: Any, g: Any) -> None:
    for name, function in (("f", f), ("g", g)):
        if not callable(function):
            msg = f"{name} must be a callable of parameters and an array, got {type(function).__name__}"
            raise TypeError(msg)


def _check_streams(x1: Any, x2: Any) -> None:
    for name, x in (("x1", x1), ("x2", x2)):
        if not isinstance(x, jax.Array | np.ndarray):
            msg = f"{name} must be an array, got {type(x).__name__}"
            raise TypeError(msg)
        if not _is_floating(x):
            msg = f"{name} must be floating or complex, got {x.dtype}; convert it, {name}.astype(float)"
            raise TypeError(msg)
    for what in ("shape", "dtype"):
        a, b = getattr(x1, what), getattr(x2, what)
        if a != b:
            msg = f"x1 and x2 must have one {what}, got {a} and {b}"
            raise ValueError(msg)


def _check_layers(params_f: Any, params_g: Any) -> None:
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves((params_f, params_g))]
    if not shapes or () in shapes or len({shape[0] for shape in shapes}) > 1:
        msg = f"all arrays of params_f and params_g must have the layers on their first axis, got shapes {shapes}"
        raise ValueError(msg)


def _checked(name: str, out: Any, like: Any) -> Any:
    """The output of f or g, if it can be added to `like` without changing its shape or dtype."""
    if not isinstance(out, jax.Array | np.ndarray):
        msg = f"{name} must return one array, got {type(out).__name__}; wrap it so that it returns the array to add"
        raise TypeError(msg)
    if out.shape != like.shape:
        msg = f"{name} must return the shape that its layer has, {like.shape}, got {out.shape}"
        raise ValueError(msg)
    if jnp.promote_types(out.dtype, like.dtype) != like.dtype:
        msg = f"{name} must return {like.dtype} or less, which the layer has, got {out.dtype}; convert one of them"
        raise ValueError(msg)
    return out
